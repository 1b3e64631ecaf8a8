"""The corpus under `jit`: every branch right at trace time and after, forward and gradients, always one graph."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from deepseek.compiler.jit.decorator import jit
from tests.compiler.jit.corpus import CASES

IDS = [case.name for case in CASES]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
# What runs every time; the whole corpus in training and exported runs among the slow tests.
QUICK = {
    "early_returns",
    "while_counts",
    "for_tensor_range",
    "writes_rows",
    "chained_three",
    "returns_a_dict",
    "Nested",
}
QUICK_EXPORTED = {"early_returns", "for_tensor_range", "Gated"}


def slow_but(quick, cases):
    """The cases as parameters, those that are not `quick` among the slow tests."""
    marks = {True: (), False: (pytest.mark.slow,)}
    return [pytest.param(case, id=case.name, marks=marks[case.name in quick]) for case in cases]


class Counting:
    """A backend that counts the graphs that ever run (a tracer may compile one twice before it runs it)."""

    def __init__(self, backend):
        self.backend = torch._dynamo.lookup_backend(backend)
        self.ran = set()

    def __call__(self, graph_module, inputs):
        compiled, key = self.backend(graph_module, inputs), object()

        def run(*inputs):
            self.ran.add(key)
            return compiled(*inputs)

        return run


@pytest.fixture(autouse=True)
def fresh_tracer():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Converting a tensor")
        yield


def copy_of(arguments, *, requires_grad):
    return [
        each.detach().clone().requires_grad_(requires_grad and each.is_floating_point())
        if isinstance(each, torch.Tensor)
        else each
        for each in arguments
    ]


def gradients(result, target, arguments):
    """Of a weighted sum of all floating results, for arguments and parameters; zeros where there is none."""
    wanted = [each for each in arguments if isinstance(each, torch.Tensor) and each.requires_grad]
    wanted += list(target.parameters() if isinstance(target, nn.Module) else target if isinstance(target, list) else ())
    outputs = [each for each in pytree.tree_leaves(result) if isinstance(each, torch.Tensor) and each.requires_grad]
    if not outputs:
        return [torch.zeros_like(each) for each in wanted]
    total = sum((each * torch.linspace(1, 2, each.numel()).reshape(each.shape).to(each)).sum() for each in outputs)
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(at) if each is None else each for each, at in zip(found, wanted, strict=True)]


def assert_same(got, want):
    got_leaves, got_spec = pytree.tree_flatten(got)
    want_leaves, want_spec = pytree.tree_flatten(want)
    assert got_spec == want_spec
    for one, other in zip(got_leaves, want_leaves, strict=True):
        if isinstance(other, (torch.Tensor, int, float)):
            one, other = torch.as_tensor(one), torch.as_tensor(other)
            assert one.shape == other.shape
            torch.testing.assert_close(one.double(), other.double(), equal_nan=True, **EXACT)
        else:
            assert one == other


def run(target, arguments, *, is_training):
    copied = copy_of(arguments, requires_grad=is_training)
    with torch.set_grad_enabled(is_training):
        result = target(*copied)
    return result, gradients(result, target, copied) if is_training else []


def check(case, backend, *, is_training, first=0):
    """Trace with the arguments `first`, then take every other way without another trace."""
    plain, counting = case.make(), Counting(backend)
    compiled = jit(case.make(), backend=counting, optimize=False)
    order = [case.arguments[first], *case.arguments]
    for arguments in order if "python" not in case.traits else case.arguments:
        want, want_gradients = run(plain, arguments, is_training=is_training)
        got, got_gradients = run(compiled, arguments, is_training=is_training)
        assert_same(got, want)
        assert_same(got_gradients, want_gradients)
    if "python" not in case.traits:
        assert len(counting.ran) == 1


def test_the_corpus_is_large_enough():
    assert len(CASES) >= 70
    assert len(set(IDS)) == len(IDS)
    assert sum(len(case.arguments) > 1 for case in CASES) >= 65


@pytest.mark.parametrize("case", slow_but(QUICK, CASES))
def test_training_gives_the_values_and_gradients_of_plain_python_with_one_graph(case):
    check(case, "aot_eager", is_training=True)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_inference_gives_the_values_of_plain_python_with_one_graph(case):
    check(case, "eager", is_training=False, first=-1)


class Wrapped(nn.Module):
    """A function as a module, since that is what `torch.export` takes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


@pytest.mark.parametrize("case", slow_but(QUICK_EXPORTED, [each for each in CASES if "python" not in each.traits]))
def test_an_exported_program_has_all_branches_and_their_gradients(case):
    plain, target = case.make(), jit(case.make(), backend="eager")
    module = target if isinstance(target, nn.Module) else Wrapped(target)
    example = tuple(copy_of(case.arguments[0], requires_grad=True))
    exported = torch.export.export(module, example).module()
    for arguments in case.arguments:
        want, want_gradients = run(plain, arguments, is_training=True)
        copied = copy_of(arguments, requires_grad=True)
        got = exported(*copied)
        assert_same(got, want)
        named = dict(exported.named_parameters())
        parameters = [named[name] for name, _ in module.named_parameters()]
        assert_same(gradients(got, parameters, copied), want_gradients)


MODULES = [case for case in CASES if isinstance(case.make(), nn.Module)]


@pytest.mark.parametrize("case", MODULES, ids=lambda case: case.name)
def test_modules_optimized_for_inference_give_the_values_of_plain_python(case):
    plain, compiled = case.make().eval(), jit(case.make().eval(), backend="eager")
    with torch.no_grad():
        for arguments in case.arguments:
            torch.testing.assert_close(compiled(*arguments), plain(*arguments), rtol=1e-9, atol=1e-9)
