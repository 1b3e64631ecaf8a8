"""What is called instead of the user's functions gives what they give; libraries' functions stay as they are."""

import functools
import math

import pytest
import torch
from torch import nn

from deepseek.compiler.jit.decorator import jit
from deepseek.compiler.jit.rewriting.counterparts import ENTRY
from deepseek.compiler.jit.tracing.calls import Counterpart, call_with_hooks, find_counterpart, find_forward, is_library


def choose(x, by=2.0, *, shift=0.0):
    if x.sum() > 0:
        return x * by + shift
    return x - shift


class Base:
    def scale(self, x):
        return x * 2 if x.sum() > 0 else x

    @property
    def name(self):
        return "base"


class Middle(Base):
    pass


class Owner(Middle):
    gain = 3.0

    def scale(self, x):
        return x * self.gain if x.sum() > 0 else -x

    @property
    def name(self):
        return "owner"

    @staticmethod
    def fixed(x):
        return x + 1 if x.sum() > 0 else x

    @classmethod
    def of_class(cls, x):
        return x * cls.gain if x.sum() > 0 else x


class Chooses(nn.Module):
    def forward(self, x, *, gain=1.0):
        return x * 2 * gain if x.sum() > 0 else x


INPUTS = (torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0]))
CALLED = {
    "function": choose,
    "partial": functools.partial(choose, by=3.0, shift=1.0),
    "partial of a method": functools.partial(Owner().scale),
    "bound method": Owner().scale,
    "static method": Owner.fixed,
    "class method": Owner.of_class,
    "module": Chooses(),
    "module in a container": nn.Sequential(nn.ReLU(), Chooses()),
    "compiled": jit(choose, backend="eager"),
    "library": torch.relu,
}


@pytest.mark.parametrize("name", CALLED)
def test_what_is_called_instead_gives_the_same(name):
    function = CALLED[name]
    instead = ENTRY.call(function)
    for x in INPUTS:
        assert torch.equal(instead(x), function(x))


@pytest.mark.parametrize("name", [name for name in CALLED if name not in ("library", "partial", "partial of a method")])
def test_the_user_s_own_code_is_replaced(name):
    assert ENTRY.call(CALLED[name]) is not CALLED[name]


@pytest.mark.parametrize("value", [torch.relu, math.sqrt, len, nn.ReLU(), nn.Sequential(nn.Linear(1, 1)), Owner, 3])
def test_what_a_library_has_stays_as_it_is(value):
    assert ENTRY.call(value) is value


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("torch.nn.functional", True),
        ("torchvision.ops", True),
        ("torch_own", False),
        ("__main__", False),
        ("deepseek.compiler.jit", True),
        ("deepseek.models", False),
        (None, True),
        ("mathematics", False),
    ],
)
def test_which_modules_are_libraries(name, is_one):
    assert is_library(name) is is_one


def test_the_method_above_is_the_one_that_super_finds():
    class Last(Owner):
        pass

    last = Last()
    for cls in (Last, Owner, Middle):
        want = super(cls, last)
        for x in INPUTS:
            assert torch.equal(ENTRY.parent(cls, last, "scale")(x), want.scale(x))
        assert ENTRY.parent(cls, last, "name") == want.name
    with pytest.raises(AttributeError, match="nothing_of_it"):
        ENTRY.parent(Last, last, "nothing_of_it")


def test_a_counterpart_is_made_once_and_not_taken_from_a_wrapped_function():
    made = []

    def maker(function):
        made.append(function)
        function.__ds__ = Counterpart(function, lambda *args: args)
        return True

    def f(x):
        return x

    first = find_counterpart(f, maker)
    assert find_counterpart(f, maker) is first
    assert made == [f]

    @functools.wraps(f)  # copies the attribute with the others
    def wrapper(x):
        return f(x) + 1

    assert find_counterpart(wrapper, maker) is not first
    assert made == [f, wrapper]
    assert find_counterpart(len, lambda function: False) is None


def test_a_function_that_is_rewritten_already_has_no_counterpart():
    def f(x):
        return x

    def unreachable(function):
        raise AssertionError(function)

    assert ENTRY.mark(f) is f
    assert find_counterpart(f, unreachable) is None


def test_the_forward_of_a_module_is_the_function_that_runs():
    assert find_forward(Chooses()) is Chooses.forward

    class Compiled(nn.Module):
        @jit(backend="eager")
        def forward(self, x):
            return x

    assert find_forward(Compiled()).__name__ == "forward"
    assert find_forward(Compiled()) is Compiled.forward.function


def test_hooks_see_and_change_what_they_do_in_torch():
    def build():
        seen, module = [], Chooses()
        module.register_forward_pre_hook(lambda _, args: args[0] + 1)
        module.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"gain": 5.0}) if kwargs else None, with_kwargs=True
        )
        module.register_forward_hook(lambda _, args, output: seen.append((args, output)))
        module.register_forward_hook(lambda _, args, kwargs, output: output + len(kwargs), with_kwargs=True)
        return module, seen

    (plain, seen_plain), (module, seen) = build(), build()
    for x in INPUTS:
        for kwargs in ({}, {"gain": 2.0}):
            got = call_with_hooks(module, module.forward, x, **kwargs)
            assert torch.equal(got, plain(x, **kwargs))
            assert torch.equal(ENTRY.call(module)(x, **kwargs), plain(x, **kwargs))
    flat = [(args[0].tolist(), output.tolist()) for args, output in seen]
    flat_plain = [(args[0].tolist(), output.tolist()) for args, output in seen_plain]
    assert flat[::2] == flat_plain[::2]
    assert len(flat) == len(flat_plain) == 8
