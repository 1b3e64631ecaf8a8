"""Which tensors one step allocates, where, and how long they live, on any device.

    recorder = AllocationRecorder(model, optimizer)
    with recorder:
        ...one step...
    recorder.allocations

A dispatch mode sees every tensor that an operator returns; a weak reference to its storage says when that goes away.
Hooks on modules say which of them is at work, in the backward pass those that run when the gradient of a module's
output is there. What was allocated before counts from the beginning. Costs some ten microseconds an operator; results
stay equal to the bit. Code that is compiled allocates unseen.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from deepseek.compiler.passes.memory.peak_tracking import tensors_in

Phase = Literal["before", "forward", "backward", "optimizer"]
Kind = Literal["parameters", "optimizer state", "gradients", "activations", "temporary", "other"]
KINDS: tuple[Kind, ...] = ("parameters", "optimizer state", "gradients", "activations", "temporary", "other")


@dataclass(eq=False, slots=True)
class Allocation:
    """One storage."""

    path: str
    """Module that it was allocated in, below the model; empty outside of all."""
    shape: str
    """Type and shape of the tensor that it was seen as first: `float32[4, 8]`."""
    num_bytes: int
    phase: Phase
    begin_s: float
    """From the beginning of the recording."""
    kind: Kind = "temporary"
    end_s: float | None = None
    """When it went away; none while it has not."""
    storage: weakref.ref[Any] | None = None


@dataclass
class Recording:
    """The allocations of one step."""

    allocations: list[Allocation] = field(default_factory=list)
    phases: list[tuple[Phase, float]] = field(default_factory=list)
    """What began when, in seconds from the beginning."""
    duration_s: float = 0.0

    def survivors(self) -> list[Allocation]:
        """Return what the step allocated that is still there and neither a weight nor what belongs to one."""
        kept = ("activations", "temporary", "other")
        return [one for one in self.allocations if one.end_s is None and one.phase != "before" and one.kind in kept]


class AllocationRecorder(TorchDispatchMode):
    """Records what is allocated inside the `with`."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, with_others: bool = True) -> None:
        """Also count tensors that belong to nobody, `with_others`, which takes a walk over all objects of Python."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self._with_others = with_others
        self._model, self._optimizer = model, optimizer
        self._paths: list[str] = [""]
        self._is_optimizing = False
        self._began_s = time.perf_counter()
        self._known: dict[int, Allocation] = {}
        self._hooked: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lock = threading.RLock()  # autograd's threads release storages, too
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        for kind, path, tensor in list_owned(self._model, self._optimizer):
            self._add(tensor, path, "before", kind)
        for tensor in list_live_tensors() if self._with_others else ():
            self._add(tensor, "", "before", "other")
        for name, module in self._model.named_modules():
            self._hook(module.register_forward_pre_hook(self._push(name)))
            self._hook(module.register_forward_hook(self._pop(name), always_call=True))  # recomputation ends early
        self._hook(self._optimizer.register_step_pre_hook(lambda *_: self._optimize(True)))
        self._hook(self._optimizer.register_step_post_hook(lambda *_: self._optimize(False)))
        self.recording.phases.append(("forward", 0.0))
        self._began_s = time.perf_counter()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()
        self.recording.duration_s = time.perf_counter() - self._began_s
        self._name_kinds()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        phase = self._find_phase()
        if phase != self.recording.phases[-1][0]:
            self.recording.phases.append((phase, time.perf_counter() - self._began_s))
        for tensor in tensors_in(result):
            self._add(tensor, self._paths[-1], phase, "temporary")
        return result

    def _find_phase(self) -> Phase:
        if self._is_optimizing:
            return "optimizer"
        return "forward" if torch._C._current_graph_task_id() == -1 else "backward"

    def _add(self, tensor: Tensor, path: str, phase: Phase, kind: Kind) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        with self._lock:
            if key in self._known:
                return
            begin_s = 0.0 if phase == "before" else time.perf_counter() - self._began_s
            allocation = Allocation(path, describe_shape(tensor), storage.nbytes(), phase, begin_s, kind)
            allocation.storage = weakref.ref(storage, lambda _, key=key: self._remove(key))  # type: ignore[misc]
            self._known[key] = allocation
            self.recording.allocations.append(allocation)

    def _remove(self, key: int) -> None:
        with self._lock:
            self._known.pop(key).end_s = time.perf_counter() - self._began_s

    def _name_kinds(self) -> None:
        """Say what each allocation was, now that it is known what became of it."""
        owned = {
            tensor.untyped_storage()._cdata: (kind, path)
            for kind, path, tensor in list_owned(self._model, self._optimizer)
        }
        for key, allocation in list(self._known.items()):
            if key in owned:
                allocation.kind, allocation.path = owned[key]
            elif allocation.phase != "before":
                allocation.kind = "other"
        backward_s = [begin_s for phase, begin_s in self.recording.phases if phase == "backward"]
        for allocation in self.recording.allocations:
            if allocation.phase == "forward" and allocation.end_s is not None:
                is_kept = any(allocation.begin_s < begin_s < allocation.end_s for begin_s in backward_s)
                allocation.kind = "activations" if is_kept else "temporary"

    def _hook(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def _push(self, name: str) -> Callable[..., None]:
        return lambda *_: self._paths.append(name)

    def _pop(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
            self._paths.pop()
            for tensor in tensors_in(outputs):
                if tensor.requires_grad and tensor not in self._hooked:  # the innermost module counts
                    self._hooked[tensor] = name
                    tensor.register_hook(lambda _: self._paths.__setitem__(-1, name))

        return leave

    def _optimize(self, is_begun: bool) -> None:
        self._is_optimizing = is_begun
        self._paths = [""]


def list_owned(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Kind, str, Tensor]]:
    """The weights, their gradients and the optimizer's state, each with its kind and the module it belongs to."""
    paths: dict[Tensor, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        paths[tensor] = name.rpartition(".")[0]
        yield "parameters", paths[tensor], tensor
    for parameter in model.parameters():
        if parameter.grad is not None:
            yield "gradients", paths[parameter], parameter.grad
    for part in getattr(optimizer, "parts", (optimizer,)):
        for owner, values in part.state.items():
            for value in tensors_in(values):
                yield "optimizer state", paths.get(owner, ""), value


def list_live_tensors() -> list[Tensor]:
    """Return every tensor that Python knows of."""
    found = gc.get_objects()
    classes = {kind for kind in set(map(type, found)) if issubclass(kind, Tensor)}  # few beside the objects
    return [tensor for tensor in found if type(tensor) in classes and not is_fake(tensor)]


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has no memory of its own: it is on `meta`, or stands for one in a trace."""
    return tensor.is_meta or tensor.layout != torch.strided or type(tensor).__name__ == "FakeTensor"


def describe_shape(tensor: Tensor) -> str:
    """Write the type and shape of a tensor.

    >>> describe_shape(torch.zeros(2, 3))
    'float32[2, 3]'
    """
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
