"""The plain function as a reference: run for comparison, without leaving a trace.

`execution.py` compares the answers of pieces with these runs before it gives any, and lets `probe` show which dims
follow inside the model. Random numbers and buffers are afterwards as before; a function that changes its buffers in
each call is refused, since it would do so for each piece.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepseek.compiler.dynamic_shapes.call_arguments import Call
from deepseek.compiler.dynamic_shapes.padding import InputRole, PaddingRefusedError, take_rows


class ReferenceRuns:
    """Runs of the plain function `run_plain` of a module `owner`, or of no module."""

    def __init__(self, run_plain: Callable[..., Any], owner: nn.Module | None) -> None:
        self._run_plain, self._owner = run_plain, owner

    def probe(self, call: Call, roles: list[InputRole], values: list[float], mask: Tensor) -> None:
        """Run the batch and half of it, in rows and in length, to see which dims follow inside the model."""
        num_rows, length = mask.shape
        half = torch.arange(num_rows // 2) if num_rows > 1 else torch.zeros(2, dtype=torch.long)
        part = take_rows(call.leaves, roles, half.to(mask.device), length // 2 if length > 1 else 2, values)
        with self._without_traces():
            self._run_plain(call.bound.args, call.bound.kwargs, is_learning=True)
            try:
                self._run_plain(*call.rebuild(part), is_learning=True)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise PaddingRefusedError(f"it does not run on half of a batch ({reason})") from error

    def run(self, call: Call) -> tuple[list[Any], bool]:
        """Return the outputs of the plain function, and whether it drew random numbers for them."""
        with self._without_traces():
            before = torch.get_rng_state()
            reference = pytree.tree_leaves(self._run_plain(call.bound.args, call.bound.kwargs))
            return reference, not torch.equal(before, torch.get_rng_state())

    def run_in_evaluation(self, call: Call, parts: Sequence[list[Any]]) -> tuple[list[Any], list[list[Any]]]:
        """Return the outputs of the batch and of its parts from the plain function with dropout switched off."""
        if self._owner is None:
            raise PaddingRefusedError("it draws random numbers, so that there is nothing to compare its numbers with")
        modes = {module: module.training for module in self._owner.modules()}
        self._owner.eval()
        try:
            reference, is_random = self.run(call)
            if is_random:
                raise PaddingRefusedError("it draws random numbers even in evaluation mode, so nothing can be compared")
            with self._without_traces():
                return reference, [pytree.tree_leaves(self._run_plain(*call.rebuild(leaves))) for leaves in parts]
        finally:
            for module, is_training in modes.items():
                module.training = is_training

    def refuse_statistics(self) -> None:
        """Raise `PaddingRefusedError` for layers that average over the batch, which see what was added to it."""
        modules = () if self._owner is None else self._owner.modules()
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in modules):
            raise PaddingRefusedError("in training, its batch normalization would average over padding")

    @contextlib.contextmanager
    def _without_traces(self) -> Iterator[None]:
        buffers = [] if self._owner is None else list(self._owner.buffers())
        kept = [buffer.clone() for buffer in buffers]
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
            changed = [buffer for buffer, before in zip(buffers, kept, strict=True) if not torch.equal(buffer, before)]
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
        if changed:
            raise PaddingRefusedError("it changes its buffers in each call, and would do so for each piece")
