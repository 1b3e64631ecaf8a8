# ruff: noqa: SIM108 - the statements are the subject
"""The parts of the rewriting: analyses, structure, lines that stay, graphs without leftovers, torch's faults."""

import ast
import inspect
import textwrap

import pytest
import torch
from torch._higher_order_ops import while_loop

from deepseek.compiler.jit.decorator import jit
from deepseek.compiler.jit.rewriting.aliasing import find_fresh, find_numbers
from deepseek.compiler.jit.rewriting.counterparts import make_twin, rewrite, show
from deepseek.compiler.jit.rewriting.lowering import is_python, lower, stays_native
from deepseek.compiler.jit.rewriting.variables import live_before, never_ends, reads, surely_written, writes
from deepseek.compiler.jit.tracing.random_numbers import advance, hash_bits, uniform
from deepseek.core.errors import ConfigError


@pytest.fixture(autouse=True)
def fresh_tracer():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(source):
    return ast.parse(textwrap.dedent(source)).body


def expression(source):
    return ast.parse(source, mode="eval").body


class Recording:
    """An eager backend that keeps the graphs."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph_module, inputs):
        self.graphs.append(graph_module)
        return graph_module.forward

    def targets(self):
        (graph,) = self.graphs
        return [str(node.target) for module in graph.modules() for node in module.graph.nodes]


# ---- analyses


@pytest.mark.parametrize(
    ("source", "after", "live"),
    [
        ("y = x", {"y"}, {"x"}),
        ("y = x\nx = 1", {"x", "y"}, {"x"}),
        ("x += y", {"x"}, {"x", "y"}),
        ("if c:\n    y = a\nelse:\n    y = b", {"y"}, {"a", "b", "c"}),
        ("if c:\n    y = a", {"y"}, {"a", "c", "y"}),
        ("while c:\n    y = x\n    x = y + z", {"x"}, {"c", "x", "z"}),
        ("for i in n:\n    t = i\n    s = s + t", {"s"}, {"n", "s"}),
        ("for i in n:\n    last = i", {"last"}, {"last", "n"}),
        ("return x\ny = z", {"y"}, {"x"}),
        ("def f(a):\n    return a + k", {"f"}, {"a", "k"}),
        ("x[i] = v", {"x"}, {"i", "v", "x"}),
        ("with m as h:\n    y = h", {"y"}, {"m"}),
        ("try:\n    y = a\nexcept E:\n    y = b", {"y"}, {"E", "a", "b", "y"}),
        ("y = [a for a in b if a > c]", {"y"}, {"a", "b", "c"}),
        ("y: int", {"y"}, {"y", "int"}),
    ],
)
def test_live_variables_are_those_read_before_they_are_written(source, after, live):
    assert live_before(block(source), frozenset(after)) == live


def test_a_native_loop_carries_what_its_jumps_lead_to():
    body = block("if c:\n    break\nx = 1")
    assert live_before(body, frozenset(), head=frozenset("h"), end=frozenset("e")) == {"c", "e"}


def test_what_surely_has_a_value():
    assert surely_written(block("if c:\n    x = y = 1\nelse:\n    x = 2")) == {"x"}
    assert surely_written(block("if c:\n    x = 1\nelse:\n    return 2")) == {"x"}
    assert surely_written(block("while c:\n    x = 1")) == set()
    assert surely_written(block("with a as b:\n    x = 1")) == {"b", "x"}


def test_reads_and_writes_see_scopes():
    assert writes(block("(a, [b, *c]), d.e, f[g] = h\n[q for q in r]\nimport os.path\ndef s(t): u = 1")) == {
        *("a", "b", "c", "os", "s")
    }
    assert reads(expression("[x for x in y if z]")) == {"x", "y", "z"}
    assert writes(expression("[(w := x) for x in y]")) == {"w"}


def test_where_no_statement_goes_on():
    assert never_ends(block("if c:\n    return\nelse:\n    raise E"))
    assert not never_ends(block("if c:\n    return"))


@pytest.mark.parametrize(
    "source", ["x is None", "isinstance(x, int)", "not self.training", "len(x) > 'a'", "mode == 'a'"]
)
def test_conditions_that_are_python_for_certain(source):
    assert is_python(expression(source))


@pytest.mark.parametrize("source", ["x", "x > 0", "x is None or y > 0", "x in y", "f(x)", "self.flag"])
def test_conditions_that_may_be_tensors(source):
    assert not is_python(expression(source))


@pytest.mark.parametrize(
    ("source", "native"),
    [
        ("for i in range(3):\n    x = x + i", True),
        ("for i in range(n):\n    x = x + i", False),
        ("for a, b in zip(u, w):\n    x = a", True),
        ("for i in range(3):\n    if x > 0:\n        break", False),
        ("for i in range(3):\n    if x is None:\n        break", True),
        ("while True:\n    if x > 0:\n        break", False),
        ("while x > 0:\n    with m:\n        break", True),
    ],
)
def test_which_loops_stay_python(source, native):
    (loop,) = block(source)
    assert stays_native(loop) is native


def test_variables_that_alone_hold_their_tensor():
    source = "out = torch.zeros(3)\nshown = torch.ones(2)\nother = shown\ny = f(x)\nz = x * 2\nxs = []\nrow = z[0]"
    assert find_fresh(block(source), frozenset("x")) == {"out", "xs"}


def test_variables_that_plain_python_binds_to_numbers():
    source = "for i in range(n):\n    k = i * 2 + 0.5\n    t = k + x\nm = 3\nm += t\nfor row in rows:\n    pass"
    assert find_numbers(block(source), frozenset("x")) == {"i", "k"}


# ---- structure


def test_what_follows_an_early_return_moves_into_the_other_branch():
    lowered = lower(block("if c:\n    return 1\ny = 2\nreturn y"), "here")
    assert ast.unparse(lowered[0]) == "if c:\n    return 1\nelse:\n    y = 2\n    return y"


def test_a_function_that_may_run_to_its_end_returns_none():
    lowered = lower(block("if c:\n    return 1\ny = 2"), "here")
    assert ast.unparse(lowered[0]).endswith("y = 2\n    return None")


def test_too_many_early_exits_are_refused():
    exits = "\n".join(
        f"if a{k}:\n    if b{k}:\n        return {k}\n    x = {k}\nelse:\n    x = -{k}" for k in range(12)
    )
    with pytest.raises(ConfigError, match="too many early exits"):
        lower(block(exits), "here")


def test_every_generated_line_is_a_line_of_the_user(tmp_path):
    def f(x, n):
        total = 0.0
        for i in range(n):
            if x[i] > 0:
                continue
            total = total + x[i]
        return total if total < 3 else None

    lines, first = inspect.getsourcelines(f)
    make_twin(f)
    code = f.__ds__.function.__code__
    stack, seen = [code], set()
    while stack:
        each = stack.pop()
        stack += [inner for inner in each.co_consts if hasattr(inner, "co_code")]
        seen |= {line for _, _, line in each.co_lines() if line is not None}
        assert each.co_filename == __file__
    assert seen <= set(range(first, first + len(lines)))


def test_rewritten_code_can_be_read():
    def f(x):
        if x.sum() > 0:
            y = x
        else:
            y = -x
        return y

    assert "_ds0.cond(" in show(f)
    assert rewrite(f)(torch.tensor([-1.0])) == 1


def test_eager_use_of_rewritten_code_is_plain_python():
    seen = []

    def f(x):
        for value in x:
            if value > 1:
                seen.append(value.item())
        return len(seen)

    assert rewrite(f)(torch.tensor([0.0, 2.0, 3.0])) == 2
    assert seen == [2.0, 3.0]


# ---- graphs


def test_each_branch_stands_in_the_graph_once():
    def f(x):
        if x.sum() > 0:
            if x.max() > 2:
                y = x.exp()
            else:
                y = x.sinh()
        else:
            y = x.cos()
        return y

    backend = Recording()
    with torch.no_grad():
        jit(f, backend=backend)(torch.ones(3))
    for name in ("exp", "sinh", "cos"):
        assert backend.targets().count(name) == 1


def test_a_loop_in_inference_stands_in_the_graph_once():
    def f(x):
        while x.norm() < 10:
            x = x.cosh()
        return x

    backend = Recording()
    with torch.no_grad():
        jit(f, backend=backend)(torch.ones(3))
    assert backend.targets().count("cosh") == 1


def test_what_neither_branch_touches_does_not_pass_through_the_condition():
    def f(x, big):
        y, kept = x, big
        if x.sum() > 0:
            y, kept = x * 2, big
        return y, kept

    backend = Recording()
    with torch.no_grad():
        x, big = torch.ones(3), torch.ones(100)
        assert jit(f, backend=backend)(x, big)[1] is big
    (condition,) = (
        node for node in backend.graphs[0].graph.nodes if "cond" in str(node.target) and node.op != "get_attr"
    )
    assert len(condition.users) == 1


# ---- torch's faults, as they are and as they are kept away


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


def test_a_loop_that_makes_no_turn_has_the_gradient_one():
    x = torch.full((3,), 20.0, requires_grad=True)
    assert torch.equal(torch.autograd.grad(jit(doubling, backend="aot_eager")(x).sum(), x)[0], torch.ones(3))


def test_a_sum_over_turns_has_the_gradient_of_all_turns():
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


# ---- seeded random numbers


def test_seeded_numbers_are_uniform_and_independent_of_their_neighbours():
    seed = torch.tensor(12345)
    numbers = uniform((200_000,), advance(seed, 2), torch.device("cpu")).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * (1 / 12 / 200_000) ** 0.5
    counts = torch.histc(numbers, 64, 0, 1)
    chi_square = ((counts - 3125) ** 2 / 3125).sum()
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5
    others = [uniform((200_000,), advance(seed, salt), torch.device("cpu")).double() for salt in (3, 4)]
    others.append(numbers.roll(1))
    for other in others:
        correlation = torch.corrcoef(torch.stack([numbers, other]))[0, 1]
        assert abs(correlation) < 5 / 200_000**0.5


def test_the_hash_takes_different_numbers_to_different_numbers():
    numbers = torch.arange(300_000)
    assert hash_bits(numbers).unique().numel() == numbers.numel()
    assert hash_bits(numbers).max() < 2**32
