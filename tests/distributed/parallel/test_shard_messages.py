"""Gradients and shards by `DeepSeekComm`: the steps are those of one process, and the rings did carry them."""

import pytest

from deepseek.distributed.communicator import DeepSeekComm
from deepseek.distributed.parallel.mesh import build_mesh
from deepseek.distributed.parallel.parity import compare_steps, record_steps
from deepseek.distributed.plan import Plan
from deepseek.models.parallelizing import parallelize
from tests.distributed.parallel.cases import build_batches, build_model, find_task, merge, sgd
from tests.distributed.ranks import run_ranks

PLANS = {
    "buckets": ("llama", {"dp": 4}),
    "zero 2": ("llama", {"dp": 4, "zero_stage": 2}),
    "zero 3": ("gpt2", {"dp": 4, "zero_stage": 3}),
    "zero 3 in groups": ("llama", {"dp": 4, "zero_stage": 3, "shard_group": 2}),
    "buckets of a stage": ("llama", {"pp": 2, "dp": 2}),
    "experts": ("moe", {"dp": 4, "ep": 2}),
}


def compare_with_comm(rank):
    """The first parting of each plan, in words, and what this rank called through the communicator."""
    found = {}
    with DeepSeekComm.init("gloo", hosts=["a", "b", "a", "b"]) as comm:
        for label, (name, settings) in PLANS.items():
            plan, steps, task = Plan(**settings), build_batches(name), find_task(name)
            records = record_steps(build_model(name), task, steps, sgd, dp=plan.dp, merge=merge)
            first = len(comm.ledger.calls)
            parallel = parallelize(build_model(name), plan, build_mesh(plan), comm=comm)
            parity = compare_steps(parallel, task, steps, records, sgd)
            calls = {call.operation for call in list(comm.ledger.calls)[first:]}
            found[label] = parity.partings[0].describe() if parity.partings else None, sorted(calls)
    return found


@pytest.fixture(scope="module")
def found():
    return run_ranks(compare_with_comm, 4)


@pytest.mark.parametrize("label", PLANS)
def test_steps_are_those_of_one_process(found, label):
    assert [rank[label][0] for rank in found] == [None] * 4


@pytest.mark.parametrize(
    ("label", "operation"),
    [("buckets", "all_reduce(SUM)"), ("zero 3", "all_gather"), ("zero 2", "reduce_scatter")],
)
def test_the_communicator_carries_them(found, label, operation):
    assert all(operation in rank[label][1] for rank in found)
