"""The edges between generations, the shortest way through them, and which generation a checkpoint is of."""

from __future__ import annotations

import itertools

import pytest

from deepseek.compat.conversion_steps import STEPS, find_path, identify, net_changes
from deepseek.compat.generations import load_table
from deepseek.compat.tensors import describe
from deepseek.compat.version_converter import VersionConverter
from deepseek.core.errors import ConfigError
from tests.compat.models import build


def test_paths_are_the_shortest() -> None:
    """Against Floyd and Warshall over the same edges."""
    names = sorted({name for step in STEPS for name in (step.source, step.target)})
    far = {(a, b): 0 if a == b else 99 for a in names for b in names}
    far |= {pair: 1 for step in STEPS for pair in ((step.source, step.target), (step.target, step.source))}
    for via, a, b in itertools.product(names, repeat=3):
        far[a, b] = min(far[a, b], far[a, via] + far[via, b])
    for a, b in itertools.product(names, repeat=2):
        path = find_path(a, b)
        assert len(path) == far[a, b]
        assert [step.source for step in path[1:]] == [step.target for step in path[:-1]]


def test_every_way_to_a_generation_makes_the_same_changes() -> None:
    """2.0 -> 3.5 directly, and 2.0 -> 2.3 -> 3.0 -> 3.1 -> 3.5."""
    direct = net_changes(find_path("2.0", "3.5"))
    long = [net_changes(find_path(a, b)) for a, b in itertools.pairwise(["2.0", "2.3", "3.0", "3.1", "3.5"])]
    assert [c for step in direct for c in step] == [c for path in long for step in path for c in step]


def test_the_steps_produce_the_layouts_of_the_table() -> None:
    aspects = {
        "normalization renames": "norms",
        "position and embedding renames": "positions",
        "int8 weights": "quantized",
    }
    aspects |= {
        "ResNet names of torchvision": "vision",
        "the router": "experts",
        "buffers that are computed anew": "buffers",
    }
    aspects |= {"Q, K, V of GPT-2": "attention"}
    layouts = {each.name: each.layout.to_dict() for each in load_table().generations if each.layout}
    for step in STEPS:
        changed = {aspects[c.transform.name] for c in step.changes if c.transform.name in aspects}
        before, after = layouts[step.source], layouts[step.target]
        differ = {key for key in aspects.values() if before[key] != after[key]}
        # 5.0 holds projections as each family does natively, which for GPT-2 is what 4.0 does.
        assert differ - {"attention"} == changed - {"attention"}, step


@pytest.mark.parametrize("version", ["6.0", "3.2"])
def test_a_generation_without_checkpoints_names_the_reachable_ones(version: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"no conversion leads from generation 2\.0 to {version}; reachable are: 1\.0,"
    ):
        VersionConverter("v2.0", version)


IDENTIFIED = [
    ("llama", "5.0", ("2.0", "2.3", "5.0")),
    ("llama", "3.5", ("3.0", "3.1", "3.5", "4.0")),
    ("gpt2", "5.0", ("3.0", "3.1", "3.5", "4.0", "5.0")),
    ("gpt2", "1.3", ("1.3",)),
    ("bert", "1.0", ("1.0",)),
    ("bert", "1.0-quant", ("1.0-quant",)),
    ("mixtral", "5.0", ("5.0",)),
    ("mixtral", "2.0", ("2.0", "2.3")),
    ("resnet", "5.0", ("5.0",)),
    ("resnet", "2.0", ("1.0", "1.3", "2.0", "2.3", "3.0", "3.1", "3.5", "4.0")),
]


@pytest.mark.parametrize(("family", "version", "generations"), IDENTIFIED)
def test_names_tell_the_generations_a_checkpoint_can_be_of(
    family: str, version: str, generations: tuple[str, ...]
) -> None:
    weights = VersionConverter("5.0", version).convert(build(family).state_dict())
    found = identify({name: describe(name, each) for name, each in weights.items()})
    assert tuple(sorted(found)) == generations
