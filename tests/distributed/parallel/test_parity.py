"""Plans held against a single process in float64: loss, norm, every gradient and every parameter on every rank."""

import pytest

from tests.distributed.parallel.cases import compare_all
from tests.distributed.parallel.faults import FAULTS, find_all
from tests.distributed.ranks import run_ranks

SEQUENCES = {"tp": 2, "sequence_parallel": True}
ZERO_BUBBLE = {"pp": 2, "schedule": "zero_bubble"}
INTERLEAVED = {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}
# World -> (model, plan, optimizer) of each case.
CASES = {
    1: [("llama", {}, "sgd"), ("llama", {}, "adamw"), ("moe", {}, "sgd")],
    2: [
        ("llama", {"dp": 2}, "sgd"),
        ("llama", {"dp": 2}, "adamw"),
        ("llama", {"dp": 2, "zero_stage": 1}, "sgd"),
        ("llama", {"dp": 2, "zero_stage": 2}, "sgd"),
        ("llama", {"dp": 2, "zero_stage": 3}, "sgd"),
        ("llama", {"dp": 2, "zero_stage": 3}, "adamw"),
        ("llama", {"tp": 2}, "sgd"),
        ("llama", SEQUENCES, "sgd"),
        ("gpt2", {"tp": 2}, "sgd"),
        ("gpt2", SEQUENCES, "sgd"),
        ("gemma", SEQUENCES, "sgd"),
        ("mask", SEQUENCES, "sgd"),
        ("llama", {"pp": 2}, "sgd"),
        ("llama", {"pp": 2}, "adamw"),
        ("llama", {"pp": 2, "schedule": "gpipe"}, "sgd"),
        ("deep", INTERLEAVED, "sgd"),
        ("deep", {"pp": 2}, "sgd"),
        ("gpt2", {"pp": 2}, "sgd"),
        ("gemma", {"pp": 2}, "sgd"),
        ("llama", ZERO_BUBBLE, "adamw"),
        ("deep", ZERO_BUBBLE, "sgd"),
        ("gpt2", ZERO_BUBBLE, "sgd"),
        ("moe", ZERO_BUBBLE, "sgd"),
        ("vit", ZERO_BUBBLE, "sgd"),
        ("checkpointed deep", {"pp": 2}, "sgd"),
        ("checkpointed deep", {"pp": 2, "schedule": "gpipe"}, "sgd"),
        ("checkpointed deep", INTERLEAVED, "sgd"),
        ("checkpointed deep", ZERO_BUBBLE, "sgd"),
        ("moe", {"dp": 2}, "sgd"),
        ("moe", {"dp": 2, "ep": 2}, "sgd"),
        ("moe", {"dp": 2, "ep": 2}, "adamw"),
        ("bounded", {"dp": 2, "ep": 2}, "sgd"),
        ("moe", SEQUENCES, "sgd"),
        ("moe", {"pp": 2}, "sgd"),
        ("vit", {"tp": 2}, "sgd"),
        ("vit", {"pp": 2}, "sgd"),
        ("vit", {"dp": 2, "zero_stage": 3}, "sgd"),
        ("llama", {"cp": 2}, "adamw"),
        ("gemma", {"cp": 2}, "sgd"),
        ("llama", {"tp": 2}, "muon"),
        ("llama", {"dp": 2, "zero_stage": 3}, "muon"),
        ("moe", {"dp": 2, "ep": 2}, "muon"),
        ("mask", {"cp": 2}, "sgd"),
        ("hard", {"cp": 2}, "sgd"),
        ("window", {"cp": 2}, "sgd"),
        ("documents", {"cp": 2}, "sgd"),
        ("moe", {"cp": 2, "zero_stage": 3}, "sgd"),
        ("own", {"tp": 2}, "sgd"),
        ("own", {"dp": 2, "zero_stage": 2}, "sgd"),
    ],
    4: [
        ("llama", {"dp": 2, "tp": 2, "zero_stage": 3}, "adamw"),
        ("llama", {"dp": 2, "zero_stage": 2} | SEQUENCES, "sgd"),
        ("llama", {"tp": 2, "pp": 2}, "sgd"),
        ("llama", {"pp": 2} | SEQUENCES, "sgd"),
        ("llama", {"dp": 2, "pp": 2}, "sgd"),
        ("llama", {"dp": 2, "pp": 2, "zero_stage": 1}, "adamw"),
        ("llama", {"dp": 4, "zero_stage": 3, "shard_group": 2}, "sgd"),
        ("deep", {"pp": 4}, "sgd"),
        ("deep", ZERO_BUBBLE | {"pp": 4}, "sgd"),
        ("llama", {"dp": 2} | ZERO_BUBBLE, "sgd"),
        ("llama", SEQUENCES | ZERO_BUBBLE, "sgd"),
        ("vit", {"tp": 2} | ZERO_BUBBLE, "sgd"),
        ("checkpointed llama", {"dp": 2, "pp": 2}, "sgd"),
        ("checkpointed llama", {"dp": 2} | ZERO_BUBBLE, "sgd"),
        ("deep", {"dp": 2} | INTERLEAVED, "sgd"),
        ("moe", {"dp": 4, "ep": 2}, "sgd"),
        ("moe", {"dp": 4, "ep": 2, "zero_stage": 3}, "sgd"),
        ("moe", {"dp": 2, "ep": 2, "pp": 2}, "sgd"),
        ("moe", {"dp": 2, "ep": 2} | SEQUENCES, "sgd"),
        ("vit", {"tp": 2, "pp": 2}, "sgd"),
        ("llama", {"cp": 4}, "sgd"),
        ("llama", {"dp": 2, "zero_stage": 3} | SEQUENCES, "muon"),
        ("llama", {"dp": 4, "zero_stage": 3, "shard_group": 2}, "muon"),
        ("gpt2", {"dp": 2, "cp": 2, "zero_stage": 2}, "sgd"),
        ("mask", {"cp": 2} | SEQUENCES, "sgd"),
        ("documents", {"cp": 2, "pp": 2}, "sgd"),
        ("moe", {"dp": 2, "ep": 2, "cp": 2}, "sgd"),
    ],
}


def label(case):
    name, plan, optimizer = case
    return " ".join([name, *(f"{key}={value}" for key, value in plan.items()), optimizer])


@pytest.mark.parametrize("world_size", CASES)
def test_a_plan_trains_as_a_single_process_does(world_size):
    cases = {label(case): case for case in CASES[world_size]}
    for found in run_ranks(compare_all, world_size, cases):
        assert found == dict.fromkeys(cases)


def test_there_are_forty_plans():
    assert len({label(case) for cases in CASES.values() for case in cases}) >= 40


def test_every_seeded_fault_is_caught_and_named():
    assert len(FAULTS) >= 20
    for found in run_ranks(find_all, 2, list(FAULTS)):
        missed = {name: first for name, first in found.items() if not is_named(FAULTS[name], first)}
        assert missed == {}


def is_named(fault, first):
    return first is not None and first[0] == fault.kind and fault.name in first[1]
