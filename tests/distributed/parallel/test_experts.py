import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.experts import spread_experts_
from deepseek.distributed.parallel.mesh import build_mesh
from deepseek.distributed.plan import Plan
from deepseek.models.parallelizing import parallelize
from deepseek.nn.moe import MoERouter, SwiGLUExperts
from tests.distributed.parallel.cases import TokenTask, build_batches, build_model, merge
from tests.distributed.ranks import run_ranks


def answer(rank, algorithm):
    """What each rank's own tokens are answered, and the gradients of its experts, with rank 1 sending all it can."""
    torch.manual_seed(0)
    router = MoERouter(SwiGLUExperts(4, 6, 5), hidden_size=6).double()
    alone = copy.deepcopy(router)
    tokens = [torch.randn(3, 6, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64).repeat(5, 1)]
    spread_experts_(router, dist.group.WORLD, algorithm=algorithm)
    y_ND = router(tokens[rank])
    (y_ND.square().sum()).backward()
    alone(torch.cat(tokens)).square().sum().backward()
    own = slice(2 * rank, 2 * rank + 2)
    torch.testing.assert_close(y_ND, alone(tokens[rank]))
    torch.testing.assert_close(router.experts.up_proj.grad, alone.experts.up_proj.grad[own])
    return len(y_ND)


@pytest.mark.parametrize("algorithm", ["native", "ring"])
def test_tokens_in_uneven_parts_are_answered_by_experts_of_other_ranks(algorithm):
    assert run_ranks(answer, 2, algorithm) == [3, 5]


def refuse(rank):
    with pytest.raises(ConfigError, match="ep=2 does not divide experts=3; choose one of 1, 3"):
        spread_experts_(MoERouter(SwiGLUExperts(3, 4, 4), hidden_size=4), dist.group.WORLD)
    own = MoERouter({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}, hidden_size=4)
    with pytest.raises(ConfigError, match="these are ModuleExperts; use SwiGLUExperts, or ep=1"):
        spread_experts_(own, dist.group.WORLD)
    router = MoERouter(SwiGLUExperts(4, 4, 4), hidden_size=4)
    whole = router.experts.up_proj.detach().clone()
    kept = spread_experts_(router, dist.group.WORLD)
    assert torch.equal(router.experts.up_proj, whole[2 * rank : 2 * rank + 2])
    return len(kept)


def test_each_rank_keeps_its_own_experts_and_others_are_refused():
    assert run_ranks(refuse, 2) == [3, 3]


def measure_both(rank):
    """The loads of a layer under dp=2, and in one process on the tokens of both ranks."""
    task, batches = TokenTask(), build_batches("moe", 1)[0][:2]
    plan = Plan(dp=2, ep=2)
    parallel = parallelize(build_model("moe"), plan, build_mesh(plan))
    parallel.accumulate_gradients(task, [batches[rank]])
    whole = build_model("moe")
    task.forward(whole, merge(batches))
    return parallel.measure_experts(), {
        name: module.measure_balance() for name, module in whole.named_modules() if isinstance(module, MoERouter)
    }


def test_loads_are_those_of_all_tokens():
    for under_plan, alone in run_ranks(measure_both, 2):
        assert list(under_plan) == list(alone) == ["layers.0.feedforward", "layers.1.feedforward"]
        assert all(under_plan[name] == pytest.approx(alone[name]) for name in alone)
        assert any(values["gini"] > 0 for values in alone.values())
