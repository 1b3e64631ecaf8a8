import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepseek.nn.functional as F
from deepseek import nn
from deepseek.core.errors import ConfigError
from deepseek.nn.functional import MAX_ERRORS, fast_sigmoid

FORMS = sorted(MAX_ERRORS)
WHOLE = torch.cat(
    (torch.linspace(-30, 30, 600_001, dtype=torch.float64), torch.tensor([-1e4, 1e4], dtype=torch.float64))
)


def kept_bytes(function, x):
    """Bytes that autograd keeps beside the input, which the caller has anyway."""
    kept = {}

    def note(value):
        kept[value.data_ptr()] = value.numel() * value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        function(x)
    return sum(num_bytes for pointer, num_bytes in kept.items() if pointer != x.data_ptr())


def written_out(form, x):
    """The form as a formula in plain torch, differentiable by autograd."""
    if form == "hard":
        return (x / 6 + 0.5).clamp(0, 1)
    if form == "exact":
        return 1 / (1 + torch.exp(-x))
    edges = torch.linspace(-10, 10, 255, dtype=torch.float64)
    heights = 1 / (1 + torch.exp(-edges))
    piece = ((x.detach() + 10) / 20 * 254).floor().long().clamp(0, 253)
    left, right = heights[piece], heights[piece + 1]
    inside = left + (right - left) * (x - edges[piece]) / (20 / 254)
    return torch.where(x < -10, heights[0], torch.where(x >= 10, heights[-1], inside))


@pytest.mark.parametrize("form", FORMS)
def test_the_error_stays_within_the_documented_bound_and_reaches_for_it(form):
    error = (fast_sigmoid(WHOLE.float(), form=form, max_error=1.0).double() - 1 / (1 + torch.exp(-WHOLE))).abs().max()
    assert error <= MAX_ERRORS[form] + 1e-7
    assert error >= 0.95 * MAX_ERRORS[form]


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_exact_for_the_form(form):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4096, generator=generator, dtype=torch.float64) * 5).requires_grad_()
    reference = x.detach().clone().requires_grad_()
    weights = torch.randn(4096, generator=generator, dtype=torch.float64)
    (fast_sigmoid(x, form=form, max_error=1.0) * weights).sum().backward()
    (written_out(form, reference) * weights).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_the_values_are_those_of_the_formula(form):
    x = torch.linspace(-12, 12, 10_001, dtype=torch.float64)
    torch.testing.assert_close(fast_sigmoid(x, form=form, max_error=1.0), written_out(form, x), rtol=0, atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_any_float_gives_a_share_and_a_finite_gradient(values):
    for form in ("hard", "table"):
        x = torch.tensor(values, requires_grad=True)
        y = fast_sigmoid(x, form=form, max_error=1.0)
        y.sum().backward()
        assert ((y >= 0) & (y <= 1)).all() and x.grad.isfinite().all() and (x.grad >= 0).all()


def test_what_is_no_number_stays_none():
    for form in FORMS:
        assert fast_sigmoid(torch.tensor([math.nan]), form=form, max_error=1.0).isnan().all()


@pytest.mark.parametrize(("form", "num_bytes"), [("exact", 4), ("hard", 1), ("table", 1), ("auto", 1)])
def test_bytes_kept_for_the_backward_pass(form, num_bytes):
    x = torch.randn(1000, requires_grad=True)
    assert kept_bytes(lambda x: fast_sigmoid(x, form=form, max_error=1.0), x) == num_bytes * 1000
    assert kept_bytes(torch.sigmoid, x) == 4000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", ["hard", "table"])
def test_other_dtypes_come_back_as_they_came(form, dtype):
    x = torch.linspace(-8, 8, 101).to(dtype).requires_grad_()
    y = fast_sigmoid(x, form=form, max_error=1.0)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (y.double() - x.detach().double().sigmoid()).abs().max() <= MAX_ERRORS[form] + eps
    if form == "hard":
        assert torch.equal(x.grad != 0, x.detach().abs() < 3)


def test_auto_is_the_cheapest_form_within_the_bound():
    x = torch.randn(100)
    assert torch.equal(fast_sigmoid(x), fast_sigmoid(x, form="hard"))
    assert torch.equal(fast_sigmoid(x, max_error=1e-3), torch.sigmoid(x))


def test_views_vmap_and_second_derivatives_work():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: fast_sigmoid(x.t()[::2]) ** 2, (x,))
    rows = torch.func.vmap(torch.func.grad(lambda row: fast_sigmoid(row).sum()))(x.detach())
    torch.testing.assert_close(rows, torch.where(x.detach().abs() < 3, 1 / 6, 0.0).double())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's compiler itself
@pytest.mark.parametrize("form", ["hard", "table"])
def test_compiled_it_gives_the_same(form):
    x = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(lambda x: fast_sigmoid(x, form=form, max_error=1.0), backend="aot_eager", fullgraph=True)
    expected = fast_sigmoid(x, form=form, max_error=1.0)
    y = compiled(x)
    torch.testing.assert_close(y, expected)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "soft"}, "unknown form of the sigmoid 'soft'"),
        ({"max_error": -1.0}, "max_error is -1.0; give 0 or more"),
        (
            {"form": "hard", "max_error": 1e-3},
            "form 'hard' is up to 0.0693 away from the sigmoid and max_error is 0.001",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        fast_sigmoid(torch.zeros(1), **arguments)


def test_integers_are_refused():
    with pytest.raises(ConfigError, match=r"was given torch.int64; give a floating-point tensor"):
        fast_sigmoid(torch.zeros(1, dtype=torch.long))


def test_everything_of_torch_functional_is_beside_it():
    assert F.relu is torch.nn.functional.relu and nn.functional is F
    assert {each for each in dir(torch.nn.functional) if not each.startswith("__")} <= set(dir(F))
    with pytest.raises(AttributeError, match="no_such_function"):
        _ = F.no_such_function
