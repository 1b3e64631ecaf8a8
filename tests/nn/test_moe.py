"""The router against a plain loop over tokens and experts in float64: choices by Python's sort, weights by hand."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.nn.moe import MoEConfig, MoERouter, SwiGLUExperts, measure_load

D, FFN = 5, 4
sizes = {
    "num_tokens": st.integers(1, 9),
    "num_experts": st.integers(1, 6),
    "top_k": st.integers(1, 3),
    "seed": st.integers(0, 999),
}


def make_router(num_experts, top_k, seed=0, **options):
    torch.manual_seed(seed)
    top_k = min(top_k, options.get("num_candidates") or num_experts)
    router = MoERouter(SwiGLUExperts(num_experts, D, FFN), top_k, hidden_size=D, **options).double()
    with torch.no_grad():
        router.gate.weight.mul_(3)
    return router


def make_tokens(num_tokens, seed=0):
    return torch.randn(num_tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def answer(experts, index, x_D):
    """One expert on one token."""
    gate, up, down = (each[index] for each in (experts.gate_proj, experts.up_proj, experts.down_proj))
    return (F.silu(x_D @ gate) * (x_D @ up)) @ down


def choose(router, x_D):
    """Experts of one token, best first, and their weights."""
    logits = [x_D @ router.gate.weight[expert] for expert in range(router.experts.num_experts)]
    allowed = sorted(range(len(logits)), key=lambda expert: -logits[expert].item())[: router.num_candidates]
    if router.refine is not None:
        logits = [logit + x_D @ router.refine.weight[expert] for expert, logit in enumerate(logits)]
    total = sum(logits[expert].exp() for expert in allowed)
    scores = {expert: logits[expert].exp() / total for expert in allowed}
    ranked = sorted(allowed, key=lambda expert: -(scores[expert] + router.balance_bias_E[expert]).item())
    chosen = ranked[: router.top_k]
    chosen_total = sum(scores[expert] for expert in chosen)
    return {expert: scores[expert] / chosen_total for expert in chosen}


def place(choices, capacity):
    """(token, expert) pairs that find room when all first choices go before all second choices."""
    loads, placed = Counter(), set()
    for rank in range(len(choices[0])):
        for token, weights in enumerate(choices):
            expert = list(weights)[rank]
            if loads[expert] < capacity:
                loads[expert] += 1
                placed.add((token, expert))
    return placed


def dense(router, x_ND, capacity=None, answer=answer):
    choices = [choose(router, x_D) for x_D in x_ND]
    placed = place(choices, len(x_ND) if capacity is None else capacity)
    rows = []
    for token, (x_D, weights) in enumerate(zip(x_ND, choices, strict=True)):
        kept = [(expert, weight) for expert, weight in weights.items() if (token, expert) in placed]
        rows.append(
            sum((weight * answer(router.experts, expert, x_D) for expert, weight in kept), torch.zeros_like(x_D))
        )
    return torch.stack(rows)


def assert_same(router, x_ND, capacity=None, answer=answer):
    """Outputs, and gradients of everything, of a random linear function of the outputs."""
    x_ND = x_ND.requires_grad_()
    tensors = [x_ND, *router.parameters()]
    towards = torch.randn(x_ND.shape, dtype=x_ND.dtype, generator=torch.Generator().manual_seed(1))
    bias_E = router.balance_bias_E.clone()
    outputs, gradients = [], []
    for run in (router, lambda x: dense(router, x, capacity, answer)):
        y_ND = run(x_ND)
        router.balance_bias_E.copy_(bias_E)
        outputs.append(y_ND)
        gradients.append(torch.autograd.grad((y_ND * towards).sum(), tensors, allow_unused=True))
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    for ours, theirs, tensor in zip(*gradients, tensors, strict=True):
        pair = [torch.zeros_like(tensor) if each is None else each for each in (ours, theirs)]
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=100)
@given(**sizes)
def test_without_capacity_it_is_the_dense_loop(num_tokens, num_experts, top_k, seed):
    router = make_router(num_experts, top_k, seed)
    for mode in (True, False):
        assert_same(router.train(mode), make_tokens(num_tokens, seed))


@settings(deadline=None, max_examples=100)
@given(**sizes)
def test_with_room_for_all_it_is_the_dense_loop(num_tokens, num_experts, top_k, seed):
    router = make_router(num_experts, top_k, seed, capacity_factor=float(num_experts))
    assert_same(router, make_tokens(num_tokens, seed))


@settings(deadline=None, max_examples=150)
@given(**sizes, quarters=st.integers(1, 12))
def test_a_full_expert_drops_the_choices_that_come_last(num_tokens, num_experts, top_k, seed, quarters):
    router = make_router(num_experts, top_k, seed, capacity_factor=quarters / 4)
    capacity = min(num_tokens, -(-quarters * num_tokens * router.top_k // (4 * num_experts)))
    assert_same(router, make_tokens(num_tokens, seed), capacity)


@settings(deadline=None, max_examples=100)
@given(**sizes, num_candidates=st.integers(1, 6), capacity_factor=st.none() | st.just(6.0))
def test_progressive_routing_decides_among_the_coarse_candidates(
    num_tokens, num_experts, top_k, seed, num_candidates, capacity_factor
):
    num_candidates = min(num_candidates, num_experts)
    router = make_router(num_experts, top_k, seed, num_candidates=num_candidates, capacity_factor=capacity_factor)
    assert_same(router, make_tokens(num_tokens, seed))


def test_in_evaluation_nothing_is_dropped():
    router, x_ND = make_router(4, 2, capacity_factor=0.25), make_tokens(8)
    assert not torch.allclose(router.train()(x_ND), dense(router, x_ND))
    torch.testing.assert_close(router.eval()(x_ND), dense(router, x_ND))


def test_leading_dims_are_kept():
    router, x_ND = make_router(4, 2).eval(), make_tokens(12)
    torch.testing.assert_close(router(x_ND.view(2, 2, 3, D)), router(x_ND).view(2, 2, 3, D), rtol=0, atol=0)
    assert router(x_ND[:0]).shape == (0, D)


@pytest.mark.parametrize("capacity_factor", [None, 4.0])
def test_a_dict_of_any_modules_is_routed_over(capacity_factor):
    torch.manual_seed(0)
    experts = {
        "line": nn.Linear(D, D),
        "deep": nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, D, bias=False)),
        "same": nn.Identity(),
        "unlucky": nn.Linear(D, D),
    }
    router = MoERouter(experts, top_k=2, capacity_factor=capacity_factor).double()
    router(make_tokens(2))  # the gate takes its width from the first input
    with torch.no_grad():
        router.gate.weight[3] = -100 * router.gate.weight[:3].sum(dim=0)
    x_ND = make_tokens(9).abs()
    assert_same(router, x_ND, answer=lambda experts, index, x_D: list(experts.values())[index](x_D))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_gate_without_a_width_takes_it_from_the_first_input_in_any_dtype(dtype):
    router = MoERouter({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}, num_candidates=2).to(dtype)
    assert router(torch.ones(3, 4, dtype=dtype)).dtype == dtype
    assert router.gate.weight.shape == router.refine.weight.shape == (2, 4)


def test_the_load_factor_is_the_load_over_the_average_counted_before_any_drop():
    router, x_ND = make_router(4, 2, capacity_factor=0.5), make_tokens(8)
    loads = Counter(expert for x_D in x_ND for expert in choose(router, x_D))
    router(x_ND)
    expected_E = torch.tensor([loads[expert] / (8 * 2 / 4) for expert in range(4)], dtype=torch.float64)
    torch.testing.assert_close(router.load_factor_E, expected_E)
    assert router.load_factor_E.mean() == 1


def test_balance_is_that_of_the_formula():
    load_E = torch.tensor([0.5, 1.5, 2.0, 0.0])
    gini = sum(abs(a - b) for a in load_E.tolist() for b in load_E.tolist()) / (2 * 4 * 4 * load_E.mean().item())
    assert measure_load(load_E) == {"gini": pytest.approx(gini), "largest": 2.0, "idle": 0.25}
    assert measure_load(torch.ones(8)) == {"gini": 0.0, "largest": 1.0, "idle": 0.0}


@pytest.mark.parametrize("capacity_factor", [0.25, 0.6, 1.0, None])
def test_the_dropped_share_counts_the_assignments_that_found_no_room(capacity_factor):
    router, x_ND = make_router(4, 2, capacity_factor=capacity_factor), make_tokens(11)
    router(x_ND)
    capacity = 11 if capacity_factor is None else math.ceil(capacity_factor * 11 * 2 / 4)
    placed = place([choose(router, x_D) for x_D in x_ND], capacity)
    assert router.measure_balance()["dropped"] == pytest.approx(1 - len(placed) / (11 * 2))


def test_evaluation_leaves_the_balance_alone():
    router, x_ND = make_router(4, 2, balance_rate=0.1).eval(), make_tokens(9)
    before = {name: each.clone() for name, each in router.named_buffers()}
    router(x_ND)
    assert router.route(x_ND).load_factor_E.max() > 1
    torch.testing.assert_close(dict(router.named_buffers()), before, rtol=0, atol=0)


def test_the_bias_falls_by_the_load_above_the_average_and_evens_the_load_out():
    router, x_ND = make_router(4, 1, balance_rate=0.02), make_tokens(64)
    with torch.no_grad():
        router.gate.weight[0] += x_ND.mean(dim=0) * 30  # far too many like the first expert
    router(x_ND)
    first_E = router.load_factor_E.clone()
    torch.testing.assert_close(router.balance_bias_E, -0.02 * (first_E - 1))
    assert first_E.max() > 1.8
    for _ in range(300):
        router(x_ND)
    assert router.load_factor_E.max() < 1.3 and router.load_factor_E.min() > 0.7


def test_the_bias_steers_the_choice_and_not_the_weights():
    router, x_ND = make_router(4, 2), make_tokens(8)
    router.balance_bias_E.copy_(torch.tensor([5.0, 0.0, 0.0, 0.0]))
    routing = router.route(x_ND)
    assert (routing.experts_NK[:, 0] == 0).all()
    scores_NE = (x_ND @ router.gate.weight.T).softmax(dim=-1)
    chosen_NK = scores_NE.gather(1, routing.experts_NK)
    torch.testing.assert_close(routing.weights_NK, chosen_NK / chosen_NK.sum(dim=-1, keepdim=True))


def test_the_bias_never_brings_back_an_expert_that_the_coarse_stage_ruled_out():
    router, x_ND = make_router(6, 2, num_candidates=2), make_tokens(16)
    router.balance_bias_E.uniform_(-3, 3)
    candidates_NM = (x_ND @ router.gate.weight.T).topk(2).indices
    routing = router.route(x_ND)
    assert (routing.experts_NK.sort().values == candidates_NM.sort().values).all()
    assert (routing.weights_NK > 0).all()


def test_a_bias_towards_an_expert_that_cannot_answer_makes_no_nan():
    router, x_ND = make_router(3, 1), make_tokens(4)
    with torch.no_grad():
        router.gate.weight.copy_(torch.tensor([[1e4], [0.0], [-1e4]]) * x_ND[0])
    router.balance_bias_E.copy_(torch.tensor([0.0, 0.0, 9.0]))
    assert router.route(x_ND[:1]).weights_NK.isfinite().all()


@pytest.mark.parametrize("capacity_factor", [None, 4.0])
def test_routing_is_decided_in_float32_under_autocast(capacity_factor):
    torch.manual_seed(0)
    router = MoERouter(SwiGLUExperts(4, D, FFN), 2, hidden_size=D, capacity_factor=capacity_factor)
    x_ND = torch.randn(64, D)
    expected = router.route(x_ND)
    with torch.autocast("cpu", torch.bfloat16):
        routing, y_ND = router.route(x_ND), router(x_ND)
        busy_y_1D = router(x_ND[:1])  # some experts are idle
    assert y_ND.dtype == busy_y_1D.dtype == torch.bfloat16
    assert routing.weights_NK.dtype == torch.float32
    torch.testing.assert_close(tuple(routing), tuple(expected), rtol=0, atol=0)
    torch.testing.assert_close(y_ND.float(), router(x_ND), rtol=0.05, atol=0.02)


def test_a_tokens_answer_does_not_depend_on_its_company():
    router, x_ND = make_router(4, 2).eval(), make_tokens(16)
    alone_ND = torch.cat([router(x_1D) for x_1D in x_ND.split(1)])
    torch.testing.assert_close(router(x_ND), alone_ND, rtol=1e-12, atol=1e-14)


def test_stacked_experts_run_alike_on_equal_groups_and_on_groups_of_their_own():
    experts = SwiGLUExperts(3, D, FFN).double()
    x_ECD = make_tokens(12).view(3, 4, D)
    torch.testing.assert_close(torch.stack(experts.run(x_ECD.unbind(0))), experts(x_ECD))
    expected = torch.stack([torch.stack([answer(experts, e, x_D) for x_D in x_CD]) for e, x_CD in enumerate(x_ECD)])
    torch.testing.assert_close(experts(x_ECD), expected)


def test_second_derivatives_go_through_the_bounded_path():
    router, x_ND = make_router(3, 2, capacity_factor=0.75), make_tokens(4).requires_grad_()
    assert torch.autograd.gradgradcheck(router, (x_ND,))


def test_what_is_learned_is_saved_and_what_is_measured_is_not():
    router = make_router(3, 2, num_candidates=2)
    experts = {f"experts.{name}_proj" for name in ("gate", "up", "down")}
    assert set(router.state_dict()) == {"gate.weight", "refine.weight", "balance_bias_E", *experts}


def test_new_experts_are_of_the_size_of_a_linear_layers_weights():
    torch.manual_seed(0)
    experts = SwiGLUExperts(64, 16, 32)
    for weight_EIO in experts.parameters():
        bound = 1 / math.sqrt(weight_EIO.shape[1])
        assert 0.99 * bound < weight_EIO.abs().max() <= bound
        assert weight_EIO.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 4}, "top_k=4 of 3 candidates and 3 experts; choose 1 <= top_k <= num_candidates <= number of"),
        ({"top_k": 0}, "top_k=0 of 3"),
        ({"top_k": 2, "num_candidates": 1}, "top_k=2 of 1 candidates and 3 experts"),
        ({"top_k": 2, "num_candidates": 4}, "top_k=2 of 4 candidates and 3 experts"),
        ({"top_k": 1, "capacity_factor": 0.0}, "capacity_factor=0.0 leaves no room for a token"),
        ({"top_k": 1, "capacity_factor": -1.0}, "capacity_factor=-1.0 leaves no room"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MoERouter(SwiGLUExperts(3, D, FFN), **options)


def test_no_experts_are_refused():
    with pytest.raises(ConfigError, match="top_k=2 of 0 candidates and 0 experts"):
        MoERouter({})


@pytest.mark.parametrize(
    "values", [{"num_experts": 0}, {"top_k": 0}, {"capacity_factor": 0}, {"balance_rate": -1}, {"num_candidates": 0}]
)
def test_a_config_refuses_numbers_without_a_meaning(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        MoEConfig(**values)
