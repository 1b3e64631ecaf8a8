"""The twelve numbers that no datasheet prints: what share of a peak is reached, and what the first byte costs.

Each has a physical meaning and a unit, and one value per family of accelerators; every run on that family is predicted
with it, whoever measured it. `benchmarks/planner_fit.py` finds them on published runs, leaving out one source at a time,
and `benchmarks/planner.py` reports the errors on the sources that were left out. Families without published runs take
the value of the nearest family (`ada` and `other` from `ampere`, `cdna` from `hopper`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Constants:
    """One family of accelerators.

    `matmul_fraction`         [1]       share of the datasheet peak in the inner loop of a large 16 bit matrix product
    `narrow_fraction`         [1]       the same for 8 and 4 bit products, relative to their own peak
    `matmul_fill_depth`       [1]       elements of the contracted dimension that a tile spends filling and draining
    `attention_fraction`      [1]       speed of fused attention relative to `matmul_fraction` of the peak
    `memory_fraction`         [1]       share of the memory bandwidth that elementwise kernels reach
    `launch_s`                [s]       host time to issue one kernel from Python
    `kernel_s`                [s]       device time that a kernel of no work takes
    `scale_up_fraction`       [1]       share of the scale-up links' bandwidth that long collectives reach
    `network_fraction`        [1]       share of the network cards' bandwidth that long collectives reach
    `scale_up_ramp_bytes`     [bytes]   message at which a collective reaches half of its final bandwidth
    `exposed_fraction`        [1]       share of overlapped communication that still delays the computation
    `jitter_fraction`         [1]       time lost to the slowest rank per doubling of the number of nodes
    """

    matmul_fraction: float
    narrow_fraction: float
    matmul_fill_depth: float
    attention_fraction: float
    memory_fraction: float
    launch_s: float
    kernel_s: float
    scale_up_fraction: float
    network_fraction: float
    scale_up_ramp_bytes: float
    exposed_fraction: float
    jitter_fraction: float


NAMES: tuple[str, ...] = tuple(Constants.__dataclass_fields__)

_AMPERE = Constants(
    matmul_fraction=0.85,
    narrow_fraction=0.7,
    matmul_fill_depth=150.0,
    attention_fraction=0.6,
    memory_fraction=0.8,
    launch_s=2.5e-5,
    kernel_s=4e-6,
    scale_up_fraction=0.78,
    network_fraction=0.8,
    scale_up_ramp_bytes=1.2e7,
    exposed_fraction=0.3,
    jitter_fraction=0.003,
)
_HOPPER = Constants(
    matmul_fraction=0.72,
    narrow_fraction=0.6,
    matmul_fill_depth=150.0,
    attention_fraction=0.6,
    memory_fraction=0.8,
    launch_s=1.5e-5,
    kernel_s=4e-6,
    scale_up_fraction=0.8,
    network_fraction=0.8,
    scale_up_ramp_bytes=1.2e7,
    exposed_fraction=0.3,
    jitter_fraction=0.003,
)
_BLACKWELL = Constants(**asdict(_HOPPER))
_VOLTA = Constants(**{**asdict(_AMPERE), "matmul_fraction": 0.75})

FAMILIES: dict[str, Constants] = {
    "volta": _VOLTA,
    "ampere": _AMPERE,
    "hopper": _HOPPER,
    "blackwell": _BLACKWELL,
    "ada": _AMPERE,
    "cdna": _HOPPER,
    "other": _AMPERE,
}


def get_constants(family: str) -> Constants:
    """The constants of a family of accelerators; one that nobody measured is treated as `other`.

    >>> 0 < get_constants("ampere").matmul_fraction <= 1
    True
    """
    return FAMILIES.get(family, FAMILIES["other"])
