"""A model as the chosen backend runs it: called like the model, whatever the spelling and the shapes of the call.

    selection.model(tokens, mask)               as the samples were
    selection.model(mask=mask, tokens=tokens)   the same, bound by name
    selection.model(longer_tokens, longer_mask) built for that shape in its first call, as `select` built the samples'

What is built for a shape is checked against FP32 as the candidates of the search were. At most `MAX_SHAPES` are kept;
further shapes, and those that the backend cannot run, are answered by the model itself in eager FP32, with a warning.
Some candidates take any shape as they are (eager ones, runtimes on a file) and need no second build.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, NoReturn

import torch
from torch import Tensor

from deepseek.compiler.runtimes.backends.flat_signature import Flattened, flatten_model
from deepseek.compiler.runtimes.backends.interface import BackendError, Built, Job
from deepseek.compiler.runtimes.selection_policy import Candidate
from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import ConfigError

MAX_SHAPES = 8
"""Beside the samples': each holds a compiled program."""
Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]


class SelectedModel:
    """A model run by the backend that was chosen; called like the model, never records gradients."""

    def __init__(
        self, built: Built, flattened: Flattened, candidate: Candidate, build_other: Callable[[Job], Built]
    ) -> None:
        self.built, self.flattened, self.candidate, self.build_other = built, flattened, candidate, build_other
        self._others: dict[Shapes, tuple[Flattened, Built] | None] = {}
        """Return the program built for another shape; `None` for one that the model itself answers."""
        self._lock = Lock()
        self._warned: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            try:
                inputs = self.flattened.bind(args, kwargs)
            except ConfigError as error:
                return self._answer_plainly(str(error), args, kwargs)
            takes_any_shape = self.built.takes_any_shape and self.flattened.answers_tensors_only
            if takes_any_shape or self.flattened.has_shapes(inputs):
                return self.flattened.restore_outputs(self.built.run(*inputs), inputs)
            other = self._find_other(inputs)
            if other is None:
                return self.flattened.model.call(*inputs)
            flattened, built = other
            return flattened.restore_outputs(built.run(*inputs), inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SelectedModel:
        return self  # its weights never change, so that copies can share it

    def __copy__(self) -> SelectedModel:
        return self

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            f"a model that {self.candidate} runs cannot be pickled, since its program belongs to this process; save "
            "the module with ds.save_model and load it there, where the decision is remembered"
        )

    def __repr__(self) -> str:
        return f"SelectedModel({self.candidate})"

    def _find_other(self, inputs: tuple[Tensor, ...]) -> tuple[Flattened, Built] | None:
        """Return the program for inputs of these shapes, built when they come for the first time."""
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        with self._lock:
            if shapes not in self._others:
                if len(self._others) >= MAX_SHAPES:
                    self._warn(
                        f"{MAX_SHAPES} shapes beside that of the samples were met, and all others run in eager FP32; "
                        "pad the inputs to a few lengths, or use ds.dynamic_graph"
                    )
                    return None
                self._others[shapes] = self._build(inputs)
            return self._others[shapes]

    def _build(self, inputs: tuple[Tensor, ...]) -> tuple[Flattened, Built] | None:
        flattened = flatten_model(self.flattened.model.model, self.flattened.restore_samples(inputs))
        try:
            return flattened, self.build_other(Job(flattened))
        except (BackendError, ConfigError) as error:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in inputs)
            self._warn(f"inputs of shape {shapes} run in eager FP32, since {self.candidate} does not: {error}")
            return None

    def _answer_plainly(self, reason: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        self._warn(f"the model runs in eager FP32 for this call: {reason}")
        return self.flattened.model.model(*args, **kwargs)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn_caller(message)
