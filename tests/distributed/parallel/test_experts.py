import pytest
import torch
import torch.distributed as dist
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.experts import exchange, measure_balance, spread_experts_
from deepseek.distributed.parallel.mesh import build_mesh
from deepseek.distributed.plan import Plan
from deepseek.models.parallelizing import parallelize
from deepseek.nn.moe import MoERouter, SwiGLUExperts
from tests.distributed.parallel.cases import TokenTask, build_batches, build_model, merge
from tests.distributed.ranks import run_ranks


def exchange_rows(rank):
    """Rank 0 sends 1 row to itself and 2 to rank 1, which sends none to rank 0 and 3 to itself."""
    sent, received = ([1, 2], [1, 0]) if rank == 0 else ([0, 3], [2, 3])
    x = (torch.arange(3.0)[:, None] + 10 * rank).requires_grad_()
    y = exchange(x, received, sent, dist.group.WORLD)
    (y * (rank + 1)).sum().backward()
    nothing = exchange(torch.zeros(0, 2), [0, 0], [0, 0], dist.group.WORLD)
    return y.flatten().tolist(), x.grad.flatten().tolist(), tuple(nothing.shape)


def test_rows_travel_in_uneven_parts_and_gradients_travel_back():
    answers = run_ranks(exchange_rows, 2)
    assert answers[0] == ([0.0], [1.0, 2.0, 2.0], (0, 2))
    assert answers[1] == ([1.0, 2.0, 10.0, 11.0, 12.0], [2.0, 2.0, 2.0], (0, 2))


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


def test_balance_is_that_of_the_formula():
    load_E = torch.tensor([0.5, 1.5, 2.0, 0.0])
    gini = sum(abs(a - b) for a in load_E.tolist() for b in load_E.tolist()) / (2 * 4 * 4 * load_E.mean().item())
    assert measure_balance(load_E) == {"gini": pytest.approx(gini), "largest": 2.0, "idle": 0.25}
    assert measure_balance(torch.ones(8)) == {"gini": 0.0, "largest": 1.0, "idle": 0.0}


def measure_both(rank):
    """The loads of a layer under dp=2, and in one process on the tokens of both ranks."""
    task, batches = TokenTask(), build_batches("moe", 1)[0][:2]
    plan = Plan(dp=2, ep=2)
    parallel = parallelize(build_model("moe"), plan, build_mesh(plan))
    parallel.accumulate_gradients(task, [batches[rank]])
    whole = build_model("moe")
    task.forward(whole, merge(batches))
    return parallel.measure_experts(), {
        name: measure_balance(module.load_factor_E)
        for name, module in whole.named_modules()
        if isinstance(module, MoERouter)
    }


def test_loads_are_those_of_all_tokens():
    for under_plan, alone in run_ranks(measure_both, 2):
        assert list(under_plan) == list(alone) == ["layers.0.feedforward", "layers.1.feedforward"]
        assert all(under_plan[name] == pytest.approx(alone[name]) for name in alone)
        assert any(values["gini"] > 0 for values in alone.values())
