# ruff: noqa: SIM108, RET505 - the statements are the subject
"""Functions and modules with control flow on tensors, as people write them, with inputs that take every way through.

`CASES` holds them in order. The first arguments of a case are those it is traced with; the others take its other
branches. Everything is float64, so that forward and gradients can be compared with plain Python at 1e-10.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Case:
    name: str
    make: object  # gives the function, or a module with the same weights every time
    arguments: tuple
    traits: frozenset


CASES = []


def case(*arguments, traits=()):
    """Register a function with the arguments that take its ways."""

    def register(function):
        CASES.append(Case(function.__name__, lambda: function, arguments, frozenset(traits)))
        return function

    return register


def module_case(*arguments, traits=(), **options):
    """Register a module class, built with `options` under a fixed seed."""

    def register(cls):
        def make():
            torch.manual_seed(0)
            return cls(**options).double()

        CASES.append(Case(cls.__name__, make, arguments, frozenset(traits)))
        return cls

    return register


def v(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def n(number):
    return torch.tensor(number)


UP, DOWN = v(0.5, 1.0, 2.0), v(-0.5, -1.0, -2.0)
MIXED = v(-1.5, 0.25, 3.0)
GRID = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)


# ---- if, elif, else


@case((UP,), (DOWN,))
def one_if(x):
    y = x * 2
    if x.sum() > 0:
        y = y + 1
    return y


@case((UP,), (DOWN,))
def if_else_assigns_two(x):
    if x.mean() > 0:
        a, b = x.exp(), x * 3
    else:
        a, b = x.cos(), x - 1
    return a * b


@case((UP,), (UP * 3,), (DOWN,))
def elif_chain(x):
    total = x.sum()
    if total > 5:
        y = x / total
    elif total > 0:
        y = x.sqrt()
    else:
        y = x.square()
    return y


@case((UP,), (DOWN,), (DOWN * 4,))
def early_returns(x):
    if x.mean() > 0:
        return torch.relu(x)
    if x.min() > -3:
        return x * 3
    z = x + 1
    return z.tanh()


@case((UP, MIXED), (DOWN, MIXED), (DOWN, -MIXED), (UP, -MIXED))
def nested_ifs(x, y):
    if x.sum() > 0:
        if y.sum() > 0:
            z = x * y
        else:
            z = x / (1 + y.square())
    else:
        z = x - y
        if y.sum() > 0:
            z = z.sigmoid()
    return z


@case((UP,), (DOWN,))
def return_in_one_branch_only(x):
    if x[0] > 0:
        y = x.log()
        if y.sum() > -10:
            return y
        y = y + 1
    else:
        y = x.exp()
    return y * 2


@case((UP,), (DOWN,))
def constant_branch(x):
    if x.sum() > 0:
        scale = 0.1
    else:
        scale = 2.7
    return x * scale


@case((UP,), (DOWN,))
def tensor_against_number(x):
    loss = 0.0
    if x.sum() > 0:
        loss = x.square().sum()
    return loss + x.mean()


@case((UP,), (DOWN,))
def ints_against_floats(x):
    k = 1
    if x.sum() > 0:
        k = 2.5
    return x * k


@case((UP,), (DOWN,))
def unused_argument_in_a_branch(x):
    return x.square().sum() if x.sum() > 0 else torch.zeros((), dtype=x.dtype)


@case((UP,), (DOWN,))
def returns_its_argument(x):
    if x.sum() > 0:
        return x
    return -x


@case((UP,), (DOWN,))
def views_come_out(x):
    if x.sum() > 0:
        y = x[:2]
    else:
        y = x[1:]
    return y * 2


@case((UP,), (DOWN,))
def returns_a_tuple(x):
    if x.sum() > 0:
        return x * 2, (x.sum(), 1.0)
    return x / 2, (x.mean(), 0.5)


@case((UP,), (DOWN,))
def returns_a_dict(x):
    out = {"logits": x * 2, "aux": x.sum(), "name": "model"}
    if x.sum() < 0:
        out = {"logits": x / 2, "aux": x.mean(), "name": "model"}
    return out


class Moments(NamedTuple):
    mean: torch.Tensor
    spread: torch.Tensor


@case((UP,), (DOWN,))
def returns_a_named_tuple(x):
    if x.sum() > 0:
        found = Moments(x.mean(), x.std())
    else:
        found = Moments(x.median(), x.abs().mean())
    return found.mean + found.spread


@case((UP,), (DOWN,))
def same_none_on_both_sides(x):
    extra = None
    if x.sum() > 0:
        y = x + 1
    else:
        y = x - 1
        extra = None
    return y if extra is None else y + extra


@case((UP,), (DOWN,))
def variable_dead_after_branch(x):
    if x.sum() > 0:
        temporary = x * 2
        y = temporary + 1
    else:
        y = x
    return y


@case((UP, n(1)), (UP, n(0)), (UP, n(-2)))
def int_tensor_condition(x, k):
    if k:
        x = x * k
    return x


# ---- conditions


@case((UP, MIXED), (UP, -MIXED), (DOWN, MIXED), (DOWN, -MIXED))
def and_or_not(x, y):
    if x.sum() > 0 and not y.sum() > 0:
        return x + y
    if x.sum() < 0 or y.sum() < 0:
        return x - y
    return x * y


@case((v(0.5),), (v(1.5),), (v(-0.5),))
def chained_comparison(x):
    if 0 < x.sum() < 1:
        return x * 10
    return x


@case((v(0.5),), (v(1.5),), (v(-0.5),))
def chained_three(x):
    low = -0.1
    return x.square() if low < x.sum() <= 1 != 7 else x.exp()


@case((UP,), (DOWN,), (UP * 10,))
def conditional_expression(x):
    y = x.log1p() if x.min() > -0.4 else x.exp()
    return y * (2 if y.sum() > 3 else 3)


@case((UP,), (DOWN,))
def value_of_or(x):
    flag = (x.sum() > 0) or (x.min() > -1.0)
    return x * 2 if flag else x


@case((UP, True), (DOWN, True), traits={"python"})
def python_and_tensor_conditions(x, double):
    if double and x.sum() > 0:
        return x * 2
    return x


@case((UP,), (DOWN,))
def item_in_a_condition(x):
    if x.mean().item() > 0:
        return x + 1
    return x - 1


@case((UP,), (DOWN,))
def bool_and_float_of_tensors(x):
    scale = float(x.abs().max())
    if bool((x > 0).all()):
        return x / scale
    return x * scale


@case((UP,), (v(1.0, float("nan"), 2.0),))
def nan_guard(x):
    if torch.isnan(x).any():
        x = torch.nan_to_num(x, nan=0.0)
    return x * 2


@case((UP,), (UP * 1e-9,))
def safe_normalize(x):
    length = x.norm()
    if length > 1e-6:
        return x / length
    return x * 0 + 1


@case((UP,), (DOWN,))
def walrus_condition(x):
    if (m := x.mean()) > 0:
        return x - m
    return x + m


# ---- piecewise losses, gates and clipping


@case((v(0.1, 0.2), v(0.0, 0.0)), (v(3.0, 4.0), v(0.0, 0.0)))
def huber(prediction, target, delta=1.0):
    error = (prediction - target).abs().mean()
    if error <= delta:
        return 0.5 * error**2
    return delta * (error - 0.5 * delta)


@case((UP,), (UP * 100,))
def gradient_clipping_inside(x):
    norm = x.square().sum().sqrt()
    if norm > 5.0:
        x = x * (5.0 / norm)
    return x.sum()


@case((UP,), (DOWN,))
def straight_through_gate(x):
    gate = x.mean().sigmoid()
    if gate > 0.5:
        hard = torch.ones_like(gate)
    else:
        hard = torch.zeros_like(gate)
    return x * (hard + gate - gate.detach())


@case((v(0.3, 0.7), v(1.0, 0.0)), (v(0.9, 0.9), v(1.0, 1.0)))
def focal_or_plain(p, y):
    plain = F.binary_cross_entropy(p, y)
    if plain < 0.3:
        weight = (1 - torch.where(y > 0, p, 1 - p)).square()
        return (weight * F.binary_cross_entropy(p, y, reduction="none")).mean()
    return plain


@case((UP, v(0.1)), (UP * 30, v(0.1)))
def loss_scaling(x, scale):
    loss = x.square().sum() * scale.sum()
    if torch.isfinite(loss) and loss < 10:
        scale = scale * 2
    else:
        scale = scale * 0.5
    return loss, scale


@case((UP,), (UP * 20,))
def no_grad_inside(x):
    if x.sum() > 10:
        with torch.no_grad():
            peak = x.max()
        y = x / peak
    else:
        y = x * 2
    return y


@case((GRID, n(3)), (GRID, n(20)))
def warmup(x, step):
    rate = 1.0
    if step < 10:
        rate = (step + 1) / 10
    return x * rate


# ---- while


@case((UP,), (UP * 100,), (UP * 0.01,))
def halve_until_small(x):
    while x.norm() > 1:
        x = x / 2
    return x


@case((UP,), (UP * 100,))
def while_counts(x):
    steps = 0
    while x.norm() < 20:
        x = x * 1.5
        steps += 1
    return x, steps


@case((v(2.0),), (v(9.0),), (v(0.25),))
def newton_square_root(a):
    guess = a * 0.5 + 0.5
    while (guess * guess - a).abs().max() > 1e-9:
        guess = 0.5 * (guess + a / guess)
    return guess


@case((v(2.0),), (v(30.0),))
def newton_with_a_bound(a):
    x = a
    for _ in range(30):
        following = 0.5 * (x + a / x)
        if (following - x).abs().max() < 1e-12:
            break
        x = following
    return x


@case((v(1.0, 2.0),), (v(-3.0, 0.5),))
def gradient_descent(x):
    point = torch.zeros_like(x)
    while (point - x).square().sum() > 1e-3:
        point = point - 0.2 * (point - x)
    return point


@case((GRID @ GRID.T + torch.eye(3, dtype=torch.float64),))
def power_iteration(matrix):
    vector = torch.ones(3, dtype=matrix.dtype)
    change = torch.ones((), dtype=matrix.dtype)
    while change > 1e-6:
        following = matrix @ vector
        following = following / following.norm()
        change = (following - vector).abs().max()
        vector = following
    return vector @ matrix @ vector


@case((v(0.1),), (v(3.0),), (v(-30.0),))
def while_true_with_returns(x):
    while True:
        x = x * 2
        if x.sum() > 5:
            return x
        if x.sum() < -5:
            return -x * 3
        x = x + 0.1


@case((UP, n(3)), (UP, n(0)), (UP, n(7)))
def python_and_tensor_exit(x, limit):
    i = 0
    while i < limit and x.sum() < 50:
        x = x * 1.7
        i = i + 1
    return x


@case((UP,), (UP * 7,))
def while_with_continue(x):
    total = torch.zeros((), dtype=x.dtype)
    k = torch.zeros((), dtype=torch.int64)
    while k < 6:
        k = k + 1
        if k % 2 == 0:
            continue
        total = total + (x * k).sum()
    return total


@case((UP,), (UP * 40,))
def while_else(x):
    k = 0
    while k < x.sum():
        k += 1
        if k > 5:
            x = x * 2
            break
    else:
        x = x - 1
    return x


@case((v(1.0, 1.5),), (v(0.5, 0.1),))
def nested_while(x):
    while x.sum() < 20:
        x = x + 1
        while x.max() > 4 and x.max() < 8:
            x = x * 1.5
    return x


@case((v(4.0),), (v(0.5),))
def walrus_while(x):
    y = x
    while (size := y.norm()) > 1:
        y = y * 0.5
    return y + size


@case((v(0.2, 0.3),), (v(0.9, 0.8),))
def adaptive_computation_time(x):
    state = x
    halted = torch.zeros((), dtype=x.dtype)
    output = torch.zeros_like(x)
    while halted < 0.99:
        state = torch.tanh(state * 1.1 + 0.1)
        p = torch.minimum(state.mean().sigmoid() * 0.6, 1 - halted)
        output = output + p * state
        halted = halted + p
    return output


@case((v(5.0, 1.0),), (v(1.0, 0.0),))
def collatz_like(x):
    m = x[0]
    steps = torch.zeros((), dtype=x.dtype)
    while m > 1.5 and steps < 30:
        if torch.remainder(m.round(), 2) == 0:
            m = m / 2
        else:
            m = 3 * m + 1
        steps = steps + 1
    return m + steps + x[1]


@case((v(0.3),), (v(1.9),), (v(-1.0),))
def bisection(target):
    low = torch.zeros_like(target) - 2
    high = torch.zeros_like(target) + 2
    while (high - low).max() > 1e-6:
        middle = (low + high) / 2
        if (middle**3 < target).all():
            low = middle
        else:
            high = middle
    return low * target


# ---- for


@case((UP, n(4)), (UP, n(0)), (UP, n(1)))
def for_tensor_range(x, count):
    total = torch.zeros_like(x)
    for i in range(count):
        total = total + x * i
    return total


@case((UP, n(4)), (UP, n(0)))
def calculates_with_its_counter(x, count):
    rate = 0
    for i in range(count):
        x = x * 0.9 + 0.05 * i + (i + 1) / 3
        rate += 0.1
    return x * rate


@case((UP, n(5)), (UP, n(0)))
def writes_rows(x, count):
    out = torch.zeros(6, dtype=x.dtype)
    for i in range(count):
        if i == 2:
            continue
        out[i] = x.sum() * (i + 1)
    return out


@case((UP, n(1), n(9)), (UP, n(8), n(2)), (UP, n(2), n(3)))
def range_with_step(x, start, stop):
    for k in range(start, stop, 3):
        x = x + k
    return x


@case((GRID,), (-GRID,), (GRID + 2,))
def rows_until(x):
    total = torch.zeros(4, dtype=x.dtype)
    for row in x:
        if row.sum() > 1:
            break
        total = total + row
    return total


@case((torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(20, 3),), (torch.ones(20, 3, dtype=torch.float64),))
def many_rows(x):
    state = torch.zeros(3, dtype=x.dtype)
    for row in x:
        state = torch.tanh(state * 0.9 + row)
    return state


@case((UP,), (UP * 10,), (UP * 100,))
def layers_with_early_exit(x):
    layers = [torch.tanh, torch.sin, torch.exp]
    for layer in layers:
        y = layer(x)
        if (y - x).abs().max() > 9:
            break
        x = y
    return x


@case((UP,), (DOWN,))
def for_with_return(x):
    for k in range(4):
        x = x * 1.5
        if x.sum() > 9:
            return x + k
    return x


@case((UP,), (UP * 10,))
def for_else(x):
    for _ in range(3):
        x = x * 1.2
        if x.sum() > 20:
            break
    else:
        x = -x
    return x


@case((GRID,), (-GRID,))
def static_loop_with_conditions(x):
    outputs = []
    for i in range(3):
        row = x[i]
        outputs.append(row * 2 if row.sum() > 0 else row / 2)
    return torch.stack(outputs)


@case((v(0.2, 0.5, 0.3), n(4)), (v(0.9, 0.05, 0.05), n(2)))
def greedy_decode(logits, limit):
    tokens = torch.zeros(6, dtype=torch.int64)
    state = logits
    score = torch.zeros((), dtype=logits.dtype)
    for i in range(limit):
        token = state.argmax()
        tokens[i] = token
        score = score + state.log_softmax(0)[token]
        state = torch.roll(state, 1) * 1.3
    return score, tokens


@case((GRID, torch.tensor([3, 1, 2])), (GRID, torch.tensor([0, 4, 4])))
def ragged_sums(x, lengths):
    total = torch.zeros((), dtype=x.dtype)
    for i in range(3):
        for j in range(lengths[i]):
            total = total + x[i, j] * (j + 1)
    return total


@case((v(3.0, 1.0, 2.0),), (v(1.0, 2.0, 3.0),))
def bubble(x):
    for _ in range(2):
        for j in range(2):
            a, b = x[j], x[j + 1]
            if a > b:
                a, b = b, a
            x = torch.cat([x[:j], torch.stack([a, b]), x[j + 2 :]])
    return x * v(1.0, 2.0, 3.0)


@case((v(1.0, 2.0), n(5)), (v(1.0, 2.0), n(1)))
def fibonacci(x, k):
    a, b = x[0], x[1]
    for _ in range(k):
        a, b = b, a + b
    return a


@case((GRID[0], GRID[1]), (GRID[0], GRID[0]))
def dynamic_time_warping(x, y):
    cost = torch.zeros(5, dtype=x.dtype)
    for i in range(4):
        if (x[i] - y[i]).abs() > 0.1:
            cost[i + 1] = cost[i] + (x[i] - y[i]).abs()
        else:
            cost[i + 1] = cost[i]
    return cost[4]


# ---- functions in functions


def scale_up(x, *, by=3.0):
    if x.sum() > 0:
        return x * by
    return x


def twice(function, x):
    return function(function(x))


@case((UP,), (DOWN,))
def calls_a_helper(x):
    y = scale_up(x, by=2.0)
    return scale_up(y - 3)


@case((UP,), (DOWN,))
def takes_a_function(x):
    return twice(scale_up, x)


@case((UP,), (DOWN,))
def inner_function(x):
    limit = x.abs().max()

    def squash(z, power=2):
        if z.sum() > limit:
            return z / limit
        return z**power

    return squash(x) + squash(x * 2, power=3)


@case((UP,), (DOWN,))
def inner_lambda(x):
    shape = lambda z: z.exp() if z.mean() > 0 else z.cos()  # noqa: E731
    return shape(x) * shape(-x)


def make_with_cells():
    bias = v(0.1, 0.2, 0.3)
    gain = 2.0

    def with_cells(x):
        if x.sum() > 0:
            return x * gain + bias
        return x - bias

    return with_cells


CASES.append(Case("closure_cells", make_with_cells, ((UP,), (DOWN,)), frozenset()))


def announce(function):
    @functools.wraps(function)
    def wrapper(x, *rest, **options):
        y = function(x, *rest, **options)
        if y.sum() > 100:
            y = y * 0
        return y

    return wrapper


@case((UP,), (DOWN,), (UP * 100,))
@announce
def decorated(x, *, gain=2):
    if x.sum() > 0:
        return x * gain
    return x


@case((UP, 3), traits={"python"})
def static_recursion(x, depth):
    if depth == 0:
        return x
    y = static_recursion(x, depth - 1)
    if y.sum() > 4:
        return y / 2
    return y * 1.5


@case((GRID,), (-GRID,))
def comprehension_inside(x):
    if x[0].sum() > 0:
        parts = [row * k for k, row in enumerate(x)]
    else:
        parts = [row - k for k, row in enumerate(x)]
    return sum(parts)


@case((UP,), (DOWN,))
def math_constants(x):
    if x.sum() > math.pi:
        return x * math.e
    return x * math.sqrt(2)


@case((UP, None), (UP, MIXED), (DOWN, MIXED), traits={"python"})
def optional_argument(x, mask=None):
    if mask is not None:
        x = x * mask
    if x.sum() > 0:
        return x
    return -x


@case((UP,), (DOWN,))
def guard_that_raises(x):
    if torch.isinf(x).any():
        raise ValueError("infinite input")
    assert x.abs().max() < 1e6, "too large"
    if x.sum() > 0:
        return x.log()
    return x.exp()


@case((UP,), (DOWN,))
def try_around(x):
    try:
        y = x * 2
        if y.sum() > 0:
            y = y + 1
    except ZeroDivisionError:
        y = x
    return y


@case((UP,), (DOWN,))
def augmented_local(x):
    h = x * 2
    if h.sum() > 0:
        h += 1
        h *= 3
    else:
        h -= x
    return h


# ---- modules


@module_case((GRID,), (-GRID,))
class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)

    def forward(self, x):
        if x[2].sum() > 0:
            return self.left(x)
        return self.right(x).relu()


@module_case((GRID,), (-GRID,), (GRID * 30,))
class EarlyExit(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x):
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x).tanh()
            logits = head(x)
            if logits.softmax(-1).max() > 0.68:
                return logits
        return logits


@module_case((GRID,), (GRID * 10,), (GRID * 0.01,))
class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        state = x
        while state.norm() > 0.5:
            state = self.cell(state).tanh() * 0.9
        return state


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x):
        if x.mean() > 0.1:
            return x * self.weight
        return self._shift(x)

    def _shift(self, x):
        return x + self.weight if x.min() > -0.9 else x - self.weight


@module_case((GRID,), (GRID + 1,), (GRID - 0.5,))
class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(Inner(), Inner())
        self.inner = Inner()

    def forward(self, x):
        return self.inner(self.parts(x))


@module_case((GRID,), (-GRID,))
class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.inner.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        self.inner.register_forward_hook(lambda _, args, out: out + 1)

    def forward(self, x):
        return self.inner(x).sum(0)


@module_case((GRID,), (GRID * 5,))
class Normalizing(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.register_buffer("limit", torch.tensor(2.0))

    def forward(self, x):
        if self.training and x.shape[0] > 100:
            raise RuntimeError("too many rows")
        if x.abs().max() > self.limit:
            x = self.norm(x)
        return x


@module_case((GRID,), (-GRID,))
class MixtureOfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        rows = []
        for row in x:
            scores = self.gate(row).softmax(-1)
            if scores[0] > scores[1]:
                rows.append(self.experts[0](row) * scores[0])
            else:
                rows.append(self.experts[1](row) * scores[1])
        return torch.stack(rows)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.__scale = 2.0
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0:
            return self.linear(x) * self.__scale
        return self.linear(x)


@module_case((GRID + 0.1,), (GRID - 0.1,))
class Derived(Base):
    def forward(self, x):
        y = super().forward(x)
        if y.mean() > 0:
            return super().forward(y)
        return y


@module_case((GRID,), (GRID * 3,))
class DeepEquilibrium(nn.Module):
    def __init__(self, tolerance=1e-4):
        super().__init__()
        self.inject = nn.Linear(4, 4)
        self.step = nn.Linear(4, 4)
        self.tolerance = tolerance

    def forward(self, x):
        z = torch.zeros_like(x)
        change = torch.ones((), dtype=x.dtype)
        turns = 0
        while change > self.tolerance and turns < 12:
            following = torch.tanh(0.3 * self.step(z) + self.inject(x))
            change = (following - z).abs().max()
            z = following
            turns += 1
        return z


@module_case((GRID, n(0)), (GRID, n(1)), (GRID, n(5)))
class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Bilinear(4, 4, 3)
        self.third = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x, route):
        if route == 0:
            return self.first(x)
        elif route == 1:
            return self.second(x, x)
        else:
            return self.third(x)
