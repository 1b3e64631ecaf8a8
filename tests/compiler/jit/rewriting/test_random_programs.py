"""Random programs: what hypothesis writes gives the same values and gradients rewritten as it does in plain Python."""

import importlib.util
import itertools
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek.compiler.jit.decorator import jit

NAMES = ("a", "b", "c")
INPUTS = [
    (torch.tensor([0.3, -0.2, 0.9]), torch.tensor([1.1, 0.4, -0.7])),
    (torch.tensor([-0.8, -0.1, -0.4]), torch.tensor([0.2, 0.3, 0.1])),
    (torch.tensor([1.5, 2.5, 0.1]), torch.tensor([-1.0, -2.0, 0.5])),
]
numbers = itertools.count()

names = st.sampled_from(NAMES)
values = st.one_of(
    st.builds("torch.tanh({} + {})".format, names, names),
    st.builds("{} * 0.5 + {}.sin()".format, names, names),
    st.builds("{} - {}".format, names, names),
    st.builds("torch.cos({}) * {}".format, names, names),
    st.builds("({} if {}.sum() > 0 else {} * 2)".format, names, names, names),
    st.builds("{}.flip(0)".format, names),
)
tensor_conditions = st.one_of(
    st.builds("{}.sum() > {}.mean()".format, names, names),
    st.builds("({} > 0.2).any()".format, names),
    st.builds("-0.5 < {}[0] < 0.8".format, names),
    st.builds("not {}.min() > -0.3 and {}.max() < 2".format, names, names),
    st.builds("{}[1] < 0 or {}.sum() > 1".format, names, names),
)
conditions = st.one_of(tensor_conditions, tensor_conditions, st.sampled_from(["flag", "not flag", "size > 2"]))


def indent(lines):
    return ["    " + line for line in lines]


@st.composite
def assignment(draw):
    return [f"{draw(names)} = {draw(values)}"]


@st.composite
def swap(draw):
    one, other = draw(st.permutations(NAMES))[:2]
    return [f"{one}, {other} = {other}, {one} * 0.9"]


@st.composite
def choice(draw, depth, jumps):
    lines = [f"if {draw(conditions)}:", *indent(draw(block(depth - 1, jumps)))]
    if draw(st.booleans()):
        lines += [f"elif {draw(conditions)}:", *indent(draw(block(depth - 1, jumps)))]
    if draw(st.booleans()):
        lines += ["else:", *indent(draw(block(depth - 1, jumps)))]
    return lines


@st.composite
def while_loop(draw, depth, jumps):
    counter = f"k{next(numbers)}"
    body = draw(block(depth - 1, [*jumps, "break", "continue"]))
    start = draw(st.sampled_from(["0", "torch.zeros(())"]))
    lines = [
        f"{counter} = {start}",
        f"while {counter} < 3 and ({draw(tensor_conditions)}):",  # an `or` outside would never end
        f"    {counter} = {counter} + 1",
    ]
    return lines + indent(body)


@st.composite
def for_loop(draw, depth, jumps):
    body = draw(block(depth - 1, [*jumps, "break", "continue"]))
    items = draw(st.sampled_from(["range(2)", "range(size)", "range(count)"]))
    return [f"for i in {items}:", f"    {draw(names)} = {draw(names)} * 0.9 + 0.05 * i", *indent(body)]


@st.composite
def jump(draw, jumps):
    word = draw(st.sampled_from(jumps))
    if word == "return":
        word = f"return {draw(names)} * {draw(names)}"
    return [f"if {draw(conditions)}:", f"    {word}"]


@st.composite
def block(draw, depth, jumps):
    kinds = [assignment(), assignment(), swap(), jump(jumps)]
    if depth > 0:
        kinds += [choice(depth, jumps), while_loop(depth, jumps), for_loop(depth, jumps)]
    parts = draw(st.lists(st.one_of(kinds), min_size=1, max_size=3))
    return [line for part in parts for line in part]


@st.composite
def programs(draw):
    body = draw(block(2, ["return"]))
    lines = ["import torch", "", "", "def program(a, b, count, flag, size):", "    c = a + b", *indent(body)]
    return "\n".join([*lines, "    return a + b * c", ""])


def is_traced_soon(source):
    """Each jump nests what follows in one more `torch.cond`, and torch traces every level of those several times over:
    seconds for four of them, minutes for nine."""
    return source.count("if ") <= 4


def load(source, folder):
    path = folder / f"program_{next(numbers)}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module.program


def run(function, a, b, count, flag):
    a, b = a.double().requires_grad_(), b.double().requires_grad_()
    result = function(a, b, torch.tensor(count), flag, 3)
    gradients = torch.autograd.grad(result.sum(), (a, b), allow_unused=True)
    return [result.detach(), *(torch.zeros(3).double() if each is None else each for each in gradients)]


def check(source, folder, *, flag):
    torch._dynamo.reset()
    program = load(source, folder)
    compiled = jit(program, backend="eager")
    for (a, b), count in zip(INPUTS, (2, 0, 3), strict=True):
        want = run(program, a, b, count, flag)
        got = run(compiled, a, b, count, flag)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)


OPTIONS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=3, **OPTIONS)
@given(source=programs(), flag=st.booleans())
def test_a_few_random_programs_give_what_plain_python_gives(source, flag, tmp_path_factory):
    check(source, tmp_path_factory.mktemp("programs"), flag=flag)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=60, **OPTIONS)
@given(source=programs().filter(is_traced_soon), flag=st.booleans())
def test_random_programs_give_what_plain_python_gives(source, flag, tmp_path_factory):
    check(source, tmp_path_factory.mktemp("programs"), flag=flag)
