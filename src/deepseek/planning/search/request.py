"""The request to the search: a model, a cluster, a batch, what a plan may take, and what may be chosen.

`Request` is the one value that every part of the search reads; it refuses what cannot be estimated when it is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar, get_args

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.distributed.plan import PRECISIONS, RECOMPUTATIONS, SCHEDULES, Precision
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.software import MODERN, Software
from deepseek.planning.models.model_shape import ModelShape, OperatorList

_PRECISIONS: dict[str, Precision] = dict(zip(PRECISIONS, get_args(Precision), strict=True))

Model = TypeVar("Model", ModelShape, OperatorList)


def read_precision(name: str) -> Precision:
    """Read the name of a precision; an unknown one lists the known ones.

    >>> read_precision("bf16")
    'bf16'
    """
    if name not in _PRECISIONS:
        raise ConfigError(explain_unknown("precision", name, PRECISIONS))
    return _PRECISIONS[name]


USUAL_HEADROOM = 0.1
"""Share of memory that stays free where nobody says otherwise: nobody launches a run with less to spare."""


@dataclass(frozen=True)
class Limits:
    """The limits of a plan: `memory_headroom` is the share of a device's memory that has to stay free.

    >>> Limits(memory_headroom=0.1).memory_headroom
    0.1
    """

    memory_headroom: float = 0.0
    max_step_time_s: float | None = None
    max_energy_j: float | None = None

    def __post_init__(self) -> None:
        """Refuse limits that no plan can meet."""
        if not 0.0 <= self.memory_headroom < 1.0:
            raise ConfigError(f"memory_headroom={self.memory_headroom!r} is not a share of memory; give 0 to below 1")
        for name in ("max_step_time_s", "max_energy_j"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(
                    f"{name}={value!r} leaves no room for any step; give a number above 0, or leave it out"
                )


@dataclass(frozen=True)
class Space:
    """The choices open to the search; an empty tuple means everything that divides.

    `precision` and `software` are not searched: every plan is estimated in that precision and for that program.

    >>> Space(tp=(1, 2, 4), zero_stages=(1,)).allows("tp", 8)
    False
    """

    tp: tuple[int, ...] = ()
    pp: tuple[int, ...] = ()
    dp: tuple[int, ...] = ()
    cp: tuple[int, ...] = ()
    ep: tuple[int, ...] = ()
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    recomputations: tuple[str, ...] = RECOMPUTATIONS
    micro_batch_sizes: tuple[int, ...] = ()
    schedules: tuple[str, ...] = SCHEDULES
    virtual_stages: tuple[int, ...] = ()
    precision: Precision = "bf16"
    software: Software = MODERN

    def __post_init__(self) -> None:
        """Refuse choices that mean nothing for any model."""
        for name in ("tp", "pp", "dp", "cp", "ep", "micro_batch_sizes", "virtual_stages"):
            for value in getattr(self, name):
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ConfigError(
                        f"{name} may be {value!r}, which is not a positive whole number; use 1 to switch it off"
                    )
        for name, known in (("recomputations", RECOMPUTATIONS), ("schedules", SCHEDULES)):
            for word in getattr(self, name):
                if word not in known:
                    raise ConfigError(explain_unknown(name[:-1], str(word), known))
        read_precision(self.precision)
        if not set(self.zero_stages) <= {0, 1, 2, 3} or not all(
            (self.zero_stages, self.recomputations, self.schedules)
        ):
            raise ConfigError(
                f"zero_stages={self.zero_stages!r} or another list is empty or not of 0 to 3; give choices"
            )

    def allows(self, name: str, value: int) -> bool:
        """Say whether `value` may be chosen for the knob `name`."""
        choices = getattr(self, name)
        return not choices or value in choices


def choose_space(cluster: Cluster) -> Space:
    """Choose everything, in a 16 bit format that all devices have and with an attention kernel that runs on them.

    FlashAttention 2 needs Ampere or later (its README); before that the first one, or a kernel as fast, is there.

    >>> choose_space(Cluster.of("V100-SXM-32GB")).precision, choose_space(Cluster.of("H100-SXM-80GB")).precision
    ('fp16', 'bf16')
    """
    has_bf16 = all("bf16" in device.peak_flops for device in cluster.accelerators)
    is_old = any(device.family == "volta" for device in cluster.accelerators)
    software = replace(MODERN, attention="flash") if is_old else MODERN
    return Space(precision="bf16" if has_bf16 else "fp16", software=software)


@dataclass(frozen=True)
class Request(Generic[Model]):
    """Plans for `model` on `cluster` with `global_batch` sequences a step, within `limits`, out of `space`.

    >>> from deepseek.planning.models.model_shape import get_model_shape
    >>> request = Request(get_model_shape("Llama3-8B"), Cluster.of("H100-SXM-80GB"), 16, Limits(memory_headroom=0.5))
    >>> f"{request.memory_budget_bytes / 2**30:g} GiB"
    '40 GiB'
    """

    model: Model
    cluster: Cluster
    global_batch: int
    limits: Limits = field(default_factory=Limits)
    space: Space = field(default_factory=Space)

    def __post_init__(self) -> None:
        """Refuse what cannot be estimated: no batch, no links, no power figures for an energy limit."""
        batch, cluster = self.global_batch, self.cluster
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise ConfigError(f"global_batch={batch!r} is not a positive number of sequences; give at least 1")
        if len(cluster.nodes) > 1 and cluster.network is None:
            raise ConfigError(
                f"{len(cluster.nodes)} nodes have no network between them; give the cluster a LinkClass with alpha_s "
                "and bandwidth_bytes_per_s, or plan for one node"
            )
        unknown = sorted({device.name for device in cluster.accelerators if not device.power_w})
        if self.limits.max_energy_j is not None and unknown:
            raise ConfigError(
                f"max_energy_j needs power figures, and {unknown[0]} has none; set its power_w or drop the limit"
            )

    @property
    def memory_budget_bytes(self) -> float:
        """Bytes that a plan may take on the smallest device."""
        smallest = min(node.accelerator.memory_bytes for node in self.cluster.nodes)
        return smallest * (1.0 - self.limits.memory_headroom)
