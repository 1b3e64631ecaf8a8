"""The gradients of `torch.cond` and `while_loop`: torch's faults, as they are and as they are kept away."""

import pytest
import torch
from torch._higher_order_ops import while_loop

from deepseek.compiler.jit.decorator import jit


@pytest.fixture(autouse=True)
def fresh_tracer():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradient_of(function, *inputs):
    result = torch.compile(function, backend="aot_eager", fullgraph=True)(*inputs)
    return torch.autograd.grad(result.sum(), inputs[0])[0]


def doubling(x):
    while x.sum() < 10:
        x = x * 2
    return x


def summing(x):
    total = torch.zeros(3)
    k = 0
    while k < 3 and x.sum() < 100:
        total = total + x
        k += 1
    return total


def test_a_loop_that_makes_no_iteration_has_the_gradient_one():
    x = torch.full((3,), 20.0, requires_grad=True)
    assert torch.equal(torch.autograd.grad(jit(doubling, backend="aot_eager")(x).sum(), x)[0], torch.ones(3))


def test_a_sum_over_iterations_has_the_gradient_of_all_iterations():
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(jit(summing, backend="aot_eager")(x).sum(), x)[0], torch.full((3,), 3.0))


def test_the_workarounds_are_needed_as_long_as_torch_gives_other_gradients():
    def plain_doubling(x):
        return while_loop(lambda x: x.sum() < 10, lambda x: (x * 2,), (x,))[0]

    def plain_summing(x):
        start = (torch.zeros((), dtype=torch.int64), torch.zeros(3))
        return while_loop(lambda k, total: k < 3, lambda k, total: (k + 1, total + x), start)[1]

    wrong = [
        not torch.equal(gradient_of(plain_doubling, torch.full((3,), 20.0, requires_grad=True)), torch.ones(3)),
        not torch.equal(gradient_of(plain_summing, torch.ones(3, requires_grad=True)), torch.full((3,), 3.0)),
    ]
    if torch.__version__.startswith("2.13"):
        assert wrong == [True, True]
