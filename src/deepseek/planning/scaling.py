"""Scaling curves: what the planner and the communication model say about four often quoted figures.

Each curve is a table with the assumptions under it and the figure that it is held against; nothing is tuned to reach
the figure, and where the model says otherwise the finding says so.

    weak-scaling             92 % at 128 nodes (1,024 devices), one model, batch grows with the devices
    weak-scaling-1750b       84 % at 1,024 devices for 1.75T parameters, model and batch grow
    data-parallel-only       18 points less without tensor, pipeline and context parallelism
    bert-large               iteration 412 -> 257 s with hierarchical, overlapped gradient exchange (1.6 x)
    hierarchical-all-reduce  8.2 -> 1.7 ms at 128 nodes (4.8 x)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.distributed.plan import Plan
from deepseek.planning.estimate import communication as collectives
from deepseek.planning.estimate.columns import Columns, describe_case, stack_cases
from deepseek.planning.estimate.step import predict
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import ModelShape, get_model_shape
from deepseek.planning.search.estimates import list_assumptions
from deepseek.planning.search.planner import plan
from deepseek.planning.search.request import USUAL_HEADROOM, Limits, Space, choose_space
from deepseek.planning.search.results import EstimatedPlan, describe_plan_shortly
from deepseek.planning.search.throughput import count_model_flops

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
GPT_1750B = ModelShape(
    layers=224,
    hidden=25600,
    heads=160,
    ffn=102400,
    vocabulary=51200,
    sequence=2048,
    gated=False,
    learned_positions=True,
    name="GPT-1.75T",
)
BERT_LARGE = ModelShape(
    layers=24,
    hidden=1024,
    heads=16,
    ffn=4096,
    vocabulary=30522,
    sequence=512,
    gated=False,
    tied_embeddings=True,
    learned_positions=True,
    name="BERT-large",
)
_SEQUENCES_PER_DEVICE = 2
_WEAK_MODEL = "SC21-GPT-39.1B"
_DATA_PARALLEL_MODELS = ("SC21-GPT-3.6B", "SC21-GPT-18.4B", "SC21-GPT-39.1B", "SC21-GPT-76.1B", "SC21-GPT-145.6B")


@dataclass(frozen=True)
class ScalingCurve:
    """A table, the figure it is held against, what it says about it, and what it rests on."""

    name: str
    claim: str
    header: tuple[str, ...]
    rows: tuple[tuple[float | str, ...], ...]
    finding: str
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries and lists, ready for JSON."""
        return asdict(self)


def build_curve(name: str, *, accelerator: str = "A100-SXM-80GB", nodes: tuple[int, ...] = NODES) -> ScalingCurve:
    """Build the curve called `name` on nodes of eight `accelerator`s.

    >>> build_curve("hierarchical-all-reduce", nodes=(1, 2)).header[0]
    'bytes'
    """
    check_curve(name)
    if not nodes or min(nodes) < 1:
        raise ConfigError(f"nodes={nodes!r} names no cluster; give numbers of nodes from 1 up")
    return CURVES[name](accelerator, nodes)


def check_curve(name: str) -> None:
    """Refuse a curve that does not exist."""
    if name not in CURVES:
        raise ConfigError(explain_unknown("scaling curve", name, CURVES))


def _search(
    model: ModelShape, cluster: Cluster, batch: int | None = None, space: Space | None = None
) -> EstimatedPlan | None:
    """Find the best plan with the formats and kernels of the devices, or `None` where the model does not fit."""
    batch = batch or _SEQUENCES_PER_DEVICE * cluster.num_devices
    space = space or choose_space(cluster)
    try:
        return plan(model, cluster, global_batch=batch, space=space, limits=Limits(USUAL_HEADROOM)).best
    except ConfigError:
        return None


def _rate(model: ModelShape, cluster: Cluster, best: EstimatedPlan, batch: int | None = None) -> float:
    """Return model operations per second and device."""
    flops = count_model_flops(model, batch or _SEQUENCES_PER_DEVICE * cluster.num_devices)
    return flops / best.step_time_s / cluster.num_devices


def _scale(
    models: Callable[[int], ModelShape], accelerator: str, nodes: tuple[int, ...], batch: int | None = None
) -> list[tuple[int, Cluster, ModelShape, EstimatedPlan]]:
    points = []
    for count in nodes:
        cluster, model = Cluster.of(accelerator, nodes=count), models(count)
        best = _search(model, cluster, batch)
        if best is not None:
            points.append((count, cluster, model, best))
    if not points:
        raise ConfigError(
            f"the model fits on none of {nodes} nodes of {accelerator}; give more nodes or larger devices"
        )
    return points


_WEAK_HEADER = ("nodes", "devices", "size, B", "plan", "step, s", "TFLOP/s a device", "efficiency")


def _list_weak_rows(
    points: list[tuple[int, Cluster, ModelShape, EstimatedPlan]], batch: int | None = None
) -> list[tuple[float | str, ...]]:
    rates = [_rate(model, cluster, best, batch) for _, cluster, model, best in points]
    return [
        (
            count,
            cluster.num_devices,
            round(model.num_parameters / 1e9, 1),
            describe_plan_shortly(best.plan),
            round(best.step_time_s, 3),
            round(rate / 1e12, 1),
            round(rate / max(rates), 3),
        )
        for rate, (count, cluster, model, best) in zip(rates, points, strict=True)
    ]


_EFFICIENCY = (
    "efficiency: model FLOP/s per device relative to the best of these clusters; the smallest that holds a model may "
    "hold it only with recomputation, which makes it slow and every larger one look fast"
)


def _find(rows: Sequence[tuple[float | str, ...]]) -> str:
    best = max(rows, key=lambda row: float(row[-1]))
    return f"predicted: {rows[-1][-1]:.1%} at {rows[-1][0]} nodes, relative to the best rate, at {best[0]}"


def _assume(cluster: Cluster, *more: str) -> tuple[str, ...]:
    free = f"{USUAL_HEADROOM:.0%} of every device's memory stay free"
    return (*list_assumptions(cluster, choose_space(cluster)), free, *more)


def scale_model(
    model: ModelShape, *, accelerator: str, nodes: tuple[int, ...] = NODES, global_batch: int | None = None
) -> ScalingCurve:
    """Build the curve of a model of one's own: a batch that grows with the devices, or always `global_batch`.

    >>> curve = scale_model(get_model_shape("Llama3-8B"), accelerator="H100-SXM-80GB", nodes=(1, 2))
    >>> max(row[-1] for row in curve.rows)
    1.0
    """
    if not nodes or min(nodes) < 1:
        raise ConfigError(f"nodes={nodes!r} names no cluster; give numbers of nodes from 1 up")
    nodes = tuple(sorted(set(nodes)))
    points = _scale(lambda _: model, accelerator, nodes, global_batch)
    rows = _list_weak_rows(points, global_batch)
    kind = "weak" if global_batch is None else "strong"
    held = f"{_SEQUENCES_PER_DEVICE} sequences a device" if global_batch is None else f"{global_batch} sequences a step"
    left_out = [str(count) for count in nodes if count not in [point[0] for point in points]]
    nothing = (f"no plan fits, or none divides, on {', '.join(left_out)} nodes",) if left_out else ()
    return ScalingCurve(
        model.name,
        f"{kind} scaling of {model.name} on {accelerator}",
        _WEAK_HEADER,
        tuple(rows),
        _find(rows),
        _assume(
            Cluster.of(accelerator),
            f"the best plan at every size, {held} of {model.sequence} tokens",
            _EFFICIENCY,
            *nothing,
        ),
    )


def _build_weak(accelerator: str, nodes: tuple[int, ...]) -> ScalingCurve:
    model = get_model_shape(_WEAK_MODEL)
    rows = _list_weak_rows(_scale(lambda _: model, accelerator, nodes))
    return ScalingCurve(
        "weak-scaling",
        "weak scaling efficiency 92 % at 128 nodes, 1,024 devices",
        _WEAK_HEADER,
        tuple(rows),
        _find(rows),
        _assume(
            Cluster.of(accelerator),
            f"model {model.name}, the best plan at every size, {_SEQUENCES_PER_DEVICE} sequences of "
            f"{model.sequence} tokens a device",
            _EFFICIENCY,
        ),
    )


def _build_weak_1750b(accelerator: str, nodes: tuple[int, ...]) -> ScalingCurve:
    full = max(nodes)
    chosen = tuple(count for count in nodes if GPT_1750B.layers * count % full == 0)

    def cut_depth(count: int) -> ModelShape:
        return replace(GPT_1750B, layers=GPT_1750B.layers * count // full)

    rows = _list_weak_rows(_scale(cut_depth, accelerator, chosen))
    return ScalingCurve(
        "weak-scaling-1750b",
        "weak scaling efficiency 84 % at 1,024 devices for 1.75T parameters",
        _WEAK_HEADER,
        tuple(rows),
        f"{_find(rows)} with as many layers a node",
        _assume(
            Cluster.of(accelerator),
            f"{GPT_1750B.layers} layers of width {GPT_1750B.hidden} at {full} nodes, proportionally fewer layers below",
            f"the best plan at every size, {_SEQUENCES_PER_DEVICE} sequences of {GPT_1750B.sequence} tokens a device",
            _EFFICIENCY,
        ),
    )


def _build_data_parallel(accelerator: str, nodes: tuple[int, ...]) -> ScalingCurve:
    cluster = Cluster.of(accelerator, nodes=max(nodes))
    rows = [row for name in _DATA_PARALLEL_MODELS if (row := _compare_data_parallel(name, accelerator, nodes))]
    if not rows:
        raise ConfigError(
            f"none of {_DATA_PARALLEL_MODELS} fits on {max(nodes)} nodes of {accelerator}; give more nodes"
        )
    most = max(rows, key=lambda row: float(row[-1]))
    return ScalingCurve(
        "data-parallel-only",
        "3D plans reach 18 points more efficiency than data parallelism alone",
        ("model", "3D plan", "data-parallel plan", "efficiency, 3D", "efficiency, data parallel", "points"),
        tuple(rows),
        f"predicted at {len(cluster.nodes)} nodes: {rows[0][-1]} points for {rows[0][0]}, up to "
        f"{most[-1]} for {most[0]}; "
        "the larger the model, the more weights data parallelism alone has to gather",
        _assume(
            cluster,
            f"{_SEQUENCES_PER_DEVICE} sequences of 2048 tokens a device on {len(cluster.nodes)} nodes",
            "data parallelism alone: tp, pp, cp and ep are 1; ZeRO stage, recomputation and micro-batch are searched",
            "both efficiencies relative to the best rate per device on any of the clusters that hold the model",
        ),
    )


def _compare_data_parallel(name: str, accelerator: str, nodes: tuple[int, ...]) -> tuple[float | str, ...] | None:
    model, largest = get_model_shape(name), Cluster.of(accelerator, nodes=max(nodes))
    alone = replace(choose_space(largest), tp=(1,), pp=(1,), cp=(1,), ep=(1,))
    one, three = _search(model, largest, space=alone), _search(model, largest)
    if one is None or three is None:
        return None
    clusters = [Cluster.of(accelerator, nodes=count) for count in nodes]
    most = max(_rate(model, smaller, found) for smaller in clusters if (found := _search(model, smaller)))
    shares = [_rate(model, largest, best) / most for best in (three, one)]
    plans = (describe_plan_shortly(three.plan), describe_plan_shortly(one.plan))
    return (name, *plans, *(round(share, 3) for share in shares), round(100 * (shares[0] - shares[1]), 1))


def build_link_columns(cluster: Cluster) -> Columns:
    """Build the columns that estimates of collectives read, for a cluster."""
    return stack_cases([describe_case(BERT_LARGE, cluster, Plan(dp=cluster.num_devices), cluster.num_devices)])


def estimate_all_reduces(cluster: Cluster, num_bytes: float) -> tuple[float, float]:
    """Estimate seconds of an all-reduce over all devices: around one flat ring, and in two levels."""
    c = build_link_columns(cluster)
    group = collectives.form_group(c, np.array([float(cluster.num_devices)]), np.ones(1))
    size = np.array([float(num_bytes)])
    return (
        float(collectives.ring_all_reduce_s(c, size, group)[0]),
        float(collectives.hierarchical_all_reduce_s(c, size, group)[0]),
    )


def _build_bert(accelerator: str, nodes: tuple[int, ...]) -> ScalingCurve:
    cluster = Cluster.of(accelerator, nodes=max(nodes))
    gradient_bytes = 4.0 * BERT_LARGE.num_parameters
    flat, two_level = estimate_all_reduces(cluster, gradient_bytes)
    rows: list[tuple[float | str, ...]] = []
    for size in (1, 2, 4, 8, 16, 32):
        plan = Plan(dp=cluster.num_devices, micro_batch_size=size, precision="fp16")
        predicted = predict(BERT_LARGE, cluster, plan, size * cluster.num_devices)
        alone = predicted.step_time_s - predicted.time_items_s["data_parallel"]
        before, after = alone + flat, min(predicted.step_time_s, alone + two_level)
        rows.append(
            (size, round(1e3 * alone, 1), round(1e3 * before, 1), round(1e3 * after, 1), round(before / after, 2))
        )
    nearest = min(rows, key=lambda row: abs(float(row[-1]) - 412 / 257))
    return ScalingCurve(
        "bert-large",
        "an iteration of BERT-large takes 257 instead of 412 s (1.6 x)",
        ("sequences a device", "without exchange, ms", "flat ring, ms", "hierarchical and overlapped, ms", "ratio"),
        tuple(rows),
        f"predicted: {nearest[-1]} x with {nearest[0]} sequences a device on {len(cluster.nodes)} "
        "nodes; a ratio is what can be "
        "compared, since how many steps an iteration of 257 s has is not said",
        _assume(
            cluster,
            f"sequences of {BERT_LARGE.sequence} tokens, fp16 with 32 bit gradients ({gradient_bytes / 1e9:.2f} GB)",
            "before: one flat ring after the backward pass; after: in two levels, beside the backward pass",
        ),
    )


def _build_all_reduce(accelerator: str, nodes: tuple[int, ...]) -> ScalingCurve:
    cluster = Cluster.of(accelerator, nodes=max(nodes))
    rows: list[tuple[float | str, ...]] = []
    for power in range(10, 31, 2):
        flat, two_level = estimate_all_reduces(cluster, 2.0**power)
        rows.append((2**power, round(1e3 * flat, 3), round(1e3 * two_level, 3), round(flat / two_level, 2)))
    nearest = min(rows, key=lambda row: abs(np.log(float(row[3]) / (8.2 / 1.7))))
    return ScalingCurve(
        "hierarchical-all-reduce",
        "hierarchical all-reduce takes 1.7 instead of 8.2 ms at 128 nodes (4.8 x)",
        ("bytes", "flat ring, ms", "hierarchical, ms", "ratio"),
        tuple(rows),
        f"predicted: {nearest[1]:.3g} -> {nearest[2]:.3g} ms ({nearest[3]} x) for {nearest[0]} bytes "
        f"on {len(cluster.nodes)} nodes; "
        "the size behind the figure is not said",
        _assume(
            cluster,
            f"all {cluster.num_devices} devices reduce one buffer; latencies "
            f"{cluster.scale_up.alpha_s * 1e6:g} us inside and "
            f"{cluster.network.alpha_s * 1e6:g} us between nodes",
        ),
    )


CURVES: dict[str, Callable[[str, tuple[int, ...]], ScalingCurve]] = {
    "weak-scaling": _build_weak,
    "weak-scaling-1750b": _build_weak_1750b,
    "data-parallel-only": _build_data_parallel,
    "bert-large": _build_bert,
    "hierarchical-all-reduce": _build_all_reduce,
}
"""Name -> the function that builds the curve."""
