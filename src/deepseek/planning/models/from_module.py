"""The planner's description of a module, read off the module itself.

`trace_operators` runs one sample through a copy on the meta device, where tensors have shapes and no bytes, and writes
down every kernel that torch would launch: its operations (torch's own formulas), the bytes it reads and writes, its
weights, and what autograd keeps for the backward pass. That describes any network, convolutional ones for instance.

`read_module` reads a decoder's configuration instead, which says how it may be cut, and holds the number of weights
that follows from it against those that are there.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from deepseek.core.errors import ConfigError
from deepseek.planning.models.model_shape import ModelShape, OperatorCost, OperatorList
from deepseek.planning.naming import read_config

_TOLERANCE = 0.02  # biases, and norms in unusual positions


@dataclass
class _Traced:
    """One kernel while it is being traced."""

    name: str
    flops: float
    num_bytes: float
    parameters: int
    kept_bytes: float = 0.0


@dataclass
class _Ledger:
    """The work seen so far: kernels in order, weights already counted, storages already kept."""

    weights: dict[int, int]
    ignored: set[int]
    kernels: list[_Traced] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    alive: list[Tensor] = field(default_factory=list)
    early_bytes: float = 0.0

    def keep(self, tensor: Tensor) -> Tensor:
        """Note a tensor that autograd saves, once per storage; weights and buffers are there anyway."""
        storage = _identify_storage(tensor)
        if storage not in self.kept and storage not in self.weights and storage not in self.ignored:
            self.kept.add(storage)
            self.alive.append(tensor)
            if self.kernels:
                self.kernels[-1].kept_bytes += tensor.untyped_storage().nbytes()
            else:  # the first kernel keeps its input before it has run
                self.early_bytes += tensor.untyped_storage().nbytes()
        return tensor


class _Recorder(TorchDispatchMode):
    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not _is_view(func):
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not outputs:
            return
        self._ledger.alive += tensors + outputs  # a freed storage's address would come again
        fresh = {_identify_storage(tensor) for tensor in tensors} & set(self._ledger.weights) - self._counted
        self._counted |= fresh
        packet = func.overloadpacket
        flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
        moved = sum(tensor.numel() * tensor.element_size() for tensor in itertools.chain(tensors, outputs))
        weights = sum(self._ledger.weights[storage] for storage in fresh)
        kept, self._ledger.early_bytes = self._ledger.early_bytes, 0.0
        self._ledger.kernels.append(_Traced(packet.__name__, float(flops), float(moved), weights, kept))


def _identify_storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_view(func: Any) -> bool:
    """Say whether an operator only looks at its input in another way."""
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def trace_operators(
    module: nn.Module, *inputs: Tensor, name: str = "", dtype: torch.dtype = torch.bfloat16
) -> OperatorList:
    """Trace every kernel of one forward pass of `module` on `inputs`, which hold one sample; nothing is computed.

    Floating point weights and inputs count as `dtype`, the training precision. Raises `ConfigError` where the module
    looks at values, which shapes alone do not have.

    >>> trace_operators(nn.Linear(8, 4, bias=False), torch.zeros(1, 8)).flops
    64.0
    """
    traced = _copy_to_meta(module, dtype)
    samples = [_to_meta(tensor, dtype) for tensor in inputs]
    weights = {_identify_storage(weight): weight.numel() for weight in traced.parameters()}
    ledger = _Ledger(weights, {_identify_storage(buffer) for buffer in traced.buffers()})
    try:
        with torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda tensor: tensor), _Recorder(ledger):
            traced(*samples)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{type(module).__name__} cannot be traced without values ({reason}); give inputs of its "
            "shapes, or describe it "
            "as a ModelShape"
        ) from error
    operators = tuple(
        OperatorCost(
            kernel.name, kernel.flops, kernel.num_bytes, kernel.parameters, kernel.kept_bytes, kernel.flops > 0
        )
        for kernel in ledger.kernels
    )
    return OperatorList(name or type(module).__name__, operators)


def _copy_to_meta(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a module without its bytes; shared weights are still shared."""
    traced = copy.deepcopy(module).to(device="meta", dtype=dtype).train()
    first: dict[int, nn.Parameter] = {}
    for (path, weight), copied in zip(
        module.named_parameters(remove_duplicate=False),
        [weight for _, weight in traced.named_parameters(remove_duplicate=False)],
        strict=True,
    ):
        owner, _, attribute = path.rpartition(".")
        setattr(traced.get_submodule(owner), attribute, first.setdefault(id(weight), copied))
    return traced


def _to_meta(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(device="meta", dtype=dtype if tensor.is_floating_point() else None)


def read_module(module: nn.Module, *, sequence: int | None = None) -> ModelShape:
    """Read the shape of a decoder that carries its configuration in `config`, as ours and those of transformers do.

    Raises `ConfigError` without one, and where the weights that follow from it are not those of the module.
    """
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise ConfigError(f"{type(module).__name__} carries no configuration; trace it with trace_operators instead")
    values: Mapping[str, Any] = config.to_dict()
    shape = read_config(values, sequence=sequence)
    held = sum(weight.numel() for weight in module.parameters())
    if abs(shape.num_parameters / held - 1) > _TOLERANCE:
        raise ConfigError(
            f"{type(module).__name__} holds {held} weights and its configuration reads as "
            f"{shape.num_parameters}; it is no "
            "plain decoder, so trace it with trace_operators, or describe it as a ModelShape"
        )
    return shape
