"""`MoERouter(experts, top_k=2)`: top-k routing by gate weights, weighted by them, over a dict of expert modules."""

import pytest
import torch
from torch import nn

import deepseek as ds


@pytest.fixture
def experts():
    torch.manual_seed(0)
    return {
        "code": nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)),
        "prose": nn.Linear(16, 16),
        "tables": nn.Sequential(nn.Linear(16, 16), nn.Tanh()),
        "math": nn.Linear(16, 16, bias=False),
    }


def answer_token_by_token(router, experts, x_TD, *, top_k):
    """The definition: the chosen experts' answers, weighted by their gates' softmax over the chosen ones."""
    answers = []
    for x_D in x_TD:
        scores_E = router.gate.weight @ x_D
        values_K, chosen_K = scores_E.topk(top_k)
        weights_K = values_K.softmax(dim=0)
        named = list(experts.values())
        answers.append(sum(weight * named[index](x_D) for weight, index in zip(weights_K, chosen_K, strict=True)))
    return torch.stack(answers)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_each_token_gets_the_weighted_answers_of_its_best_experts(experts, top_k):
    router = ds.MoERouter(experts, top_k=top_k)
    x_BTD = torch.randn(2, 10, 16)
    answers_BTD = router(x_BTD)
    expected_TD = answer_token_by_token(router, experts, x_BTD.flatten(0, 1), top_k=top_k)
    torch.testing.assert_close(answers_BTD.flatten(0, 1), expected_TD)


def test_experts_learn_in_proportion_to_their_gates(experts):
    router = ds.MoERouter(experts, top_k=2)
    x_TD = torch.randn(12, 16)
    router(x_TD).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in router.named_parameters()}
    router.zero_grad()
    answer_token_by_token(router, experts, x_TD, top_k=2).square().sum().backward()
    for name, parameter in router.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_load_factor_is_an_experts_load_over_the_average(experts):
    router = ds.MoERouter(experts, top_k=2)
    x_TD = torch.randn(40, 16)
    router(x_TD)
    chosen_TK = (x_TD @ router.gate.weight.t()).topk(2).indices
    loads = [(chosen_TK == expert).sum().item() for expert in range(4)]
    assert router.load_factor_E.tolist() == pytest.approx([load / (40 * 2 / 4) for load in loads])


def test_a_capacity_drops_what_is_over_it_and_only_in_training(experts):
    router = ds.MoERouter(experts, top_k=1, capacity_factor=1.0)
    x_TD = torch.randn(1, 16).expand(8, 16)  # all tokens want one expert, which takes 1.0 * 8 / 4 of them
    dropped = (router(x_TD) == 0).all(dim=1)
    assert dropped.tolist() == [False, False, True, True, True, True, True, True]
    assert not (router.eval()(x_TD) == 0).all(dim=1).any()


def test_progressive_routing_chooses_among_the_candidates_of_the_coarse_stage(experts):
    router = ds.MoERouter(experts, top_k=1, num_candidates=2)
    x_TD = torch.randn(30, 16)
    answers_TD = router(x_TD)
    coarse_TE = x_TD @ router.gate.weight.t()
    named = list(experts.values())
    for x_D, answer_D, candidates_K in zip(x_TD, answers_TD, coarse_TE.topk(2).indices, strict=True):
        assert any(torch.allclose(answer_D, named[index](x_D), atol=1e-5) for index in candidates_K)
