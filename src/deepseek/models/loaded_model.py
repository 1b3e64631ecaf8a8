"""What `load_model` returns: a model that is called, says what it is and who runs it, and holds its plain module.

    model = load_model("runs/classifier")                  LoadedModule, used like the `nn.Module` it loaded
    model = load_model("resnet50", {"backend": "auto"})    RunModel, answered by the backend that was chosen
    model.explain(), model.sample_inputs, model.module

Both are `nn.Module`s. A `LoadedModule` is a second face of the module it loaded: it shares that module's parameters,
buffers, children and hooks, so that it is trained, copied, saved, wrapped and changed like it, under the same names (a
wrapper that held the module as a child would put `module.` before every name, which is how checkpoints of
`DistributedDataParallel` come to not load). What only the module has (`config`, `fc`, ...) is reached through it.

A `RunModel` answers with the weights it was made of: what happens to `module` afterwards never shows in its answers,
and what would change weights is refused. `module` is `None` for a file that only a runtime can run.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar, cast

from torch import Tensor, nn

from deepseek.core.errors import ConfigError
from deepseek.models import predictions
from deepseek.models.answering import FoundAnswer, find_answer
from deepseek.models.predictions import Image, Objects, Predictor

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Origin:
    """The source of a loaded model, and the reason for the way it is run."""

    summary: str
    """The model and the source of its weights, random ones above all."""
    draw_inputs: Callable[[], Batch]
    """Make the inputs that it was, or would be, measured with."""
    reason: str
    """Why this backend, with what was measured and refused."""
    choice: str
    """The backend that runs it, in a few words."""
    folder: Path | None = None
    """The folder with its tokenizer and other files, if it came from one."""


Method = TypeVar("Method", bound=Callable[..., Any])


class _YieldingMethod:
    """A method that gives way to a layer of its name, which the same model always had: our decoder's `embed` is one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, model: nn.Module | None, kind: type | None = None) -> Any:
        if model is None:
            return self.function
        layer = model._modules.get(self.function.__name__)
        return types.MethodType(self.function, model) if layer is None else layer


def yields_to_layer(method: Method) -> Method:
    """Let `method` give way to a layer of its name."""
    return cast("Method", _YieldingMethod(method))


class LoadedModel(nn.Module):
    """A model that was loaded; called like the model itself."""

    def __init__(self, module: nn.Module | None, origin: Origin) -> None:
        super().__init__()
        self.origin = origin
        vars(self)["_plain"] = module  # beside the children, not among them

    @property
    def module(self) -> nn.Module | None:
        """The plain module, for training and for saving; `None` for a file that only a runtime can run."""
        plain: nn.Module | None = vars(self)["_plain"]
        return plain

    @property
    def summary(self) -> str:
        """Return one sentence on the model and the source of its weights."""
        return self.origin.summary

    @property
    def reason(self) -> str:
        """Why it is run this way, with what was measured and refused."""
        return self.origin.reason

    @property
    def choice(self) -> str:
        """The backend that runs it, in a few words."""
        return self.origin.choice

    @property
    def sample_inputs(self) -> Batch:
        """The inputs that it was measured with, or would be: the same in every call."""
        return self.origin.draw_inputs()

    def explain(self) -> str:
        """Say what the model is, who runs it, what it is measured with, and why."""
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.sample_inputs)
        return f"{self.summary}\nsample inputs: {shapes}\n{self.reason}"

    @yields_to_layer
    def detect(
        self, images: Image | Sequence[Image], *, min_score: float = 0.25, max_overlap: float = 0.45
    ) -> list[Objects]:
        """Find the objects in each of `images`: paths, or tensors (3, H, W) with values in [0, 1].

        Boxes with a score above `min_score` count, and of boxes of one class that overlap by more than `max_overlap`
        the best. Raises `ConfigError` for a model that is no detector, `DataError` for a file that is no image.
        """
        return predictions.detect(self._predictor(), images, min_score=min_score, max_overlap=max_overlap)

    @yields_to_layer
    def embed(self, texts: str | Sequence[str], *, normalize: bool = True) -> Tensor:
        """One vector for each text, (N, D), of length one with `normalize`; two are compared by their dot product.

        Texts longer than the model takes are cut. Raises `ConfigError` for a model that is no text encoder, and for a
        model without a tokenizer.
        """
        return predictions.embed(self._predictor(), texts, normalize=normalize)

    @yields_to_layer
    def classify(
        self, inputs: Image | Sequence[Image], pairs: str | Sequence[str] | None = None
    ) -> list[list[tuple[str, float]]]:
        """Name the likeliest classes of each image or text, at most five, with their probabilities, best first.

        `pairs` are the second texts of a model that was trained on pairs, one for each of `inputs`. Raises
        `ConfigError` for a model that is no classifier, and for pairs where it wants single texts or the reverse.
        """
        return predictions.classify(self._predictor(), inputs, pairs)

    @yields_to_layer
    def answer(self, question: str, context: str) -> FoundAnswer:
        """Find the answer to a question in a text; raises `ConfigError` for a model that was not trained for it."""
        return find_answer(self.module, self.origin.folder, question, context)

    @yields_to_layer
    def estimate(self, texts: str | Sequence[str], pairs: str | Sequence[str] | None = None) -> list[float]:
        """Estimate the number of each text, or of each text and the one of `pairs` in the same place.

        Raises `ConfigError` for a model that was not trained for a number, or for pairs where it wants single texts.
        """
        return predictions.estimate(self._predictor(), texts, pairs)

    def _predictor(self) -> Predictor:
        return Predictor(self.module, self, None, self.origin.folder)

    def extra_repr(self) -> str:
        return f"{self.summary}; run by {self.choice}"


class LoadedModule(LoadedModel):
    """A loaded module as it is, run by torch: a second face of it, with the same parameters, children and hooks.

    `isinstance` takes it for what the module is, as it does the proxies of `wrapt` and `unittest.mock`, and `modules()`
    lists the module in its place. `__wrapped__` is the module, as Python has it for functions: `inspect.unwrap` gives
    what a compiler wants to see.
    """

    def __init__(self, module: nn.Module, origin: Origin) -> None:
        super().__init__(module, origin)
        own = vars(self)
        own.update({name: value for name, value in vars(module).items() if name in own})
        del own["training"]  # a plain value, which cannot be shared: asked of the module each time
        own["__wrapped__"] = module

    @property
    def module(self) -> nn.Module:
        """The plain module."""
        plain: nn.Module = vars(self)["__wrapped__"]
        return plain

    @property
    def __class__(self) -> type:
        return type(vars(self).get("__wrapped__", self))

    @__class__.setter
    def __class__(self, kind: type) -> None:  # by which FSDP makes a module shard itself
        self.module.__class__ = kind

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]  # with the signature of the module's own
        """The forward pass of the module."""
        return self.module.forward

    def __getattr__(self, name: str) -> Any:
        module = vars(self).get("__wrapped__")
        if module is None or (name.startswith("__") and name.endswith("__")):
            return super().__getattr__(name)
        return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "__wrapped__" not in vars(self) or name in vars(self) or name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            super().__delattr__(name)
        else:
            delattr(self.module, name)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """List the modules of the module, itself first."""
        yield from self.module.named_modules(memo, prefix, remove_duplicate)

    def train(self, mode: bool = True) -> Self:
        """Set the module to training or evaluation."""
        self.module.train(mode)
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[nn.Module, Origin]]:
        return type(self), (self.module, self.origin)  # copies have a module of their own to be the face of


class RunModel(LoadedModel):
    """A loaded model as a backend runs it: with the weights it was made of, and without gradients."""

    def __init__(self, run: Callable[..., Any], origin: Origin, module: nn.Module | None) -> None:
        super().__init__(module, origin)
        vars(self).update(run=run, training=False)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the answer of the model."""
        return vars(self)["run"](*inputs, **named)

    def train(self, mode: bool = True) -> Self:
        """Refuse training; evaluation is what it is in."""
        if mode:
            self._refuse("trained")
        return self

    def _predictor(self) -> Predictor:
        return Predictor(self.module, self, tuple(self.sample_inputs[0].shape), self.origin.folder)

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        """Refuse another device or dtype."""
        self._refuse("moved or cast")

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse other weights."""
        self._refuse("given other weights")

    def __getattr__(self, name: str) -> Any:
        plain = vars(self).get("_plain")
        if not name.startswith("_") and plain is not None and hasattr(plain, name):
            raise AttributeError(
                f"{name!r} belongs to the plain module, and this model is run by {self.choice}; use .module.{name}"
            )
        return super().__getattr__(name)

    def _refuse(self, done: str) -> NoReturn:
        instead = "load the file again" if self.module is None else "use .module, and load_model again to measure it"
        raise ConfigError(
            f"this model is run by {self.choice} with the weights it was made of and cannot be {done}; {instead}"
        )


def plain_module(model: nn.Module) -> nn.Module:
    """Return the module that a loaded model holds, and any other module as it is.

    Raises `ConfigError` for a file that only a runtime can run, which has none.
    """
    if not isinstance(model, LoadedModel):
        return model
    if model.module is None:
        raise ConfigError(f"{model.summary}, has no module of torch; give a model that was converted or loaded as one")
    return model.module
