"""The twelve numbers that no datasheet prints: what share of a peak is reached, and what the first byte costs.

Each has a physical meaning and a unit, and one value per family of accelerators; every run on that family is
predicted with it, whoever measured it. `benchmarks/planner_fit.py` finds them on published runs, leaving out one
source at a time, and `benchmarks/planner.py` reports the errors on the sources that were left out. Families without
published runs take the value of the nearest family (`ada` and `other` from `ampere`, `cdna` from `hopper`).

The fixed numbers in `planning/estimate/` (bytes per score, kernels per layer,
the lost part of a last wave and others) are the same for everybody and are not fitted by the program. They come from
counting or from papers where a comment says so; the others were set by hand, once, with all development runs in view.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """One family of accelerators.

    `matmul_fraction`         [1]       share of the datasheet peak in the inner loop of a large 16 bit matmul
    `narrow_fraction`         [1]       the same for 8 and 4 bit matmuls, relative to their own peak
    `matmul_fill_depth`       [1]       elements of the contracted dimension that a tile spends filling and draining
    `attention_fraction`      [1]       speed of fused attention relative to `matmul_fraction` of the peak
    `memory_fraction`         [1]       share of the memory bandwidth that elementwise kernels reach
    `launch_s`                [s]       host time to issue one kernel from Python
    `scale_up_fraction`       [1]       share of the scale-up links' bandwidth that long collectives reach
    `network_fraction`        [1]       share of the network cards' bandwidth that long collectives reach
    `collective_s`            [s]       time of a collective of no bytes between two neighbours
    `exposed_fraction`        [1]       share of overlapped communication that still delays the computation
    `communicator_bytes`      [bytes]   memory that each group of communicating ranks takes on a device
    `fragmentation_fraction`  [1]       memory that the allocator cannot hand out, relative to what comes and goes
    """

    matmul_fraction: float
    narrow_fraction: float
    matmul_fill_depth: float
    attention_fraction: float
    memory_fraction: float
    launch_s: float
    scale_up_fraction: float
    network_fraction: float
    collective_s: float
    exposed_fraction: float
    communicator_bytes: float
    fragmentation_fraction: float


NAMES: tuple[str, ...] = tuple(Constants.__dataclass_fields__)

_VOLTA = Constants(
    matmul_fraction=0.8172,
    narrow_fraction=0.65,
    matmul_fill_depth=95.75,
    attention_fraction=0.5,
    memory_fraction=0.8694,
    launch_s=3e-05,
    scale_up_fraction=0.8837,
    network_fraction=0.8,
    collective_s=2.942e-05,
    exposed_fraction=0.4,
    communicator_bytes=8e08,
    fragmentation_fraction=0.05,
)
_AMPERE = Constants(
    matmul_fraction=0.7713,
    narrow_fraction=0.65,
    matmul_fill_depth=67.72,
    attention_fraction=0.7268,
    memory_fraction=0.7757,
    launch_s=3.085e-05,
    scale_up_fraction=0.7326,
    network_fraction=0.98,
    collective_s=6.658e-05,
    exposed_fraction=0.791,
    communicator_bytes=2e09,
    fragmentation_fraction=0.02,
)
_HOPPER = Constants(
    matmul_fraction=0.7035,
    narrow_fraction=0.707,
    matmul_fill_depth=122.6,
    attention_fraction=0.4611,
    memory_fraction=0.5,
    launch_s=2.144e-05,
    scale_up_fraction=0.7909,
    network_fraction=0.8137,
    collective_s=3.423e-05,
    exposed_fraction=0.4431,
    communicator_bytes=8e08,
    fragmentation_fraction=0.08,
)
_BLACKWELL = Constants(
    matmul_fraction=0.6389,
    narrow_fraction=0.5759,
    matmul_fill_depth=101.8,
    attention_fraction=0.3078,
    memory_fraction=0.6714,
    launch_s=1.881e-05,
    scale_up_fraction=0.786,
    network_fraction=0.9678,
    collective_s=4.043e-05,
    exposed_fraction=0.3752,
    communicator_bytes=8e08,
    fragmentation_fraction=0.05,
)

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
    """Return the constants of a family of accelerators; one that nobody measured is treated as `other`.

    >>> 0 < get_constants("ampere").matmul_fraction <= 1
    True
    """
    return FAMILIES.get(family, FAMILIES["other"])
