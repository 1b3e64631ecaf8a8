"""Which single change happens between which generations, as data, and the shortest way through them.

The edges follow the upgrade paths of the documents (1 -> 2 -> 3 -> 4, 2.0 -> 3.5, 3.0 -> 3.1) and can be walked both
ways. A generation without an edge cannot be converted to: nobody has written a checkpoint of it.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from deepseek.compat.transforms import Direction, Drop, Fuse, Quantize, Rename, Specs, Stack, Transform
from deepseek.core.errors import ConfigError

_NORMS = [f"{{prefix}}{name}" for name in ("LayerNorm", "ln_{i}", "ln_f", "norm", "attention_norm", "ffn_norm")]
_STAGE = "{prefix}resnet.encoder.stages.{stage}.layers.{block}"

RENAME_NORMS = Rename(
    "normalization renames",
    tuple(
        (f"{norm}.{old}", f"{norm}.{new}") for norm in _NORMS for old, new in (("gamma", "weight"), ("beta", "bias"))
    ),
)
RENAME_POSITIONS = Rename(
    "position and embedding renames",
    (
        ("{prefix}positions_embed.weight", "{prefix}wpe.weight"),
        ("{prefix}tokens_embed.weight", "{prefix}wte.weight"),
    ),
    # The first GPT has these names to this day, and no last norm.
    requires=("{prefix}ln_f.{rest}", "{prefix}ln_f.{rest}"),
)
RENAME_LLAMA = Rename(
    "embedding and norm renames of Llama",
    (
        ("{prefix}tok_embeddings.weight", "{prefix}embed_tokens.weight"),
        ("{prefix}layers.{i}.attention_norm.{kind}", "{prefix}layers.{i}.input_layernorm.{kind}"),
        ("{prefix}layers.{i}.ffn_norm.{kind}", "{prefix}layers.{i}.post_attention_layernorm.{kind}"),
    ),
    # ModernBERT and the consolidated files of Llama and Mistral have some of the older names, and other projections.
    requires=("{prefix}self_attn.o_proj.{rest}", "{prefix}self_attn.o_proj.{rest}"),
)
FUSE_LLAMA = Fuse(
    "Q, K, V of Llama",
    tuple(f"{{prefix}}self_attn.{part}_proj.{{kind}}" for part in "qkv"),
    "{prefix}self_attn.qkv_proj.{kind}",
    first_size_from="{prefix}self_attn.o_proj.weight",
)
FUSE_BERT = Fuse(
    "Q, K, V of BERT",
    tuple(f"{{prefix}}attention.self.{part}.{{kind}}" for part in ("query", "key", "value")),
    "{prefix}attention.self.query_key_value.{kind}",
)
# GPT-2 stores its matrices as (in, out), so Q, K and V stand side by side in the last dimension.
FUSE_GPT2 = Fuse(
    "Q, K, V of GPT-2",
    tuple(f"{{prefix}}h.{{i}}.attn.{part}_proj.{{kind}}" for part in "qkv"),
    "{prefix}h.{i}.attn.c_attn.{kind}",
    dim=-1,
    requires="{prefix}h.{i}.attn.c_proj.weight",  # GPT-J holds its projections apart, beside an out_proj
)
FUSE_GATE_UP = Fuse(
    "gate and up projection", ("{prefix}gate_proj.{kind}", "{prefix}up_proj.{kind}"), "{prefix}gate_up_proj.{kind}"
)
STACK_GATE_UP = Stack(
    "gate and up projections of the experts",
    tuple(f"{{prefix}}block_sparse_moe.experts.{{expert}}.{part}.weight" for part in ("w1", "w3")),
    "{prefix}mlp.experts.gate_up_proj",
)
STACK_DOWN = Stack(
    "down projections of the experts",
    ("{prefix}block_sparse_moe.experts.{expert}.w2.weight",),
    "{prefix}mlp.experts.down_proj",
)
RENAME_ROUTER = Rename("the router", (("{prefix}block_sparse_moe.gate.weight", "{prefix}mlp.gate.weight"),))
DROP_BUFFERS = Drop(
    "buffers that are computed anew",
    (
        "{prefix}rotary_emb.inv_freq",
        "{prefix}embeddings.position_ids",
        "{prefix}h.{i}.attn.bias",
        "{prefix}h.{i}.attn.masked_bias",
    ),
)
RENAME_RESNET = Rename(
    "ResNet names of torchvision",
    (
        ("{prefix}layer{stage}.{block}.conv{conv}.weight", f"{_STAGE}.layer.{{conv}}.convolution.weight"),
        ("{prefix}layer{stage}.{block}.bn{conv}.{rest}", f"{_STAGE}.layer.{{conv}}.normalization.{{rest}}"),
        ("{prefix}layer{stage}.{block}.downsample.0.weight", f"{_STAGE}.shortcut.convolution.weight"),
        ("{prefix}layer{stage}.{block}.downsample.1.{rest}", f"{_STAGE}.shortcut.normalization.{{rest}}"),
        ("{prefix}conv1.weight", "{prefix}resnet.embedder.embedder.convolution.weight"),
        ("{prefix}bn1.{rest}", "{prefix}resnet.embedder.embedder.normalization.{rest}"),
        ("{prefix}fc.{kind}", "{prefix}classifier.1.{kind}"),
    ),
    shifts={"stage": -1, "conv": -1},
    requires=("{prefix}layer1.0.conv1.weight", "{prefix}resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"),
)
QUANTIZE = Quantize("int8 weights")

FUSED_FAMILIES = ("phi3", "phi4_multimodal", "glm", "glm4", "glm4v", "dia", "zamba2", "hrm_text")
"""Model types that `transformers` itself holds with joined projections, so that nothing is to be split."""

_FUSING = (FUSE_LLAMA, FUSE_BERT, FUSE_GPT2, FUSE_GATE_UP, STACK_GATE_UP, STACK_DOWN, RENAME_ROUTER, DROP_BUFFERS)


@dataclass(frozen=True)
class DirectedTransform:
    """One transform, in one direction."""

    transform: Transform
    direction: Direction

    @property
    def inverse(self) -> DirectedTransform:
        """The same transform the other way."""
        return DirectedTransform(self.transform, _other(self.direction))


@dataclass(frozen=True)
class Step:
    """All changes between two neighbouring generations."""

    source: str
    target: str
    changes: tuple[DirectedTransform, ...] = ()

    @property
    def inverse(self) -> Step:
        """The way back."""
        return Step(self.target, self.source, tuple(change.inverse for change in reversed(self.changes)))


def _forward(*transforms: Transform) -> tuple[DirectedTransform, ...]:
    return tuple(DirectedTransform(transform, "forward") for transform in transforms)


STEPS: tuple[Step, ...] = (
    Step("1.0", "1.0-quant", _forward(QUANTIZE)),
    Step("1.0", "1.3", _forward(RENAME_NORMS)),
    Step("1.3", "2.0", _forward(RENAME_POSITIONS, RENAME_LLAMA)),
    Step("2.0", "2.3"),
    Step("2.3", "3.0", _forward(*_FUSING)),
    Step("2.0", "3.5", _forward(*_FUSING)),
    Step("3.0", "3.1"),
    Step("3.1", "3.5"),
    Step("3.5", "4.0"),
    # 5.0 is what `transformers` reads: Q, K, V and gate, up apart where it holds them apart.
    Step(
        "4.0",
        "5.0",
        (
            *(DirectedTransform(transform, "backward") for transform in (FUSE_LLAMA, FUSE_BERT, FUSE_GATE_UP)),
            *_forward(RENAME_RESNET),
        ),
    ),
)


def find_path(source: str, target: str, steps: Sequence[Step] = STEPS) -> tuple[Step, ...]:
    """Find the fewest steps from one generation to another; a step may be walked either way.

    Raises `ConfigError` where there is no way, with the generations that can be reached.

    >>> [step.target for step in find_path("2.0", "5.0")]
    ['3.5', '4.0', '5.0']
    """
    both_ways = [*steps, *(step.inverse for step in steps)]
    paths: dict[str, tuple[Step, ...]] = {source: ()}
    queue = deque([source])
    while queue:
        here = queue.popleft()
        for step in both_ways:
            if step.source == here and step.target not in paths:
                paths[step.target] = (*paths[here], step)
                queue.append(step.target)
    if target not in paths:
        reachable = ", ".join(sorted(set(paths) - {source})) or "none"
        raise ConfigError(f"no conversion leads from generation {source} to {target}; reachable are: {reachable}")
    return paths[target]


def net_changes(path: Sequence[Step]) -> tuple[tuple[DirectedTransform, ...], ...]:
    """Return the changes of each step, without those that a later step of the same path undoes."""
    changes = [[*step.changes] for step in path]
    for early in range(len(changes)):
        for change in list(changes[early]):
            for late in range(early + 1, len(changes)):
                if change.inverse in changes[late]:
                    changes[early].remove(change)
                    changes[late].remove(change.inverse)
                    break
    return tuple(tuple(step) for step in changes)


def identify(specs: Specs, steps: Sequence[Step] = STEPS) -> tuple[str, ...]:
    """Return the generations whose layout the weights can have, oldest first; all of them when no name decides.

    None at all means weights of a family that no generation has, or half converted ones (`is_half_converted` tells
    them apart). Raises `ArtifactError` for groups with a part missing.
    """
    forms: dict[str, dict[str, Direction]] = {steps[0].source: {}}
    for step in steps:
        # A transform that was made can only be taken back: that is the direction in which evidence is looked for.
        made = {change.transform.name: change.inverse.direction for change in step.changes}
        forms.setdefault(step.target, {**forms[step.source], **made})
    transforms = {change.transform.name: change.transform for step in steps for change in step.changes}
    judged = [transform for transform in transforms.values() if transform.is_evidence]
    found = {
        (transform.name, way): bool(transform.plan(specs, way))
        for transform in judged
        for way in ("forward", "backward")
    }
    return tuple(
        generation
        for generation, form in forms.items()
        if not any(found[transform.name, _other(form.get(transform.name, "forward"))] for transform in judged)
    )


def is_half_converted(specs: Specs, steps: Sequence[Step] = STEPS) -> bool:
    """Return whether layers that are alike have different forms, or one layer has its Q, K, V joined and gate, up not.

    Families that have the forms of two generations in different places, such as a tower for images with joined
    projections, are whole. Names are compared without their numbers.
    """
    transforms = {change.transform.name: change.transform for step in steps for change in step.changes}
    for transform in transforms.values():
        if transform.is_evidence:
            apart = {_NUMBER.sub("#", name) for op in transform.plan(specs, "forward") for name in op.sources}
            joined = {_NUMBER.sub("#", name) for op in transform.plan(specs, "backward") for name in op.targets}
            if apart & joined:
                return True
    fused = {_layer_of(op.sources[0]) for op in FUSE_LLAMA.plan(specs, "backward")}
    return not fused.isdisjoint(_layer_of(op.sources[0]) for op in FUSE_GATE_UP.plan(specs, "forward"))


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def _layer_of(name: str) -> str:
    """Return the layer that holds the module of a projection."""
    return name.rsplit(".", 3)[0]


def _other(direction: Direction) -> Direction:
    return "backward" if direction == "forward" else "forward"
