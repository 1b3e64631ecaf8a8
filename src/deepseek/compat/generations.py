"""The table of generations: what each one brought, needs, reads and writes, with the document that says so.

A *generation* is a named set of capabilities together with a config schema and a checkpoint layout, and not a version
of this product, which has all of them. The documents give several histories of the versions 1 to 5; the table is their
union, and where two disagree both numbers stand with their source. The facts are data, in `generations.yaml` beside
this file; this file is their type and the way to look one up.
`advice` picks from the table, `version_converter` follows its layouts, and `docs/rendering.py` makes a page of it.

Cost: the file is read once, on the first look-up (tens of milliseconds); importing this module reads nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_serializer, model_validator

from deepseek.core.config import Config
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

Document = Literal["D0", "D1", "D2", "D3", "D4", "house", "D?"]
Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "int4", "dynamic"]

_CLAIM = re.compile(r"(?P<text>.+?)\s*\[(?P<documents>[^\]]+)\]")


class Claim(Config):
    """One statement and where it stands; written `text [D0, D1]` in the data file."""

    text: str
    documents: tuple[Document, ...]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = _CLAIM.fullmatch(value)
        if match is None:
            raise ValueError(f"claim {value!r} names no document; end it with one, for example [D1]")
        return {"text": match["text"], "documents": [document.strip() for document in match["documents"].split(",")]}

    @model_serializer
    def _write(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.text} [{', '.join(self.documents)}]"


class PublishedMeasurement(Config):
    """A row of the documents' benchmark; compare your own machine with `deepseek-benchmark`."""

    what: str
    latency_ms: float
    images_per_s: float
    accuracy_loss_percent: float
    memory_gb: float
    document: Document


class Requirements(Config):
    """The least a machine or a cluster must bring; `None` where the documents ask for nothing."""

    cuda: str | None = None
    rocm: str | None = None
    nccl: str | None = None
    gpu_memory_gb: float | None = None
    kubernetes: str | None = None
    tools: tuple[str, ...] = ()
    suggested_nodes: int | None = None
    example: str | None = None
    """A configuration that the documents show it on, which is not a lower bound."""
    documents: tuple[Document, ...] = ()


class Capabilities(Config):
    """The abilities of a generation."""

    precisions: tuple[Precision, ...]
    distribution: str
    model_families: tuple[str, ...]
    features: tuple[Claim, ...] = ()


class Layout(Config):
    """How a generation names, groups and stores the weights of a model."""

    norms: Literal["gamma/beta", "weight/bias"]
    """Names of the scale and the shift of a normalization."""
    positions: Literal["embed", "embeddings"]
    """GPT-2: `positions_embed` or `wpe`; Llama: `tok_embeddings` and `attention_norm`, or `embed_tokens` and so on."""
    attention: Literal["separate", "fused", "native"]
    """Query, key and value as three tensors, as one, or as `transformers` holds them."""
    gate_up: Literal["separate", "fused", "native"]
    """Gate and up projection as two tensors, as one, or as `transformers` holds them."""
    experts: Literal["list", "stacked"]
    """One tensor for each expert, or one for all experts of a layer."""
    buffers: Literal["kept", "recomputed"]
    """Whether masks, position ids and rotary frequencies stand in the file or are computed when the model is built."""
    vision: Literal["torchvision", "huggingface"]
    """Whose names a ResNet carries."""
    container: Literal["single", "sharded"]
    """One file, or several with an index."""
    dtypes: tuple[Literal["F32", "F16", "BF16", "I8"], ...]
    """Floating types it can hold, in the names of safetensors; others are cast to the first."""
    quantized: bool = False
    """Whether the matrices are int8 with a scale for each row."""


class Parallelism(Config):
    """Fixed sizes of the axes of a model-parallel plan."""

    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)


class Profile(Config):
    """The options that make today's engine run as a generation did, for comparing generations on one machine."""

    precision: Precision
    """Arithmetic of the forward pass."""
    quantization: Literal["none", "int8", "int4"] = "none"
    """Bits of the stored weights."""
    batching: Literal["none", "dynamic"] = "none"
    """Whether requests that wait together run together."""
    parallelism: Parallelism | Literal["auto"] = Parallelism()
    """A fixed plan, or the planner's."""
    compile: Literal["none", "dynamic", "static", "autotune"] = "none"
    """No compilation, one graph for all lengths, one static graph, or static with kernels measured on this machine."""
    document: Document
    """Where these options come from."""


class FrameworkGeneration(Config):
    """One row of the table."""

    name: str
    aliases: tuple[str, ...] = ()
    status: Literal["released", "planned"] = "released"
    when: tuple[Claim, ...] = ()
    brought: tuple[Claim, ...]
    costs: tuple[Claim, ...] = ()
    audience: tuple[Claim, ...] = ()
    advice: tuple[Claim, ...] = ()
    requirements: Requirements = Requirements()
    capabilities: Capabilities
    measurements: tuple[PublishedMeasurement, ...] = ()
    config_keys: tuple[str, ...] = ()
    """Top-level settings its config files hold."""
    layout: Layout | None = None
    """`None` while nobody has written a checkpoint of it."""
    profile: Profile | None = None

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor number, for comparing; the quantised form counts as the generation it is a form of."""
        major, minor = self.name.partition("-")[0].split(".")
        return int(major), int(minor)


class Upgrade(Config):
    """The documents' advice for one upgrade; `*` stands for any generation."""

    source: str = Field(alias="from")
    target: str = Field(alias="to")
    advice: Claim


class KnownBad(Config):
    """A pair of a generation and an environment that is known to fail."""

    generation: str
    cuda: str
    driver_below: str
    symptom: str
    fix: Claim


class Conditions(Config):
    """All that are given must hold; a question that leaves a value open does not meet a condition on it."""

    params_from: float | None = None
    params_below: float | None = None
    gpu_memory_below: float | None = None
    gpu_memory_up_to: float | None = None
    gpu_memory_above: float | None = None
    latency: Literal["realtime", "batch"] | None = None
    scale: Literal["single", "cluster"] | None = None
    kubernetes: Literal["none", "basic", "expert"] | None = None
    hardware: str | None = None


class SelectionRule(Config):
    """Where the conditions hold, the documents recommend a generation."""

    id: str
    conditions: Conditions = Field(alias="if")
    recommend: str
    because: Claim


class ExclusionRule(Config):
    """Where the conditions hold, the documents advise against some generations."""

    id: str
    conditions: Conditions = Field(alias="if")
    excludes: tuple[str, ...]
    because: Claim


class Table(Config):
    """The whole data file."""

    documents: dict[Document, str]
    """The documents behind their marks, and the marks of our own."""
    generations: tuple[FrameworkGeneration, ...]
    upgrades: tuple[Upgrade, ...]
    known_bad: tuple[KnownBad, ...]
    config_notes: tuple[Claim, ...]
    hardware: dict[str, tuple[str, ...]]
    selection: tuple[SelectionRule, ...]
    exclusions: tuple[ExclusionRule, ...]

    @model_validator(mode="after")
    def _check_names(self) -> Table:
        known = [name for generation in self.generations for name in (generation.name, *generation.aliases)]
        twice = sorted({name for name in known if known.count(name) > 1})
        if twice:
            raise ValueError(f"generation {twice[0]!r} stands in the table twice; give each name once")
        used = [rule.recommend for rule in self.selection]
        used += [name for rule in self.exclusions for name in rule.excludes]
        used += [name for upgrade in self.upgrades for name in (upgrade.source, upgrade.target) if name != "*"]
        for name in [*used, *(pair.generation for pair in self.known_bad)]:
            if name not in known:
                raise ValueError(explain_unknown("generation", name, known))
        return self


def name_documents(claims: Iterable[Claim]) -> str:
    """Say which documents stand behind the marks of claims, in the order of the table.

    >>> name_documents([Claim(text="faster", documents=("D2",))])
    '[D2] release notes of 3.1'
    """
    cited = {document for claim in claims for document in claim.documents}
    return "; ".join(f"[{mark}] {what}" for mark, what in load_table().documents.items() if mark in cited)


@functools.cache
def load_table() -> Table:
    """Read and check the facts of all generations, once."""
    return Table.from_file(Path(__file__).with_name("generations.yaml"))


def find_generation(name: str) -> FrameworkGeneration:
    """Find the row of a generation by any name users write: `v2.3`, `2.3`, `2.3.1`, `1.x`, `4.2`.

    Raises `ConfigError` for an unknown one, with the known ones.

    >>> find_generation("v4.2").name
    '4.0'
    """
    wanted = re.sub(r"^v?([0-9]+\.[0-9]+)\.[0-9]+$", r"\1", name.strip().lower()).removeprefix("v")
    by_name = {known_name: row for row in load_table().generations for known_name in (row.name, *row.aliases)}
    if wanted not in by_name:
        raise ConfigError(explain_unknown("generation", name, by_name))
    return by_name[wanted]


def profile(name: str) -> Profile:
    """Return the options that make the engine run as generation `name` did.

    Raises `ConfigError` for an unknown generation, and for one that is planned and has no options yet.

    >>> profile("v2.3").quantization
    'int8'
    """
    generation = find_generation(name)
    if generation.profile is None:
        known = [row.name for row in load_table().generations if row.profile]
        raise ConfigError(
            f"generation {generation.name} is planned and has no profile; choose one of {', '.join(known)}"
        )
    return generation.profile
