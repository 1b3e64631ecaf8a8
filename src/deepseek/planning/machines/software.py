"""The abilities of the software that runs a plan: the traits that change what is stored, moved or waited for.

A plan of the same numbers costs differently where scores are written to memory, where gradients wait for the whole
backward pass, or where Python issues every kernel. These are facts about programs and their age, so they are a value of
their own: `Software` travels beside a `Plan`, and `find_software` looks up what a named program of a given date does.
Published runs name their program and date. The traits are yes or no, and come from the programs' papers and code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

Attention = Literal["unfused", "flash", "flash2", "flash3"]
ATTENTIONS: tuple[str, ...] = get_args(Attention)


@dataclass(frozen=True)
class Software:
    """Traits of a training program.

    `attention`                 scores in memory, or FlashAttention 1 (2022), 2 (2023), 3 or cuDNN (2024)
    `is_compiled`               recorded or compiled kernels instead of one Python call each
    `overlaps_gradients`        data-parallel reduction runs beside the backward pass
    `overlaps_tensors`          tensor-parallel exchange runs beside the matmuls
    `overlaps_input_gradients`  only that of the backward pass does, beside the weight gradients
    `overlaps_experts`          tokens travel to and from experts beside another micro-batch's matmuls
    `splits_messages`           a stage sends each tensor rank's part only (scatter-gather, arXiv:2104.04473, 4.1)
    `fuses_accumulation`        weight gradients are added into the buffer by the product itself
    `fuses_elementwise`         norms, biases, activations and residuals in few kernels; else one kernel each
    `has_fp32_gradients`        gradients are kept and reduced in 4 bytes
    `stops_recomputing`         recomputation ends at the last tensor that backward needs: no last product of a layer
    `regathers_inputs`          sequence-parallel inputs are kept in parts and gathered again for the backward pass
    `logit_bytes`               memory of one logit from head to gradient: 10 in plain 32 bit steps, 6 with one copy,
                                4 in a fused kernel, 0 in chunks
    `offloads_optimizer`        Adam's state and step live in the host's memory
    `gathers_layers`            sharded weights travel a layer at a time, prefetched; else tensor by tensor, waited for
    `counts_tokens`             the host waits for the experts' token counts (dropless); else capacities are fixed
    `balances_stages`           the output head counts as work when layers are split over stages
    `sends_tokens_once`         a token goes once to each node and device that it needs (DeepEP, HybridEP); else to each
                                of its experts
    `records_layers`            the host replays recorded parts of a layer and issues only the rest kernel by kernel
    `fuses_experts`             an expert's matmuls, gate and casts to 8 bits are one kernel
    `narrows_shards`            shards are kept in 32 bits only and narrowed when they are gathered (FSDP)
    `selects_attention`         selective recomputation repeats attention only; else elementwise results and every other
                                product
    """

    attention: Attention = "flash2"
    is_compiled: bool = False
    overlaps_gradients: bool = True
    overlaps_tensors: bool = False
    overlaps_input_gradients: bool = False
    overlaps_experts: bool = False
    splits_messages: bool = True
    fuses_accumulation: bool = True
    fuses_elementwise: bool = True
    has_fp32_gradients: bool = True
    stops_recomputing: bool = False
    regathers_inputs: bool = True
    logit_bytes: float = 6.0
    offloads_optimizer: bool = False
    gathers_layers: bool = True
    counts_tokens: bool = True
    balances_stages: bool = False
    selects_attention: bool = False
    sends_tokens_once: bool = False
    narrows_shards: bool = False
    records_layers: bool = False
    fuses_experts: bool = False

    def __post_init__(self) -> None:
        """Refuse an attention kernel that nobody has written."""
        if self.attention not in ATTENTIONS:
            raise ConfigError(explain_unknown("attention", self.attention, ATTENTIONS))


_UNFUSED = Software(attention="unfused", overlaps_gradients=False, fuses_accumulation=False, has_fp32_gradients=False)
_DEEPSPEED = replace(_UNFUSED, gathers_layers=False)
_NVIDIA = Software(attention="flash3", overlaps_tensors=True, has_fp32_gradients=False, selects_attention=True)
_XLA = Software(attention="flash3", is_compiled=True, stops_recomputing=True)
SOFTWARE: dict[str, Software] = {
    "Megatron-LM 2021": _UNFUSED,
    "Megatron-LM 2022": replace(_UNFUSED, fuses_accumulation=True, overlaps_input_gradients=True),
    "DeepSpeed 2021": _DEEPSPEED,
    "DeepSpeed": Software(),
    "Megatron-LM": Software(overlaps_input_gradients=True, selects_attention=True),
    "NeMo 2024": replace(_NVIDIA, attention="flash2"),
    "NeMo": _NVIDIA,
    "XLA": _XLA,
    "torchtitan": Software(
        fuses_accumulation=False,
        fuses_elementwise=False,
        stops_recomputing=True,
        regathers_inputs=False,
        logit_bytes=10.0,
        narrows_shards=True,
    ),
    "torchtitan 2025": Software(
        is_compiled=True,
        fuses_accumulation=False,
        fuses_elementwise=False,
        stops_recomputing=True,
        regathers_inputs=False,
        logit_bytes=4.0,
        narrows_shards=True,
    ),
    "nanotron": Software(
        overlaps_gradients=False,
        fuses_accumulation=False,
        fuses_elementwise=False,
        logit_bytes=10.0,
        gathers_layers=False,
        balances_stages=True,
    ),
    "llm-foundry": Software(
        attention="flash",
        fuses_accumulation=False,
        fuses_elementwise=False,
        has_fp32_gradients=False,
        stops_recomputing=True,
        logit_bytes=4.0,
        narrows_shards=True,
    ),
    "deepseek": Software(
        fuses_accumulation=False,
        fuses_elementwise=False,
        stops_recomputing=True,
        regathers_inputs=False,
        logit_bytes=12.0,
        narrows_shards=True,
    ),
    "MegaScale": Software(overlaps_tensors=True),
    "modern": Software(sends_tokens_once=True, narrows_shards=True),
}
MODERN = SOFTWARE["modern"]
"""The traits assumed of a program that nobody named."""
# What a description says -> the program; the first row that matches wins.
_PATTERNS: tuple[tuple[str, str], ...] = (
    (r"maxtext|paxml|\bxla\b|\bjax\b", "XLA"),
    (r"nemo|megatron-bridge|mlperf|mlcommons", "NeMo"),
    (r"nanotron", "nanotron"),
    (r"torchtitan", "torchtitan"),
    (r"llm-foundry|mosaic", "llm-foundry"),
    (r"(?:^|\s)megascale;", "MegaScale"),
    (r"megatron-deepspeed|bigscience|deepspeed pp|alpa", "DeepSpeed 2021"),
    (r"zero-3.*|deepspeed", "DeepSpeed"),
    (r"megatron", "Megatron-LM"),
)
# What NeMo's recipes for experts do since which container (scripts/performance of NVIDIA-NeMo/Megatron-Bridge). Racks
# (GB200, GB300) exchange tokens with HybridEP and replay attention and router as graphs, later whole iterations; boxes
# followed with HybridEP and DeepEP, but for the models named here, which kept one copy a choice. Where experts span
# boxes and a stage has several chunks, one chunk's exchange runs beside another's matmuls.
_RACK = re.compile(r"\bgb[23]00\b")
_ONCE_IN_RACKS_SINCE, _ONCE_SINCE = (25, 11), (26, 2)
_COPY_A_CHOICE = re.compile(r"qwen3[-_ ]?(235b|next)")
_RECORDED_LAYERS_SINCE = (25, 11)
_OVERLAP_SINCE = (25, 11)
# Whole iterations as graphs were read from a step in the times that are published for equal inputs, before the recipes
# were read, which say the same: the one trait here that was read off its source's rows.
_GRAPHS_SINCE = (26, 6)
_COMPILED_LOSS = 2501  # year and month since which torchtitan compiles the loss with the model
_FUSED_ACCUMULATION = 2202  # year and month since which Megatron-LM adds weight gradients inside the product
_FLASH_3_RELEASE = 2501  # year and month since which NeMo's releases attend at FlashAttention 3's speed on Hopper
_FLASH_PAPER = 2206  # year and month after which published runs can have fused attention (arXiv:2205.14135)


def find_software(text: str) -> tuple[str, Software]:
    """Find the program that a description names, in the state of the date that it gives.

    >>> find_software("NVIDIA/NeMo performance summary 2024")[0]
    'NeMo 2024'
    >>> find_software("Megatron-LM, arXiv:2104.04473 Table 1")[1].attention
    'unfused'
    """
    words = text.lower()
    name = next((name for pattern, name in _PATTERNS if re.search(pattern, words)), "modern")
    date = _find_date(words)
    if name == "DeepSpeed":
        name = "DeepSpeed 2021" if date < _FLASH_PAPER else "DeepSpeed"
    elif name in ("Megatron-LM", "modern") and date < _FLASH_PAPER:
        name = "Megatron-LM 2021" if date < _FUSED_ACCUMULATION else "Megatron-LM 2022"
    elif name == "NeMo" and date < _FLASH_3_RELEASE and "mlperf" not in words:
        name = "NeMo 2024"
    elif name == "torchtitan" and date >= _COMPILED_LOSS:
        name = "torchtitan 2025"
    found = SOFTWARE[name]
    is_recorded_rack = bool(_RACK.search(words)) and _is_since(_GRAPHS_SINCE, words)
    traits: dict[str, Any] = {
        "is_compiled": found.is_compiled or _is_compiled(words),
        "overlaps_experts": found.overlaps_experts or "dualpipe" in words or is_recorded_rack,
        "sends_tokens_once": found.sends_tokens_once or "dualpipe" in words or _sends_once(words),
        "records_layers": bool(_RACK.search(words)) and _is_since(_RECORDED_LAYERS_SINCE, words),
        "fuses_experts": is_recorded_rack,
        "counts_tokens": found.counts_tokens and "tokendrop" not in words,
        "logit_bytes": 0.0 if "liger" in words else found.logit_bytes,
        "offloads_optimizer": found.offloads_optimizer or bool(re.search(r"cpu-?\s?offload", words)),
    }
    return name, replace(found, **traits)


def overlaps_experts_across_boxes(text: str) -> bool:
    """Say whether the program does so wherever experts span boxes and stages have several chunks."""
    return _is_since(_OVERLAP_SINCE, text.lower())


def _is_compiled(words: str) -> bool:
    """Say whether `torch.compile` is named, or a release that records whole iterations as graphs."""
    is_recorded = _is_since(_GRAPHS_SINCE, words) and bool(re.search(r"\bg?b[23]00\b", words))
    return is_recorded or bool(re.search(r"\+compile|; compile| compile\b", words))


def _sends_once(words: str) -> bool:
    """Say whether a recipe exchanges tokens with DeepEP or HybridEP."""
    if _RACK.search(words):
        return _is_since(_ONCE_IN_RACKS_SINCE, words)
    return _is_since(_ONCE_SINCE, words) and not _COPY_A_CHOICE.search(words)


def _is_since(release: tuple[int, int], words: str) -> bool:
    """Say whether a container of that year and month, or of a later one, is named."""
    found = re.search(r"container (\d+)\.(\d+)", words)
    return found is not None and (int(found[1]), int(found[2])) >= release


def _find_date(words: str) -> int:
    """Return year and month of the newest paper or year that is named, as in arXiv numbers; 9999 without any."""
    papers = [int(paper) for paper in re.findall(r"(?<!\d)(\d{4})\.\d{5}", words)]
    years = [int(year) for year in re.findall(r"(?<!\d)(20[12]\d)(?!\d)", words)]
    months = [int(month) for month in re.findall(r"(?<!\d)20([12]\d(?:0[1-9]|1[0-2]))(?!\d)", words)]
    return max([*papers, *months, *(year % 100 * 100 + 1 for year in years)], default=9999)
