"""What every backend is: a frozen description, what it needs, and the ways in which it can run a model.

A backend is a value. Its `variants` are the rows of a table: a name, a precision, and a function from a `Job` (a model
with its sample inputs) to something that runs. `selection.select` reads these tables, builds what is allowed, and keeps
the fastest correct one; `backend.compile(model, sample_inputs, "bf16")` builds one directly.

What runs is flat inside: a sequence of tensors in, a sequence of tensors out, which is what ONNX Runtime and OpenVINO
have. `Compiled` puts the model's own calling convention around it, so that it is called as the model was.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deepseek.compiler.runtimes.backends.flat_signature import Flattened, flatten_model
from deepseek.compiler.runtimes.fallbacks import Fallback
from deepseek.compiler.runtimes.selection_policy import Traits
from deepseek.core.errors import ConfigError, PermanentError, first_line

T = TypeVar("T")
Run = Callable[..., Sequence[Tensor]]
Samples = Tensor | Sequence[Any] | Mapping[str, Any]


class BackendError(PermanentError):
    """A backend cannot run this model in this way; the sentence says what stopped it."""


@dataclass(frozen=True)
class Missing:
    """A part that a backend lacks here, and how to install it."""

    needs: str
    remedy: str

    def __str__(self) -> str:
        return f"needs {self.needs}: {self.remedy}"


@dataclass(frozen=True)
class Built:
    """Something that runs on flat tensors, and what was seen while it was built."""

    run: Run
    findings: tuple[Fallback, ...] = ()
    notes: tuple[str, ...] = ()
    takes_any_shape: bool = False
    """Whether it runs inputs of other shapes than the samples' as well."""


@dataclass(frozen=True)
class Variant:
    """One way in which a backend runs a model."""

    name: str
    precision: str
    summary: str
    build: Callable[[Job], Built]
    prior: int = 50
    """Its place in the queue before anything is measured, lowest first: what won most often goes first."""
    find_obstacle: Callable[[Traits], str | None] = lambda traits: None
    """Why it is of no use for a model with these traits, or `None`; asked before anything is built."""
    refines: str | None = None
    """The variant of the same precision that this one polishes; not tried where that one is far from the best."""


class Job:
    """A model with its sample inputs, and the conversions that several variants share."""

    def __init__(
        self, flattened: Flattened, *, calibration: Sequence[tuple[Tensor, ...]] = (), tuning_s: float = 0.0
    ) -> None:
        self.flattened, self.tuning_s = flattened, tuning_s
        self.further = tuple(calibration)
        self.calibration = self.further or (flattened.inputs,)
        self._made: dict[Hashable, Any] = {}

    @property
    def traits(self) -> Traits:
        """Return the traits of the model that the selection policy decides by."""
        return self.flattened.traits

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Return the sample inputs, flat."""
        return self.flattened.inputs

    def copy_model(self) -> nn.Module:
        """Return a copy of the flat model that a variant may change; in evaluation mode."""
        return copy.deepcopy(self.flattened.model).eval()

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make`, called once per `key`; an exception that it raised is raised again."""
        if key not in self._made:
            try:
                self._made[key] = (make(), None)
            except Exception as error:  # noqa: BLE001 - kept, and raised to everyone who asks
                self._made[key] = (None, error)
        made, failure = self._made[key]
        if failure is not None:
            raise failure
        value: T = made
        return value

    def export(self) -> torch.export.ExportedProgram:
        """Return the model as one graph with the shapes of the sample inputs."""
        return self.once("export", lambda: export(self.flattened.model, self.inputs))


def export(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """`model` as one graph; raises `BackendError` where it is not one."""
    try:
        with torch.no_grad():
            return torch.export.export(model, inputs, strict=False)
    except Exception as error:
        raise BackendError(
            f"the model is not one graph ({first_line(error)}); rewrite it with @deepseek.jit"
        ) from error


class Compiled:
    """A model as a backend runs it, called with the model's own arguments; never records gradients."""

    def __init__(self, backend: str, variant: Variant, built: Built, flattened: Flattened) -> None:
        self.backend, self.variant = backend, variant
        self.findings, self.notes = built.findings, built.notes
        self.run = built.run
        self.flattened = flattened

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = self.flattened.read_inputs(args, kwargs)
        with torch.no_grad():
            return self.flattened.restore_outputs(self.run(*inputs), inputs)

    def describe(self) -> dict[str, Any]:
        """Return the backend, variant and precision, with what was found while building."""
        return {
            "backend": self.backend,
            "variant": self.variant.name,
            "precision": self.variant.precision,
            "summary": self.variant.summary,
            "notes": list(self.notes),
            "findings": [str(finding) for finding in self.findings],
        }


@dataclass(frozen=True)
class Backend:
    """A runtime: its name, what it needs, and how it can run a model."""

    name: str
    summary: str
    find_missing: Callable[[], Missing | None]
    variants: tuple[Variant, ...] = ()
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """Precision -> why this backend has no variant of it."""
    devices: tuple[str, ...] = ("cpu",)
    """Where the model and the sample inputs may be."""

    def is_available(self) -> bool:
        """Return whether it can be used here; `find_missing` says what stands in the way."""
        return self.find_missing() is None

    def describe(self) -> dict[str, Any]:
        """Return the name, summary, what is missing, and the variants."""
        missing = self.find_missing()
        return {
            "name": self.name,
            "summary": self.summary,
            "missing": None if missing is None else str(missing),
            "variants": {f"{variant.name} {variant.precision}": variant.summary for variant in self.variants},
            "unsupported": dict(self.unsupported),
        }

    def compile(
        self,
        model: nn.Module,
        sample_inputs: Samples,
        precision: str = "fp32",
        *,
        variant: str | None = None,
        calibration: Sequence[Samples] = (),
    ) -> Compiled:
        """`model` run by this backend in `precision`, with the shapes of `sample_inputs`.

        The first variant of the precision is taken, or the one named. Raises `ConfigError` for a precision or a variant
        that this backend does not have, and `BackendError` where it cannot be used here or cannot run the model.
        """
        chosen = self.find_variant(precision, variant)
        self.require_available()
        flattened = flatten_model(model, sample_inputs)
        job = Job(flattened, calibration=[flattened.read_samples(batch) for batch in calibration])
        return Compiled(self.name, chosen, build(chosen, job), flattened)

    def find_variant(self, precision: str, name: str | None = None) -> Variant:
        """Return the first variant of `precision`, or the one called `name`."""
        found = [
            variant for variant in self.variants if variant.precision == precision and name in (None, variant.name)
        ]
        if not found:
            known = ", ".join(f"{variant.name} ({variant.precision})" for variant in self.variants) or "none"
            reason = self.unsupported.get(precision)
            asked = f"variant {name!r} in {precision}" if name else precision
            raise ConfigError(
                f"backend {self.name!r} has no {asked}" + (f" ({reason})" if reason else "") + f"; it has {known}"
            )
        return found[0]

    def require_available(self) -> None:
        """Raise `BackendError` where this backend cannot be used, with what it needs."""
        missing = self.find_missing()
        if missing is not None:
            raise BackendError(f"backend {self.name!r} cannot be used here: it {missing}")


def build(variant: Variant, job: Job) -> Built:
    """Build `job` as `variant`; any failure of the runtime is raised as one `BackendError` sentence."""
    try:
        with torch.no_grad(), quiet():
            return variant.build(job)
    except (BackendError, ConfigError):
        raise
    except Exception as error:
        raise BackendError(f"{variant.name} in {variant.precision}: {first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings and log lines of the libraries below are held back in the block: they remark on their own code.

    What a user must know of a build comes out as findings and as errors.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
