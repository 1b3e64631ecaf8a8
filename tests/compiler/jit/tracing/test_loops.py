"""Loops: counters of every spelling, numbers with all their digits, ranges of tensors."""

import pytest
import torch

from deepseek.compiler.jit.decorator import jit


@pytest.fixture(autouse=True)
def fresh_tracer():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(x):
    n, total = 0, 0.0
    while x.sum() > n:
        n += 1
        total += 0.1
    return x * n * total


def annotated(x):
    n: int = 0
    while x.sum() > n:
        n += 1
    return x * n


def chained(x):
    n = m = 0
    while x.sum() > n:
        n += 1
    return x * n + m


def default(x, n=0):
    while x.sum() > n:
        n += 1
    return x * n


def running_total(x):
    total = x.sum()
    for value in x:
        if value > 0:
            total += value
    return total


def flags(x):
    found, steps = False, 0
    while not found and steps < 5:
        found = bool(x.sum() > 3)
        x = x * 2
        steps += 1
    return x * steps * found


@pytest.mark.parametrize(
    "function",
    [pair, annotated, chained, default, running_total, flags],
    ids=lambda function: function.__name__,
)
def test_a_counter_may_get_its_first_value_in_any_way(function):
    compiled = jit(function, backend="eager")
    with torch.no_grad():
        for x in (torch.tensor([1.0, 1.5]), torch.tensor([0.2, -1.0])):
            torch.testing.assert_close(compiled(x.clone()), function(x.clone()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_float_has_all_its_digits_beside_tensors_of_16_bits(dtype):
    def cool(x):
        scale, count = 1.0, 0
        while (x * scale).max() > 0.75 and count < 900:
            scale -= 0.002
            count += 1
        return x * scale, count

    x = torch.ones(2, dtype=dtype)
    with torch.no_grad():
        (got, count), (want, num_iterations) = jit(cool, backend="eager")(x), cool(x)
    assert count.dtype == torch.int64
    assert count == num_iterations
    assert torch.equal(got, want)


@pytest.mark.parametrize("bounds", [(7, 1, -2), (0, 5, 2), (3, 3, 1)], ids=str)
def test_a_range_of_tensors_counts_like_python_s(bounds):
    def function(start, stop, step):
        total = 0
        for k in range(start, stop, step):
            total = total * 10 + k
        return total

    compiled = jit(function, backend="eager")
    with torch.no_grad():
        assert compiled(*map(torch.tensor, bounds)) == function(*bounds)


def test_a_return_in_a_loop_takes_tensors_of_other_lengths():
    def grow(x):
        for step in range(3):
            x = x + step
            if x.sum() > 2:
                return x
        return x

    compiled = jit(grow, backend="eager")
    for is_training in (False, True):
        for length in (3, 2, 5) if not is_training else (3, 2):
            x = torch.linspace(-1, 1, length).requires_grad_(is_training)
            with torch.set_grad_enabled(is_training):
                assert torch.equal(compiled(x), grow(x))
