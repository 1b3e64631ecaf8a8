# ruff: noqa: SIM108 - the statements are the subject
"""Branches traced aside: nothing that they would change changes, and everything that they would change is found."""

import collections
import inspect

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek.compiler.jit.decorator import ControlFlowError, jit
from deepseek.compiler.jit.tracing import speculation


@pytest.fixture(autouse=True)
def fresh_tracer():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Meter:
    def __init__(self):
        self.value = 0
        self.history = []

    def reset(self):
        self.value = 5


def by_alias(x, state):
    add = state.history.append
    if x.sum() > 0:
        add(1)
    return x


def in_a_comprehension(x, state):
    if x.sum() > 0:
        [state.history.append(number) for number in (1, 2)]
    return x


def by_setattr(x, state):
    if x.sum() > 0:
        setattr(state, "value", 5)  # noqa: B010 - the subject
    return x


def by_its_method(x, state):
    if x.sum() > 0:
        state.reset()
    return x


def by_its_dictionary(x, state):
    if x.sum() > 0:
        state.__dict__["value"] = 5
    return x


def in_a_helper(x, state):
    def helper(history):
        history.extend([1, 2])

    if x.sum() > 0:
        helper(state.history)
    return x


def in_a_loop(x, state):
    while x.sum() > 100:
        state.history.insert(0, x)
        x = x / 2
    return x


def in_a_conditional_expression(x, state):
    return x * 2 if x.sum() < 0 else x * len(state.history.append(1) or [1])


CHANGES = [
    by_alias,
    in_a_comprehension,
    by_setattr,
    by_its_method,
    by_its_dictionary,
    in_a_helper,
    in_a_loop,
    in_a_conditional_expression,
]


@pytest.mark.parametrize("function", CHANGES, ids=lambda function: function.__name__)
def test_a_branch_that_would_change_what_is_outside_is_refused_and_changes_nothing(function):
    state = Meter()
    with pytest.raises(ControlFlowError, match=rf"{__file__}:\d+: "):
        jit(function, backend="eager")(-torch.ones(2), state)
    assert (state.value, state.history) == (0, [])


def test_a_cell_an_iterator_and_a_buffer_are_outside_of_a_branch_too():
    def counts(x):
        count = 0

        def bump():
            nonlocal count
            count += 1

        if x.sum() > 0:
            bump()
        return x * count

    def takes(x):
        values = iter([1.0, 2.0])
        if x.sum() > 0:
            x = x * next(values)
        return x * next(values)

    norm = nn.BatchNorm1d(2)

    def normalizes(x):
        return norm(x) if x.sum() > 1e9 else x

    x = torch.ones(2, 2)
    for function in (counts, takes, normalizes):
        with pytest.raises(ControlFlowError, match="changes something outside"):
            jit(function, backend="eager")(x)
    assert norm.num_batches_tracked == 0


VIEWS = {
    "view": "table.view(-1)",
    "transpose": "table.T",
    "row": "table[0]",
    "detached": "table.detach()",
    "expanded": "table.unsqueeze(0)",
    "the same": "table",
    "in a list": "[table]",
    "by a function": "(lambda t: t)(table)",
}
WRITES = {
    "index": "table[0] = 5.0",
    "slice": "table[:, 1:] = x.sum()",
    "augmented": "table += 1",
    "method": "table.mul_(2)",
    "tensor index": "table[x.argmax()] = 3.0",
}


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(view=st.sampled_from(sorted(VIEWS)), write=st.sampled_from(sorted(WRITES)), loop=st.booleans())
def test_a_write_that_a_view_would_see_is_refused_or_seen(view, write, loop, tmp_path_factory):
    torch._dynamo.reset()
    head = "k = 0\n    while k < x.sum() - 1:\n        k += 1" if loop else "if x.sum() > 0:"
    source = f"""
import torch


def function(x):
    table = torch.zeros(2, 2)
    other = {VIEWS[view]}
    {head}
        {WRITES[write]}
    other = other[0] if isinstance(other, list) else other
    return other + 0
"""
    path = tmp_path_factory.mktemp("views") / "written.py"
    path.write_text(source, encoding="utf-8")
    scope = {"__name__": "written"}
    exec(compile(source, str(path), "exec"), scope)
    x = torch.ones(2)
    with torch.no_grad():
        try:
            got = jit(scope["function"], backend="eager")(x)
        except ControlFlowError as error:
            assert f"{path}:" in str(error)
        else:
            assert torch.equal(got, scope["function"](x))


def test_what_one_variable_alone_holds_may_be_written_in_branches_and_loops():
    def function(x):
        table, found, named = torch.zeros(3), [], {"a": x}
        first = found
        first = None
        if x.sum() > 0:
            table[0] = 5.0
            table += x
            found.append(x)
            named["b"] = x * 2
        else:
            table.sub_(1)
            found.append(-x)
            named["b"] = x
        count = 0
        while table.sum() > count and count < 3:
            table[count % 3] = table.sum() * 0.5
            count += 1
        return table, found, named, count, first

    compiled = jit(function, backend="eager")
    with torch.no_grad():
        for x in (torch.ones(3), -torch.ones(3), torch.full((3,), 4.0)):
            got, want = compiled(x), function(x)
            torch.testing.assert_close(got[0], want[0])
            torch.testing.assert_close(got[1], want[1])
            assert got[2].keys() == want[2].keys()
            torch.testing.assert_close(got[2]["b"], want[2]["b"])
            assert int(got[3]) == want[3]


def alias_of_a_branch(x):
    y = x * 2
    if x.sum() > 0:
        z = y
    else:
        z = y * 3
    y += 1
    return z


def argument_out_of_a_branch(x):
    if x.sum() > 0:
        y = x
    else:
        y = -x
    y += 1
    return x, y


def alias_in_an_iteration(x):
    a, b = x * 1, x * 2
    count = 0
    while x.sum() > count:
        a += 1
        a = b
        count += 1
    return a, b


def list_out_of_a_branch(x):
    first, second = [x], [x * 2]
    if x.sum() > 0:
        found = first
    else:
        found = second
    found.append(x)
    return len(first), len(second)


@pytest.mark.parametrize(
    "function",
    [alias_of_a_branch, argument_out_of_a_branch, alias_in_an_iteration, list_out_of_a_branch],
    ids=lambda function: function.__name__,
)
def test_a_write_that_an_alias_out_of_a_branch_would_see_is_refused(function):
    with torch.no_grad(), pytest.raises(ControlFlowError, match=rf"{__file__}:\d+: .*(\.clone|copy)"):
        jit(function, backend="eager")(torch.ones(2))


def test_an_alias_that_nobody_writes_into_is_no_matter():
    def function(x):
        previous = x
        while x.sum() < 10:
            previous = x
            x = x * 2
        if x.max() > 5:
            y = previous
        else:
            y = x
        return y + previous

    compiled = jit(function, backend="eager")
    with torch.no_grad():
        for x in (torch.ones(2), torch.full((2,), 6.0)):
            assert torch.equal(compiled(x), function(x))


def test_a_flag_that_a_branch_sets_and_sets_back_is_refused_with_its_line_and_stays():
    state = Meter()

    class Flagged:
        def __enter__(self):
            state.value = 1

        def __exit__(self, *_):
            state.value = 0

    def function(x):
        if x.sum() > 0:
            with Flagged():
                y = x * 2
        else:
            y = x
        return y

    with pytest.raises(ControlFlowError, match=r"test_speculation\.py:\d+.*with Flagged"):
        jit(function, backend="eager")(torch.ones(2))
    assert state.value == 0


def test_containers_keep_their_class():
    def function(x):
        ordered = collections.OrderedDict(a=x)
        if x.sum() > 0:
            ordered = collections.OrderedDict(a=x * 2)
        return ordered

    got = jit(function, backend="eager")(torch.ones(2))
    assert type(got) is collections.OrderedDict
    assert torch.equal(got["a"], torch.full((2,), 2.0))


# ---- what is private in torch: each name, and what is lost without it


@pytest.mark.parametrize(
    ("find", "lost"),
    [
        (lambda: speculation._hop_name_to_variable_class["cond"], "every tensor condition of ds.jit"),
        (lambda: speculation.TorchHigherOrderOperatorVariable.call_function, "every tensor condition of ds.jit"),
        (lambda: torch._dynamo.output_graph.OutputGraph.subtracer, "every tensor condition of ds.jit"),
        (lambda: torch._dynamo.output_graph.SubgraphTracer.has_input_mutation, "refusing writes in branches"),
        (lambda: torch._dynamo.side_effects.SideEffects.defer_side_effect_checks, "flags that a branch sets back"),
        (lambda: torch._dynamo.variables.base.VariableTracker.visit, "refusing writes that views would see"),
        (lambda: speculation.add_call_function, "branches whose shapes are symbols"),
        (lambda: torch._higher_order_ops.utils.setup_compilation_env, "exporting a function of ds.jit"),
    ],
)
def test_the_tracer_still_has_what_branches_need(find, lost):
    assert callable(find()), lost
    assert "description" in inspect.signature(torch._dynamo.output_graph.OutputGraph.subtracer).parameters, lost
