"""What calibrating an int8 model takes: most activations of one batch at once.

NNCF and ONNX Runtime measure the range of each tensor with nodes that they add to the model, and let go of many
activations only at its end: YOLOv7 on 16 images of 640 x 640 computes 20 GB, of which ONNX Runtime holds all, twice.
A process that asks for more than there is gets killed by the system, and whoever called AUTO with it; so the size is
counted first, on tensors without data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek.compiler.runtimes.backends.flat_signature import Flattened
from deepseek.compiler.runtimes.backends.interface import BackendError
from deepseek.core.machine import measure_free_bytes


def refuse_too_large(flattened: Flattened, runtime: str, *, share: float) -> None:
    """Raise `BackendError` where `share` times the activations of one batch are more than the memory that is free."""
    needed, free = share * count_activation_bytes(flattened), measure_free_bytes()
    if needed > free:
        raise BackendError(
            f"{runtime} would hold about {needed / 1e9:.2g} GB of activations while it calibrates, and "
            f"{free / 1e9:.2g} GB are free; give samples of fewer rows"
        )


def count_activation_bytes(flattened: Flattened) -> int:
    """Return the bytes of all results that one call of the model computes; views count nothing.

    >>> import torch
    >>> from deepseek.compiler.runtimes.backends.flat_signature import flatten_model
    >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU()).eval()
    >>> count_activation_bytes(flatten_model(model, torch.ones(4, 8)))
    256
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad(), _Counting() as counting:
        flattened.model(*[fake.from_tensor(tensor) for tensor in flattened.inputs])
    return int(counting.num_bytes)


class _Counting(TorchDispatchMode):
    """Adds up the bytes of what operators return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.num_bytes += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result
