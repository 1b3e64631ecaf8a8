"""What `select` is told: one frozen value, checked when it is made.

options = SelectionOptions(backend="openvino", precision="bf16", time_budget_s=10)
select(model, samples, options)
select(model, samples, options, remember=False)    # the same with one setting changed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from deepseek.compiler.runtimes.backends.interface import Samples, Variant
from deepseek.compiler.runtimes.selection_policy import (
    AS_WRITTEN,
    AUTO,
    BackendSelector,
    Tolerance,
    list_precisions,
    read_backend,
    read_tolerances,
)
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown


@dataclass(frozen=True)
class SelectionOptions:
    """How the fastest correct way of running a model is searched for."""

    backend: BackendSelector | str = BackendSelector.AUTO
    """Who may run the model: `auto` for all that are here, or one by name."""
    precision: str = AUTO
    """`auto` (all that are allowed), `fp32`, `bf16`, `fp16` or `int8`."""
    time_budget_s: float = 60.0
    """Seconds for the whole search."""
    tolerance: Tolerance | Mapping[str, Tolerance] | float | None = None
    """Bound of the error against FP32: a relative error, a `Tolerance`, or one for each precision; none is the default
    of each precision."""
    calibration: Sequence[Samples] = ()
    """Further inputs like the samples: int8 is calibrated on them (default: on the samples), and answers to them are
    compared as well."""
    name: str | None = None
    """Name of the model in `deepseek explain`; none is the name of its class."""
    remember: bool = True
    """Whether the decision is kept on disk, and an earlier one is used."""
    tune_allocator: bool = False
    """Keep freed memory in this process, which helps eager mode."""
    tuning_s: float = 0.0
    """Seconds in which TVM may try out kernels."""
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Precisions that `auto` must not take, and why."""
    further: Mapping[str, Variant] = field(default_factory=dict)
    """Further candidates, by the name of the backend that runs them: ways of running this very model that only its
    owner knows, such as a runtime on the file that the model was converted from. With `precision=AS_WRITTEN` they are
    all there is."""
    reference: str = "eager FP32"
    """Name of the model as it was given, which all answers and times are compared with."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend", read_backend(self.backend))
        read_tolerances(self.tolerance)
        list_precisions(self.precision)
        if not self.time_budget_s > 0:
            raise ConfigError(f"time_budget_s is {self.time_budget_s}; give a number of seconds above 0")

    def override(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with some settings changed; raises `ConfigError` for an unknown one, with the nearest known."""
        known = [setting.name for setting in fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(explain_unknown("setting of select", name, known))
        return replace(self, **changes)

    @property
    def tolerances(self) -> dict[str, Tolerance]:
        """Return the bound for each precision."""
        return read_tolerances(self.tolerance)

    @property
    def exclusions(self) -> dict[str, str]:
        """Of `excluded`, what `auto` would have taken."""
        if self.precision != AUTO:
            return {}
        return {name: self.excluded[name] for name in list_precisions(AUTO) if name in self.excluded}

    @property
    def precisions(self) -> tuple[str, ...]:
        """Return the precisions that are tried."""
        return tuple(name for name in list_precisions(self.precision) if name not in self.exclusions)

    @property
    def alternatives(self) -> dict[str, Variant]:
        """Of `further`, what the backend and the precision allow."""
        if self.precision not in (AUTO, AS_WRITTEN):
            return {}
        return {name: self.further[name] for name in self.further if self.backend in (BackendSelector.AUTO, name)}
