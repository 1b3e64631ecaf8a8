# ruff: noqa: SIM108, RET503 - the statements are the subject
"""`jit` as a user meets it: what it takes and refuses, errors with their places, breaks, explanations, modules."""

import copy
import functools
import inspect
import json
import math
import pickle
import re
import sys
import traceback
import warnings

import pytest
import torch
import torch.nn.modules.module as hooks
from torch import nn

import deepseek as ds
from deepseek.compiler.jit.decorator import ControlFlowError, GraphBreakWarning
from deepseek.core.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # of inductor about torch

HERE = __file__


@pytest.fixture(autouse=True)
def fresh_tracer():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return first + next(index for index, line in enumerate(lines) if text in line)


# ---- what it is given


def test_a_lambda_is_refused():
    with pytest.raises(ConfigError, match=r"lambda.*written with def"):
        ds.jit(lambda x: x)


@pytest.mark.parametrize("function", [len, torch.relu, torch.add])
def test_what_has_no_python_source_is_refused(function):
    with pytest.raises(ConfigError, match="without Python source"):
        ds.jit(function)


def test_generators_and_coroutines_are_refused():
    def generator(x):
        yield x

    async def coroutine(x):
        return x

    async def stream(x):
        yield x

    for function, word in ((generator, "generator"), (coroutine, "asynchronous"), (stream, "asynchronous")):
        with pytest.raises(ConfigError, match=word):
            ds.jit(function)


def test_classes_without_forward_are_refused():
    class Empty(nn.Module):
        pass

    class Plain:
        def forward(self, x):
            return x

    with pytest.raises(ConfigError, match=r"Empty has no forward"):
        ds.jit(Empty)
    with pytest.raises(ConfigError, match=r"Empty has no forward"):
        ds.jit(Empty())
    with pytest.raises(ConfigError, match=r"class .*Plain"):
        ds.jit(Plain)


def test_what_is_compiled_already_comes_back():
    @ds.jit(backend="eager")
    def f(x):
        return x

    assert ds.jit(f) is f


def test_name_docstring_and_signature_stay():
    @ds.jit(backend="eager")
    def f(x, *, gain: float = 2.0):
        """Says something."""
        return x * gain

    assert (f.__name__, f.__doc__) == ("f", "Says something.")
    assert list(inspect.signature(f).parameters) == ["x", "gain"]
    assert torch.equal(f(torch.ones(2), gain=3.0), torch.full((2,), 3.0))


# ---- errors


def side_effect(x, seen):
    y = x * 2
    if x.sum() > 0:
        seen.append(y)
    return y


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        if x.sum() > 0:
            self.count += 1
        return x


def in_place_on_an_argument(x):
    if x.sum() > 0:
        x += 1
    return x * 2


def in_place_method(x):
    if x.sum() > 0:
        x.add_(1)
    return x * 2


def other_shape(x):
    if x.sum() > 0:
        y = x[:2]
    else:
        y = x
    return y


def number_for_a_vector(x):
    y = 0.0
    if x.sum() > 0:
        y = x
    return y


def one_side_only(x):
    if x.sum() > 0:
        y = x
    return y


def other_structure(x):
    if x.sum() > 0:
        return x, x
    return x


def none_or_tensor(x):
    if x.sum() > 0:
        return x


def other_functions(x):
    act = torch.relu if x.sum() > 0 else torch.tanh
    return act(x)


def ambiguous(x):
    if x > 0:
        return x
    return -x


def returns_in_try(x):
    try:
        if x.sum() > 0:
            return x
    except ValueError:
        return -x
    return x * 2


def comprehension_condition(x):
    return sum([row for row in x if row.sum() > 0])


def grows_a_list(x):
    found = []
    while x.sum() < 10:
        x = x * 2
        found.append(x)
    return x, found


def changing_shape(x):
    while x.sum() < 10:
        x = torch.cat([x, x])
    return x


def recursion(x):
    if x.sum() > 10:
        return x
    return recursion(x * 2)


def check_inside(x):
    if x.sum() > 0:
        assert x.max() < 5
        return x
    return -x


def indexes_a_list(x):
    parts = [torch.relu, torch.tanh]
    k = 0
    while x.sum() < 10:
        x = parts[k % 2](x) + 1
        k += 1
    return x


GLOBAL = 0


def assigns_a_global(x):
    global GLOBAL
    if x.sum() > 0:
        GLOBAL = 1
    return x


REFUSED = [
    (side_effect, "seen.append", "changes something outside", (torch.ones(3), [])),
    (in_place_on_an_argument, "x += 1", "changes something outside", (torch.ones(3),)),
    (in_place_method, "x.add_(1)", "changes something outside", (torch.ones(3),)),
    (assigns_a_global, "GLOBAL = 1", "changes something outside", (torch.ones(3),)),
    (
        other_shape,
        "if x.sum()",
        r"y is a tensor of shape \[2\] and torch.float32 on one side .* \[3\]",
        (torch.ones(3),),
    ),
    (number_for_a_vector, "if x.sum()", r"torch.zeros_like", (torch.ones(3),)),
    (one_side_only, "if x.sum()", "give y a value before the if", (torch.ones(3),)),
    (other_structure, "if x.sum()", "the result is a tuple of 2", (torch.ones(3),)),
    (none_or_tensor, "if x.sum()", "and None on the other", (torch.ones(3),)),
    (other_functions, "act =", "the result is a .* on one side", (torch.ones(3),)),
    (ambiguous, "if x > 0", "ambiguous; reduce it to one element", (torch.ones(3),)),
    (returns_in_try, "if x.sum()", "try", (torch.ones(3),)),
    (comprehension_condition, "return sum", "write it as a loop", (torch.ones(3, 2),)),
    (grows_a_list, "while", "found is a list of 0 .* a list of 1", (torch.ones(3),)),
    (changing_shape, "while", r"x is a tensor of shape \[3\].*\[6\]", (torch.ones(3),)),
    (recursion, "if x.sum()", "write the recursion as a while loop", (torch.ones(3),)),
    (check_inside, "assert", "make the check before the condition", (torch.ones(3),)),
]


@pytest.mark.parametrize(
    ("function", "text", "words", "arguments"), REFUSED, ids=lambda each: getattr(each, "__name__", "")
)
def test_what_no_graph_can_hold_is_an_error_with_file_line_and_hint(function, text, words, arguments):
    compiled = ds.jit(function, backend="eager")
    with pytest.raises(ControlFlowError, match=words) as caught:
        compiled(*arguments)
    assert f"{HERE}:{line_of(function, text)}: " in str(caught.value)


def test_a_module_that_counts_in_a_branch_is_refused_or_broken():
    with pytest.raises(ControlFlowError, match=r"test_decorator.py:\d+: this changes something outside"):
        ds.jit(Counter(), backend="eager")(torch.ones(2))
    compiled = ds.jit(Counter(), backend="eager", fullgraph=False)
    with pytest.warns(GraphBreakWarning, match=r"one graph becomes two: .*test_decorator.py:\d+: this changes"):
        compiled(torch.ones(2))
    compiled(-torch.ones(2))
    compiled(torch.ones(2))
    assert compiled.count == 2


BROKEN = [
    each for each in REFUSED if each[0] not in (one_side_only, ambiguous, in_place_on_an_argument, in_place_method)
]


@pytest.mark.parametrize(
    ("function", "text", "words", "arguments"), BROKEN, ids=lambda each: getattr(each, "__name__", "")
)
def test_with_graph_breaks_allowed_the_result_is_that_of_python(function, text, words, arguments):
    compiled = ds.jit(function, backend="eager", fullgraph=False)
    with pytest.warns(GraphBreakWarning, match="one graph becomes two"):
        got = compiled(*copy.deepcopy(arguments))
    torch.testing.assert_close(got, function(*copy.deepcopy(arguments)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = (
            compiled(*[-each if isinstance(each, torch.Tensor) else each for each in arguments])
            if function
            not in (
                grows_a_list,
                changing_shape,
                recursion,
            )
            else None
        )
    if again is not None:
        want = function(*[-each if isinstance(each, torch.Tensor) else each for each in arguments])
        torch.testing.assert_close(again, want)


def test_a_check_fails_when_the_graph_runs():
    @ds.jit(backend="eager")
    def f(x):
        assert x.sum() > 0, "must be positive"
        if x.max() > 3:
            raise ValueError("too large")
        return x * 2

    assert torch.equal(f(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(RuntimeError, match=r"assertion failed at .*test_decorator.py"):
        f(-torch.ones(2))
    with pytest.raises(RuntimeError, match=r"the error at .*test_decorator.py:\d+ was raised"):
        f(torch.ones(2) * 9)


def test_python_conditions_run_only_the_branch_that_is_taken():
    seen = []

    @ds.jit(backend="eager")
    def f(x, mode):
        if mode == "left":
            return x + 1
        return x.no_such_method()

    assert torch.equal(f(torch.ones(2), "left"), torch.full((2,), 2.0))
    assert seen == []


def test_a_variable_without_value_is_an_unbound_local():
    @ds.jit(backend="eager")
    def f(x, flag):
        if flag:
            y = x
        return y

    assert torch.equal(f(torch.ones(1), True), torch.ones(1))
    with pytest.raises((UnboundLocalError, ControlFlowError), match=r"y|raise"):
        f(torch.ones(1), False)


def test_a_variable_of_a_loop_without_iterations_is_noticed_when_it_runs():
    @ds.jit(backend="eager")
    def f(x):
        while x.sum() < 10:
            x = x * 2
            last = x + 1
        return last

    assert torch.equal(f(torch.ones(2)), torch.full((2,), 9.0))
    with pytest.raises(RuntimeError, match=r"last has no value: the loop at .*test_decorator.py:\d+ made no iteration"):
        f(torch.ones(2) * 20)


def test_tracebacks_show_the_users_own_lines():
    def f(x):
        if x.dim() == 1:
            y = x + 1
            return y.reshape(7)
        return x

    from deepseek.compiler.jit.rewriting.counterparts import rewrite

    with pytest.raises(RuntimeError) as caught:
        rewrite(f)(torch.ones(3))
    frames = traceback.extract_tb(caught.value.__traceback__)
    own = [frame for frame in frames if frame.filename == HERE and frame.lineno == line_of(f, "reshape(7)")]
    assert own
    assert own[0].line == "return y.reshape(7)"


# ---- closures, methods, modules


def test_cells_are_shared_and_alive():
    gain = torch.ones(1)
    calls = 0

    def f(x, count):
        nonlocal calls
        if count:
            calls += 1
        if x.sum() > 0:
            return x * gain
        return x

    compiled = ds.jit(f, backend="eager")
    assert torch.equal(compiled(torch.ones(1), True), torch.ones(1))
    gain = torch.full((1,), 5.0)
    assert torch.equal(compiled(torch.ones(1), True), torch.full((1,), 5.0))
    assert calls == 2


class Scaled(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by
        self.weight = nn.Parameter(torch.ones(2))

    @ds.jit(backend="eager")
    def forward(self, x):
        if x.sum() > 0:
            return x * self.by * self.weight
        return x


@ds.jit(backend="eager")
class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Scaled(2)

    def forward(self, x):
        y = self.inner(x)
        return y if y.mean() > 1 else y - 1


def test_a_method_knows_its_instance():
    two, three = Scaled(2), Scaled(3)
    assert torch.equal(two(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.equal(three(torch.ones(2)), torch.full((2,), 3.0))
    assert torch.equal(two(-torch.ones(2)), -torch.ones(2))
    assert two.forward.explain(torch.ones(2)).num_graphs == 1


def test_a_class_is_compiled_with_what_it_holds():
    whole = Whole()
    assert isinstance(whole, Whole)
    assert torch.equal(whole(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.equal(whole(-torch.ones(2)), torch.full((2,), -2.0))


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.norm(self.linear(x))
        return y.relu() if y.sum() > 0 else y * 0.5


def test_a_compiled_module_shares_parameters_and_leaves_the_original_alone():
    module = Chooses()
    compiled = ds.jit(module, backend="eager")
    assert type(compiled) is Chooses
    assert compiled is not module
    assert list(compiled.state_dict()) == list(module.state_dict())
    assert compiled.linear.weight is module.linear.weight
    assert "forward" not in vars(module)
    compiled(torch.randn(4, 3)).sum().backward()
    assert module.linear.weight.grad is not None


def test_a_compiled_module_can_be_copied_and_pickled():
    compiled = ds.jit(Chooses().eval(), backend="eager")
    x = torch.randn(4, 3)
    copied, pickled = copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))
    with torch.no_grad():
        compiled.linear.weight.mul_(3)
        assert not torch.equal(copied(x), compiled(x))
        torch.testing.assert_close(copied(x), pickled(x))


def test_the_mode_of_a_module_is_a_guard():
    module = Chooses()
    compiled = ds.jit(module, backend="eager")
    x = torch.randn(4, 3)
    compiled.train()(x)
    compiled.eval()
    torch.testing.assert_close(compiled(x), module.eval()(x))


@pytest.mark.parametrize("change", ["load", "step"])
def test_optimized_inference_notices_new_weights(change):
    module = Chooses().eval()
    compiled = ds.jit(module, backend="eager")
    x = torch.randn(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
        if change == "load":
            module.load_state_dict(Chooses().state_dict())
        else:
            module.norm.running_mean.add_(0.5)
        torch.testing.assert_close(compiled(x), module(x))


def test_inference_that_writes_into_buffers_writes_once_per_call():
    module = Chooses().train()
    compiled = ds.jit(module, backend="eager")
    twin = copy.deepcopy(module)
    x = torch.randn(4, 3)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), twin(x))
    assert module.norm.num_batches_tracked == 3
    torch.testing.assert_close(module.norm.running_mean, twin.norm.running_mean)


class Doubling(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.linear = Doubling(), nn.Linear(2, 2)
        self.settings = {}

    def forward(self, x):
        y = self.linear(self.inner(x))
        if hasattr(self, "extra"):
            y = y + 10
        return y + 100 if "shift" in self.settings else y


@pytest.mark.parametrize("child", ["inner", "linear"])
def test_hooks_that_come_and_go_later_are_noticed(child):
    module = Outer()
    compiled = ds.jit(module, backend="eager")
    x = torch.ones(2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
        added = getattr(module, child).register_forward_hook(lambda _, args, output: output * 0 + 3)
        torch.testing.assert_close(compiled(x), module(x))
        added.remove()
        before = getattr(module, child).register_forward_pre_hook(lambda _, args: (args[0] * 5,))
        torch.testing.assert_close(compiled(x), module(x))
        before.remove()
        torch.testing.assert_close(compiled(x), module(x))


GLOBAL_HOOKS = {
    "forward": (hooks.register_module_forward_hook, lambda _, args, output: output * 3),
    "forward_pre": (hooks.register_module_forward_pre_hook, lambda _, args: (args[0] * 3,)),
    "backward": (hooks.register_module_full_backward_hook, lambda _, inputs, outputs: (inputs[0] * 3,)),
    "backward_pre": (hooks.register_module_full_backward_pre_hook, lambda _, outputs: (outputs[0] * 3,)),
}


def value_and_gradient(function):
    x = torch.ones(2, requires_grad=True)
    result = function(x)
    return result.detach(), torch.autograd.grad(result.sum(), x)[0]


@pytest.mark.filterwarnings("ignore::deepseek.compiler.jit.tracing.sites.GraphBreakWarning")
@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_hooks_on_all_modules_that_come_later_are_refused_or_run_by_python(kind):
    module = Outer()
    compiled, breaking = (ds.jit(module, backend="eager", fullgraph=fullgraph) for fullgraph in (True, False))
    before = value_and_gradient(module)
    torch.testing.assert_close(value_and_gradient(compiled), before)
    torch.testing.assert_close(value_and_gradient(breaking), before)
    register, hook = GLOBAL_HOOKS[kind]
    added = register(hook)
    try:
        with pytest.raises(ControlFlowError, match=r"hooks on all modules are registered .* fullgraph=False"):
            compiled(torch.ones(2))
        with pytest.raises(ControlFlowError, match="hooks on all modules"):
            compiled.explain(torch.ones(2))
        expected = value_and_gradient(module)
        assert not all(map(torch.equal, expected, before))
        torch.testing.assert_close(value_and_gradient(breaking), expected)
    finally:
        added.remove()
    torch.testing.assert_close(value_and_gradient(compiled), before)
    torch.testing.assert_close(value_and_gradient(breaking), before)


@pytest.mark.filterwarnings("ignore::deepseek.compiler.jit.tracing.sites.GraphBreakWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of the tracer
@pytest.mark.parametrize("name", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_a_module_that_come_later_are_refused_or_run_by_python(name):
    module = Outer()
    compiled, breaking = (ds.jit(module, backend="eager", fullgraph=fullgraph) for fullgraph in (True, False))
    before = value_and_gradient(module)
    torch.testing.assert_close(value_and_gradient(compiled), before)
    getattr(module.inner, name)(lambda _, *gradients: (gradients[0][0] * 3,))
    expected = value_and_gradient(module)
    assert not torch.equal(expected[1], before[1])
    with pytest.raises(ControlFlowError, match="hooks"):
        compiled(torch.ones(2, requires_grad=True))
    torch.testing.assert_close(value_and_gradient(breaking), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(torch.ones(2)), module(torch.ones(2)))


def test_attributes_and_keys_that_appear_later_are_noticed():
    module = Outer()
    compiled = ds.jit(module, backend="eager")
    x = torch.ones(2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
        module.settings["shift"] = True
        torch.testing.assert_close(compiled(x), module(x))
        module.extra = compiled.extra = True
        torch.testing.assert_close(compiled(x), module(x))


def index_by_a_counter(x):
    weights, count = [1.0, 10.0, 100.0], 0
    while x.sum() > count:
        count += 1
    return x * weights[count]


def root_of_a_counter(x):
    count = 0
    while x.sum() > count:
        count += 1
    return x * math.sqrt(count)


def text_of_a_counter(x):
    count = 0
    while x.sum() > count:
        count += 1
    return x * len(f"{count}{isinstance(count, int)}")


@pytest.mark.parametrize(
    "function",
    [index_by_a_counter, root_of_a_counter, text_of_a_counter],
    ids=lambda function: function.__name__,
)
def test_python_that_wants_a_number_is_refused_with_its_line_or_breaks_the_graph(function):
    x = torch.tensor([1.5])
    with torch.no_grad():
        with pytest.raises(ControlFlowError, match=rf"{HERE}:{line_of(function, 'return')}: "):
            ds.jit(function, backend="eager")(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GraphBreakWarning)
            assert torch.equal(ds.jit(function, backend="eager", fullgraph=False)(x), function(x))


def count(x):
    n = 1
    if x.sum() > 0:
        n = 3
    return n


def searches_to_the_length(x):
    i = 0
    while i < len(x):
        if x[i] > 2:
            return x[i] + i
        i += 1
    return x.sum() * i


def chooses_by_the_length(x):
    n = count(x)
    return x * n if len(x) > n else x - min(n, x.size(0))


def finds_in_known_items(x):
    n = count(x)
    first = x * 2 if n in range(9, 0, -2) else x
    second = first + 1 if n not in {1, 5} else first
    third = second * 3 if float(x[0]) in [1.0, 2.0] else second
    return third - 1 if n in range(2) else third


def sorts_numbers(x):
    ordered = sorted([count(x), 2, True], reverse=True)
    numbers = [float(x[0]), 0.5, float(x[1])]
    numbers.sort()
    return x * ordered[0] + ordered[1] * 10 + numbers[1] + max([count(x), 2]) + min([float(x[0]), 2.0])


def asks_for_whole_numbers(x):
    return x * 2 if float(x[0]).is_integer() else x


@functools.lru_cache(maxsize=4)
def double(n):
    return 2 * n


def calls_a_cached_function(x):
    if x.sum() > 0:
        return x * double(3)
    return x


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        searches_to_the_length,
        chooses_by_the_length,
        finds_in_known_items,
        sorts_numbers,
        asks_for_whole_numbers,
    ],
    ids=lambda function: function.__name__,
)
def test_numbers_of_the_graph_are_compared_found_and_sorted_at_every_length(function, fullgraph):
    compiled = ds.jit(function, backend="eager", fullgraph=fullgraph)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraphBreakWarning)
        for length in (4, 3, 2, 5):
            for sign in (1, -1, 0.5):
                x = sign * torch.arange(1.0, length + 1)
                torch.testing.assert_close(torch.as_tensor(compiled(x)), torch.as_tensor(function(x)))


PYTHON_NEEDS_THE_NUMBER = [
    "x[slice(n)].sum()",
    "x * len(range(n))",
    "x * sum(list(range(n)))",
    "x * range(n)[0]",
    "x * sum(i * j for i, j in enumerate(range(n)))",
    "{1: x, 3: -x}[n]",
    "{True: x, False: x * 2}[n > 2]",
    "[x, x * 2, x * 3, x * 4][n]",
    "x * math.trunc(n * 1.5)",
    "x * math.floor(n * 1.5)",
    "x * math.ceil(n * 1.5)",
    "x * pow(n, 3, 5)",
    "x * pow(2, n, 5)",
    "x * len(hex(n))",
    "x * n.bit_length()",
    "x * len(repr(n))",
    "x * complex(n, 1).real",
    "x * sorted([n, 2], key=lambda value: -value)[0]",
]


@pytest.mark.parametrize("expression", PYTHON_NEEDS_THE_NUMBER)
def test_python_that_needs_a_number_breaks_the_graph_and_gives_eagers_result(expression, tmp_path):
    file = tmp_path / "needing.py"
    file.write_text(f"def function(x):\n    n = 3 if x.sum() > 0 else 1\n    return {expression}\n")
    names = {"math": math}
    exec(compile(file.read_text(), str(file), "exec"), names)
    function = names["function"]
    with pytest.raises(ControlFlowError, match=rf"{file}:3: "):
        ds.jit(function, backend="eager")(torch.ones(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraphBreakWarning)
        compiled = ds.jit(function, backend="eager", fullgraph=False)
        for x in (torch.arange(4.0) + 1, -torch.arange(4.0) - 1):
            torch.testing.assert_close(compiled(x), function(x))


def test_a_function_in_a_cache_is_refused_with_the_way_out():
    with pytest.raises(ControlFlowError, match=r"functools.lru_cache.*__wrapped__"):
        ds.jit(calls_a_cached_function, backend="eager")(torch.ones(2))


def put(found, value):
    found.append(value)


def lets_a_helper_write(x):
    found = []
    if x.sum() > 0:
        put(found, x)
    else:
        put(found, -x)
    return found[0]


def test_a_helper_that_writes_on_the_callers_list_is_refused_with_the_way_out_or_breaks_the_graph():
    with pytest.raises(ControlFlowError, match=r"calls this one holds found, too; copy it before with found = list\("):
        ds.jit(lets_a_helper_write, backend="eager")(torch.ones(2))
    with pytest.warns(GraphBreakWarning):
        got = ds.jit(lets_a_helper_write, backend="eager", fullgraph=False)(-torch.ones(2))
    assert torch.equal(got, torch.ones(2))


def writes_into_a_selected_row(m, mask):
    m = m.clone()
    m[mask][0] = 7.0
    return m


def test_a_row_of_an_empty_selection_is_an_index_error_as_in_python():
    compiled = ds.jit(writes_into_a_selected_row, backend="eager")
    some, none = torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.bool)
    assert torch.equal(compiled(torch.eye(3), some), torch.eye(3))
    for function in (writes_into_a_selected_row, compiled):
        with pytest.raises(IndexError, match="index"):
            function(torch.eye(3), none)


class Box:
    def __init__(self, value):
        self.value = value

    def __lt__(self, other):
        return self.value < other


def compares_an_object_with_a_length(x):
    return x * 2 if Box(3) < len(x) else x


def test_where_the_tracer_itself_fails_python_runs_the_function_if_that_is_allowed():
    compiled = ds.jit(compares_an_object_with_a_length, backend="eager", fullgraph=False)
    assert torch.equal(compiled(torch.ones(4)), torch.full((4,), 2.0))
    with pytest.warns(GraphBreakWarning, match="no graph runs: .*test_decorator.py"):
        assert torch.equal(compiled(torch.ones(3)), torch.ones(3))
    torch._dynamo.reset()
    refusing = ds.jit(compares_an_object_with_a_length, backend="eager")
    refusing(torch.ones(4))
    with pytest.raises(ControlFlowError, match=r"test_decorator.py"):
        refusing(torch.ones(3))


# ---- random numbers


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dropout_in_a_branch_has_the_gradient_of_the_mask_that_ran(backend):
    @ds.jit(backend=backend)
    def f(x):
        if x.sum() > 0:
            return nn.functional.dropout(x, 0.5)
        return x

    x = torch.ones(1000, requires_grad=True)
    y = f(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())
    assert 0.4 < (y == 0).float().mean() < 0.6


def test_dropout_in_a_loop_draws_anew_each_iteration_and_obeys_the_seed():
    @ds.jit(backend="aot_eager")
    def f(x):
        k = torch.zeros(())
        y = torch.ones_like(x)
        while k < x.shape[0] / 500:
            y = y * nn.functional.dropout(x, 0.5)
            k = k + 1
        return y

    x = torch.ones(1000, requires_grad=True)
    torch.manual_seed(1)
    first = f(x)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient, first.detach() * 2)
    assert 0.65 < (first == 0).float().mean() < 0.85
    torch.manual_seed(1)
    assert torch.equal(f(x), first)
    assert not torch.equal(f(x), first)


def test_random_operators_without_a_seeded_form_are_refused_in_training():
    @ds.jit(backend="eager")
    def f(x):
        if x.sum() > 0:
            return x * torch.randint(0, 5, (3,))
        return x

    with pytest.raises(ControlFlowError, match="randint draws random numbers inside a tensor condition"):
        f(torch.ones(3, requires_grad=True))
    with torch.no_grad():
        assert f(torch.ones(3)).shape == (3,)


def test_probing_leaves_no_random_numbers_behind():
    @ds.jit(backend="eager")
    def f(x):
        if x.sum() > 0:
            return torch.rand_like(x)
        return x

    with torch.no_grad():
        torch.manual_seed(0)
        got = f(torch.ones(3))
        torch.manual_seed(0)
        assert torch.equal(got, torch.rand(3))


# ---- explanations


def test_an_explanation_names_what_became_of_the_code():
    compiled = ds.jit(Chooses().eval(), backend="eager")
    with torch.no_grad():
        explanation = compiled.explain(torch.randn(4, 3))
    (place,) = explanation.rewritten
    assert (place.file, place.line) == (HERE, line_of(Chooses, "y.relu()"))
    assert explanation.num_graphs == 1
    assert explanation.breaks == ()
    assert any("batch norm" in fusion for fusion in explanation.fusions)
    assert 0 < explanation.peak_bytes_after <= explanation.peak_bytes_before
    assert json.loads(json.dumps(explanation.to_dict()))["num_graphs"] == 1
    text = str(explanation)
    assert "1 graph" in text
    assert re.search(r"test_decorator.py:\d+\s+a conditional expression", text)
    assert "peak memory" in text


def test_an_explanation_runs_nothing():
    module = Chooses().train()
    ds.jit(module, backend="eager").explain(torch.randn(4, 3))
    assert module.norm.num_batches_tracked == 0


def test_an_explanation_tells_breaks():
    compiled = ds.jit(Counter(), backend="eager", fullgraph=False)
    with pytest.warns(GraphBreakWarning):
        explanation = compiled.explain(torch.ones(2))
    assert explanation.num_graphs > 1
    (place,) = explanation.breaks
    assert place.line == line_of(Counter, "self.count += 1")


def test_breaks_that_the_tracer_makes_are_told_with_their_line(capsys):
    def f(x):
        y = x + 1
        print("between")
        return y * 2

    with pytest.raises(ControlFlowError, match=rf"test_decorator.py:{line_of(f, 'print')}: .*fullgraph=False"):
        ds.jit(f, backend="eager")(torch.ones(2))
    compiled = ds.jit(f, backend="eager", fullgraph=False)
    with pytest.warns(GraphBreakWarning, match=rf"test_decorator.py:{line_of(f, 'print')}: .*print"):
        compiled(torch.ones(2))
    assert capsys.readouterr().out == "between\n"
    (told,) = compiled.trace.breaks
    assert told[0].line == line_of(f, "print")


# ---- shapes and backends


def test_other_shapes_are_traced_anew_and_symbolic_ones_are_not():
    def f(x):
        if x.sum() > 0:
            return x.mean(0)
        return x.max(0).values

    for dynamic in (None, True):
        compiled = ds.jit(f, backend="eager", dynamic=dynamic)
        for size in (3, 5, 8):
            for sign in (1, -1):
                x = torch.arange(1.0, 1 + size)[:, None] * sign
                torch.testing.assert_close(compiled(x), f(x))


def test_python_numbers_that_change_are_those_of_the_call():
    @ds.jit(backend="eager")
    def scale(x, factor):
        if x.sum() > 0:
            return x * factor
        return x - factor

    for index in range(12):
        for sign in (1.0, -1.0):
            x = torch.full((3,), sign)
            assert torch.equal(scale(x, 0.5 + index), x * (0.5 + index) if sign > 0 else x - (0.5 + index))


def test_too_many_kinds_of_arguments_are_an_error_that_names_what_changes(monkeypatch):
    @ds.jit(backend="eager")
    def scale(x, factor):
        return x * factor if x.sum() > 0 else x

    monkeypatch.setattr("deepseek.compiler.jit.decorator.MAX_KINDS", 9)
    with pytest.raises(ConfigError, match=r"for 9 kinds .*\(factor == 8.5 does not hold\); give it numbers"):
        for index in range(12):
            scale(torch.ones(3), 0.5 + index)


def test_under_a_memory_budget_gradients_are_the_same():
    def f(x):
        for _ in range(4):
            x = (x.sin() * 3).exp().cos()
        return x if x.sum() > 0 else -x

    found = []
    for budget in (None, 0.1):
        x = torch.linspace(-1, 1, 9, requires_grad=True)
        y = ds.jit(f, backend="aot_eager", memory_budget=budget)(x)
        found.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*found)
    with pytest.raises(Exception, match="works with inductor, aot_eager"):
        ds.jit(f, backend="eager", memory_budget=0.5)(x)
    with pytest.raises(ConfigError, match="memory_budget"):
        ds.jit(f, memory_budget=3.0)


@pytest.mark.slow
def test_inductor_generates_code_for_branches_and_loops_in_training_and_inference():
    def f(x):
        k = 0
        while x.norm() < 20:
            x = x * 1.5 + 0.1
            k += 1
        if k > 3:
            return x.tanh()
        return x * k

    compiled = ds.jit(f)
    for start in (0.1, 5.0, 30.0):
        x, twin = (torch.full((5,), start, requires_grad=True) for _ in range(2))
        got, want = compiled(x), f(twin)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), twin))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), f(x))


@pytest.mark.slow
def test_inductor_generates_code_for_an_optimized_module():
    module = Chooses().eval()
    compiled = ds.jit(module)
    with torch.no_grad():
        for x in (torch.randn(4, 3), torch.randn(4, 3) * 50, -torch.ones(4, 3) * 20):
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)


def test_the_package_import_stays_light():
    assert "jit" in dir(ds)
    assert sys.modules["deepseek.compiler.jit.decorator"].jit is ds.jit


# ---- graphs that break: what ran before the break ran once


class State:
    def __init__(self):
        self.log, self.count, self.memory = [], 0, torch.zeros(2)


def appends(x, state):
    state.log.append("before")
    if x.sum() > 0:
        state.log.append("inside")
    state.log.append("between")
    if x.sum() > 1:
        state.log.append("inside again")
    state.log.append("after")
    return x * len(state.log)


def counts(x, state):
    state.count += 1
    if x.sum() > 0:
        print("positive")
    state.count += 10
    if x.sum() > 0:
        state.count += 100
    return x * state.count


def writes_memory(x, state):
    state.memory.add_(1)
    if x.sum() > 0:
        state.log.append(1)
    state.memory.mul_(3)
    if x.sum() > 0:
        state.memory.add_(5)
    return x * state.memory


def draws(x, state):
    drawn = torch.rand(2)
    if x.sum() > 0:
        state.log.append(1)
    return x + drawn + torch.rand(2)


def writes_an_alias(x, state):
    y = x * 1
    state.count += 1
    z = y if x.sum() > 0 else y * 2
    print("cut")
    z += 1
    return y * state.count


@pytest.mark.filterwarnings("ignore::deepseek.compiler.jit.tracing.sites.GraphBreakWarning")
@pytest.mark.parametrize("function", [appends, counts, writes_memory, draws, writes_an_alias])
def test_what_ran_before_a_break_is_not_run_again(function, capsys):
    compiled, state, plain_state = ds.jit(function, backend="eager", fullgraph=False), State(), State()
    for x in (torch.ones(2), -torch.ones(2), torch.full((2,), 0.25)):
        torch.manual_seed(0)
        got = compiled(x, state)
        printed = capsys.readouterr().out
        torch.manual_seed(0)
        assert torch.equal(got, function(x, plain_state))
        assert printed == capsys.readouterr().out
        assert (state.log, state.count) == (plain_state.log, plain_state.count)
        assert torch.equal(state.memory, plain_state.memory)


def test_a_break_that_the_tracer_is_told_of_is_said_once_and_explained():
    compiled = ds.jit(appends, backend="eager", fullgraph=False)
    with pytest.warns(GraphBreakWarning) as told:
        compiled(torch.ones(2), State())
    assert len(told) == 2
    assert all("test_decorator.py" in warning.filename for warning in told)
    assert len(compiled.explain(torch.ones(2), State()).breaks) == 2
