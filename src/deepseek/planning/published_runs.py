"""Predicting a table of runs that somebody else measured: rows of one CSV schema in, the same rows with answers out.

Only inputs are read (model, cluster, plan, batch, precision); the measured columns never are, and a test blanks them
to prove it. What a row does not say is assumed by rules that depend on the software the row names and on its age,
never on who published it, and every assumption is written into `note`. A row that cannot be predicted keeps empty
predictions and says why.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deepseek.core.errors import ConfigError, StorageError
from deepseek.core.storage import explained_storage, write_file
from deepseek.distributed.plan import RECOMPUTATIONS, Plan, Precision, Recomputation, Schedule
from deepseek.planning.estimate.columns import Columns, describe_case, stack_cases
from deepseek.planning.estimate.step import predict_columns
from deepseek.planning.machines.cluster import Accelerator, Cluster, get_accelerator
from deepseek.planning.machines.software import MODERN, Software, find_software, overlaps_experts_across_boxes
from deepseek.planning.models.model_shape import ModelShape, load_model_shapes

MEASURED_COLUMNS = (
    "iter_time_s", "tokens_per_s_per_accel", "tflops_per_accel", "mfu_pct", "hfu_pct", "mem_gb", "oom",
)  # fmt: skip
PREDICTED_COLUMNS = ("predicted_iter_time_s", "predicted_mem_gb", "predicted_oom", "note")
_SHARDED = "weights sharded over all data-parallel ranks"
_TENSOR_RANKS = (1, 2, 4, 8, 16)
_READ_FOR_SOFTWARE = ("source_ref", "source_id", "notes", "schedule", "fsdp", "accel", "model")


@dataclass(frozen=True)
class PublishedRun:
    """One row, understood: what to predict, and what had to be assumed."""

    model: ModelShape
    cluster: Cluster
    plan: Plan
    global_batch: int
    software: Software = MODERN
    assumptions: tuple[str, ...] = ()

    def describe(self) -> dict[str, float]:
        """Describe the row of columns that `predict_columns` takes."""
        return describe_case(self.model, self.cluster, self.plan, self.global_batch, self.software)


class _Reader:
    """Reads one row and collects assumptions on the way."""

    def __init__(self, row: Mapping[str, str]) -> None:
        self.row = {key: (value or "").strip() for key, value in row.items() if key not in MEASURED_COLUMNS}
        self.assumed: list[str] = []

    def assume(self, text: str) -> None:
        self.assumed.append(text)

    def count(self, name: str, default: int | None = None) -> int:
        text = self.row.get(name, "")
        if text:
            try:
                value = float(text)
            except ValueError:
                raise ConfigError(f"{name}={text!r} is not a number") from None
            if value < 1 or value != int(value):
                raise ConfigError(f"{name}={text!r} is not a positive whole number")
            return int(value)
        if default is None:
            raise ConfigError(f"{name} is missing")
        return default

    @property
    def software(self) -> str:
        return " ".join(self.row.get(name, "") for name in _READ_FOR_SOFTWARE).lower()


_ALIASES = {
    "b200": "B200-SXM",
    "b300": "B300-SXM",
    "tpuv4": "TPU-v4",
    "tpuv5p": "TPU-v5p",
    "tpuv6e": "TPU-v6e",
    "v100": "V100-SXM-16GB",
    "a100": "A100-SXM-80GB",
    "h100": "H100-SXM-80GB",
    "h200": "H200-SXM",
    "h800": "H800-SXM-80GB",
}
# What a row calls a model -> its name in model_shapes.csv; the first pattern that is found wins.
_MODEL_ALIASES = (
    (r"deepseek[-_ ]?v3", "DeepSeek-V3"),
    (r"deepseek[-_ ]?v2[-_ ]?lite", "DeepSeek-V2-Lite"),
    (r"deepseek[-_ ]?v2", "DeepSeek-V2"),
    (r"kimi[-_ ]?k2", "Kimi-K2"),
    (r"mixtral[-_ ]?8x22b", "Mixtral-8x22B"),
    (r"mixtral[-_ ]?8x7b", "Mixtral-8x7B"),
    (r"qwen3[-_ ]?235b", "Qwen3-235B-A22B"),
    (r"qwen3[-_ ]?30b", "Qwen3-30B-A3B"),
    (r"qwen2[-_ ]?57b", "Qwen2-57B-A14B"),
    (r"gpt[-_ ]?oss[-_ ]?120b", "GPT-OSS-120B"),
    (r"llama4", "Llama4-Maverick"),
    (r"grok[-_ ]?1", "Grok-1"),
    (r"llama[-_ ]?3(\.1)?[-_ ]?405b", "Llama3.1-405B"),
    (r"llama[-_ ]?3(\.1)?[-_ ]?70b", "Llama3-70B"),
    (r"llama[-_ ]?3(\.1)?[-_ ]?8b", "Llama3-8B"),
    (r"llama[-_ ]?2[-_ ]?70b", "Llama2-70B"),
    (r"llama[-_ ]?2[-_ ]?13b", "Llama2-13B"),
    (r"llama[-_ ]?2[-_ ]?7b", "Llama2-7B"),
    (r"nemotron[-_ ]?4?[-_ ]?15b", "Nemotron4-15B"),
    (r"nemotron[-_ ]?4?[-_ ]?340b", "Nemotron4-340B"),
    (r"gpt[-_ ]?3?[-_ ]?175b", "GPT3-175B"),
)


def _read_model(reader: _Reader) -> ModelShape:
    row = reader.row
    name = row.get("model", "")
    known = load_model_shapes()
    alias = next((to for pattern, to in _MODEL_ALIASES if re.search(pattern, name.lower())), name)
    base = known.get(alias)
    arch = row.get("arch", "")
    if arch in ("cnn", "hybrid", "hybrid/moe", "moe-hybrid"):
        raise ConfigError(f"arch={arch!r} needs a traced operator list, which a row does not hold")
    if not row.get("hidden"):
        if base is None:
            raise ConfigError(f"the sizes of model {name!r} are missing and it is not a known one")
        reader.assume(f"sizes of {base.name}")
    if arch == "moe" and base is None:
        raise ConfigError(f"a row holds no expert sizes and model {name!r} is not a known one")
    if base is not None and base.experts:
        shape = replace(
            base,
            layers=reader.count("layers", base.layers),
            mtp_layers=base.mtp_layers if "w/o mtp" not in name.lower() else 0,
        )
        return shape.with_sequence(reader.count("seq_len"))
    hidden = reader.count("hidden", base.hidden if base else None)
    heads = reader.count("heads", base.heads if base else None)
    is_tied = base.tied_embeddings if base else "gpt" in name.lower() or "mpt" in name.lower()
    ffn = reader.count("ffn", base.ffn if base else 4 * hidden)
    return ModelShape(
        layers=reader.count("layers", base.layers if base else None),
        hidden=hidden,
        heads=heads,
        kv_heads=reader.count("kv_heads", base.kv_heads if base else heads),
        ffn=ffn,
        vocabulary=_pad_vocabulary(reader.count("vocab", base.vocabulary if base else 50257), reader.count("tp", 1)),
        sequence=reader.count("seq_len"),
        gated=base.gated if base else bool(re.search(r"llama|qwen|mistral|gemma", name.lower())),
        tied_embeddings=is_tied,
        head_dim=base.head_dim if base and base.hidden == hidden and base.heads == heads else 0,
        name=name,
    )


def _shrink_to_stated_size(reader: _Reader, model: ModelShape) -> ModelShape:
    """Keep fewer layers where the row's parameter count says that the rest of a larger model was copied along."""
    stated = float(reader.row.get("params_b") or 0) * 1e9
    if not 0 < stated < model.num_parameters / 2:
        return model
    per_layer = (model.num_parameters - model.embedding_parameters) / model.layers
    layers = max(round((stated - model.embedding_parameters) / per_layer), 1)
    reader.assume(f"{layers} layers, as {stated / 1e9:g} billion parameters say, not {model.layers}")
    return replace(model, layers=layers)


def _pad_vocabulary(vocabulary: int, tp: int) -> int:
    """Pad a vocabulary that tensor ranks cannot share so that each holds a multiple of 128 words, as frameworks do."""
    unit = 128 * tp if vocabulary % (8 * tp) and tp > 1 else 1
    return -(-vocabulary // unit) * unit


def _read_cluster(reader: _Reader) -> Cluster:
    name = reader.row.get("accel", "")
    device: Accelerator = get_accelerator(_ALIASES.get(name.lower(), name))
    num = reader.count("n_accel")
    per_node = min(reader.count("accel_per_node", 8), num)
    network = _read_network(reader, per_node)
    return Cluster.of(device, nodes=-(-num // per_node), gpus_per_node=per_node, network_gbit_per_s=network)


# The host's processor moves every packet of Omni-Path. BigScience's all-reduce benchmark got 5.1 and 6.8 GB/s out of
# a node with four cards of 12.5 GB/s (10 and 14 %); several groups at once get more out of them.
_OMNI_PATH_SHARE = 0.2


def _read_network(reader: _Reader, per_node: int) -> float | None:
    """Read one device's share of the network in Gbit/s, where the row states it."""
    text = reader.row.get("notes", "") + " " + reader.row.get("source_ref", "")
    cards = re.search(r"(\d+)\s*x\s*(?:omni-?path|opa)\s*-?(\d+)", text, re.IGNORECASE)
    if cards:
        reader.assume(f"Omni-Path cards reach {_OMNI_PATH_SHARE:.0%} of their rate from device memory")
        return float(cards[1]) * float(cards[2]) / per_node * _OMNI_PATH_SHARE
    per_box = re.search(r"(\d+)\s*G(?:bps|b/s)\s*(?:per node|node-node)", text, re.IGNORECASE)
    return float(per_box[1]) / per_node if per_box else None


_PRECISIONS: tuple[tuple[str, Precision], ...] = (
    ("nvfp4", "fp4"), ("mxfp8", "mxfp8"), ("fp8-mx", "mxfp8"), ("fp8", "fp8"), ("bf16", "bf16"), ("fp16", "fp16"),
    ("fp32", "fp32"),
)  # fmt: skip


def _read_plan(reader: _Reader, model: ModelShape, cluster: Cluster) -> tuple[Plan, Software]:
    row = reader.row
    tp, pp, cp = (reader.count(name, 1) for name in ("tp", "pp", "cp"))
    dp = cluster.num_devices // (tp * pp * cp)
    if dp < 1 or dp * tp * pp * cp != cluster.num_devices:
        raise ConfigError(f"tp*pp*cp = {tp * pp * cp} does not divide the {cluster.num_devices} devices of the row")
    name, software = find_software(reader.software)
    reader.assume(f"traits of {name}")
    stages = _read_virtual_stages(reader, name, model, pp)
    ep = reader.count("ep", 1) if model.experts else 1
    if stages > 1 and ep > cluster.scale_up_size and overlaps_experts_across_boxes(reader.software):
        software = replace(software, overlaps_experts=True)
    is_old = software.attention == "unfused"
    sequence_parallel = row.get("seq_parallel") == "1" if row.get("seq_parallel") else tp > 1 and not is_old
    plan = Plan(
        tp=tp,
        pp=pp,
        dp=dp,
        ep=ep,
        cp=cp,
        etp=reader.count("etp", 1) if model.experts else 1,
        zero_stage=_read_zero(reader, is_old),
        recomputation=_read_recomputation(reader),
        micro_batch_size=reader.count("mbs", 1),
        schedule=_read_schedule(row.get("schedule", ""), stages, pp),
        virtual_stages=stages,
        sequence_parallel=sequence_parallel,
        precision=_read_precision(reader),
    )
    return plan, software


def _read_virtual_stages(reader: _Reader, program: str, model: ModelShape, pp: int) -> int:
    """Read chunks per stage; NeMo's recipes interleave as finely as the depth allows, others say so."""
    if pp == 1:
        return 1
    if reader.row.get("vp") or program != "NeMo" or model.layers % pp:
        return reader.count("vp", 1)
    reader.assume(f"{model.layers // pp} virtual stages")
    return model.layers // pp


def _read_zero(reader: _Reader, is_old: bool) -> int:
    text, fsdp = reader.row.get("zero_stage", ""), reader.row.get("fsdp", "").upper()
    if "SHARD_GRAD_OP" in fsdp:
        return 2
    if "FULL" in fsdp or "FSDP" in fsdp or "fsdp" in reader.row.get("notes", "").lower():
        return 3
    if text in ("0", "1", "2", "3"):
        return int(text)
    if not any(reader.row.get(name) for name in ("tp", "pp")) and reader.count("n_accel") > 1 and not is_old:
        reader.assume(_SHARDED)
        return 3
    reader.assume("ZeRO 0" if is_old else "ZeRO 1")
    return 0 if is_old else 1


def _read_recomputation(reader: _Reader) -> Recomputation:
    text = reader.row.get("act_ckpt", "").lower()
    if text.startswith("full"):
        return "full"
    if text.startswith("selective"):
        return "selective"
    return "none"


def _read_schedule(text: str, stages: int, pp: int) -> Schedule:
    if stages > 1:
        return "interleaved"
    if "zb" in text.lower() or "zero" in text.lower() or "dualpipe" in text.lower():
        return "zero_bubble"
    return "gpipe" if "gpipe" in text.lower() else "1f1b"


def _read_precision(reader: _Reader) -> Precision:
    text = reader.row.get("precision", "").lower()
    found = next((precision for word, precision in _PRECISIONS if word in text), None)
    if found is None:
        reader.assume("bf16")
    return found or "bf16"


def read_run(row: Mapping[str, str]) -> PublishedRun:
    """Understand one row, or raise a `ConfigError` that says which input is missing."""
    reader = _Reader(row)
    model = _read_model(reader)
    cluster = _read_cluster(reader)
    plan, software = _read_plan(reader, model, cluster)
    trains_adapters = "lora" in (reader.row.get("model", "") + reader.row.get("arch", "")).lower()
    shape = replace(_shrink_to_stated_size(reader, model), frozen_weights=trains_adapters)
    run = PublishedRun(shape, cluster, plan, reader.count("gbs"), software)
    if _is_silent_on_plan(reader):
        run = _assume_tensor_ranks(reader, run)
    run = _assume_rest(reader, run)
    return replace(run, assumptions=tuple(reader.assumed))


def _is_silent_on_plan(reader: _Reader) -> bool:
    """Say whether a row tells nothing of how its devices share the work, so that weights are taken to be sharded."""
    names = ("tp", "pp", "cp", "ep", "fsdp", "zero_stage")
    return not any(reader.row.get(name) for name in names) and _SHARDED in reader.assumed


def _assume_rest(reader: _Reader, run: PublishedRun) -> PublishedRun:
    if not reader.row.get("mbs"):
        run = _assume_micro_batch(reader, run)
    return run if reader.row.get("act_ckpt") else _assume_recomputation(reader, run)


def _assume_tensor_ranks(reader: _Reader, run: PublishedRun) -> PublishedRun:
    """Assume the fastest number of tensor ranks beside sharded weights: nobody publishes a slow plan."""
    plan, inside = run.plan, run.cluster.scale_up_size
    sizes = [size for size in _TENSOR_RANKS if size <= inside and run.model.kv_heads % size == plan.dp % size == 0]
    tried = [
        replace(run, plan=replace(plan, tp=size, dp=plan.dp // size, sequence_parallel=size > 1)) for size in sizes
    ]
    complete = stack_runs(_assume_rest(_Reader(reader.row), trial) for trial in tried)
    seconds, _, is_over = predict_columns(complete)
    chosen = tried[int(np.argmin(np.where(is_over, np.inf, seconds)))]
    reader.assume(f"{chosen.plan.tp} tensor ranks")
    return chosen


def _assume_micro_batch(reader: _Reader, run: PublishedRun) -> PublishedRun:
    """Assume the largest of 4, 2 and 1 that fits, since larger matmuls are faster; 1 with a pipeline."""
    share = run.global_batch // run.plan.dp
    sizes = [size for size in (4, 2, 1) if run.plan.pp == 1 and share % size == 0] or [1]
    tried = [replace(run, plan=replace(run.plan, micro_batch_size=size)) for size in sizes]
    is_over = predict_columns(stack_runs(tried))[2]
    chosen = next((trial for trial, over in zip(tried, is_over, strict=True) if not over), tried[-1])
    reader.assume(f"micro-batch of {chosen.plan.micro_batch_size}")
    return chosen


def _assume_recomputation(reader: _Reader, run: PublishedRun) -> PublishedRun:
    """Assume the least recomputation with which the plan fits, as everybody prefers."""
    tried = [replace(run, plan=replace(run.plan, recomputation=choice)) for choice in RECOMPUTATIONS]
    is_over = predict_columns(stack_runs(tried))[2]
    chosen = next((trial for trial, over in zip(tried, is_over, strict=True) if not over), tried[-1])
    reader.assume(f"{chosen.plan.recomputation} recomputation")
    return chosen


def predict_runs(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the rows with `predicted_iter_time_s`, `predicted_mem_gb`, `predicted_oom` and `note` added."""
    runs: dict[int, PublishedRun] = {}
    answers = [{**row, **dict.fromkeys(PREDICTED_COLUMNS, "")} for row in rows]
    for index, row in enumerate(rows):
        try:
            runs[index] = read_run(row)
        except ConfigError as error:
            answers[index]["note"] = f"not predicted: {error}"
    if runs:
        seconds, needed, is_over = predict_columns(stack_runs(runs.values()))
        for column, (index, run) in enumerate(runs.items()):
            answers[index] |= {
                "predicted_iter_time_s": f"{seconds[column]:.6g}",
                "predicted_mem_gb": f"{needed[column] / 1e9:.4g}",
                "predicted_oom": str(int(is_over[column])),
                "note": "assumed: " + ", ".join(run.assumptions) if run.assumptions else "",
            }
    return answers


def stack_runs(runs: Iterable[PublishedRun]) -> Columns:
    """Build the table of columns of some runs."""
    return stack_cases([run.describe() for run in runs])


def predict_file(source: Path, target: Path) -> int:
    """Predict every row of the CSV file `source` into `target`, whole or not at all; returns how many were predicted.

    Raises `ConfigError` for a file without rows and `StorageError` for what the disk refuses.
    """
    if not source.exists():
        raise StorageError(f"{source} does not exist; give a CSV file with a header and one run a line")
    with explained_storage(source), source.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        raise ConfigError(f"{source} holds no runs; expected a CSV file with a header and one run a line")
    answers = predict_runs(rows)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(dict.fromkeys([*rows[0], *PREDICTED_COLUMNS])), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(answers)
    write_file(target, table.getvalue().encode("utf-8"))
    return sum(bool(answer["predicted_iter_time_s"]) for answer in answers)
