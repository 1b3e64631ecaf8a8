"""Random numbers in branches that backward can draw again: a seed comes in, and the same seed gives the same numbers.

The backward of `torch.cond` and `while_loop` runs a branch a second time. A dropout inside draws another mask there,
and the gradients belong to a function that never ran (measured on torch 2.13: silent). In training, random operators
inside branches are therefore replaced by ones that compute their numbers from a seed: it is drawn outside by torch's
generator (so `torch.manual_seed` rules), handed in, and advanced with every iteration of a loop. The numbers are a
32-bit integer hash (two rounds of multiply and shift, the constants found by C. Wellons' hash-prospector, bias 0.108)
of the position and the seed; intermediate results stay under 2^63. Another stream than plain Python's, the same
distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from deepseek.compiler.jit.tracing.sites import ControlFlowError

MASK = 0xFFFFFFFF
FIRST, SECOND = 0x21F0AAAD, 0x735A2D97
SEED_END = 2**31 - 1
LOOPS = ("while_loop",)
BRANCHES = ("cond",)


def hash_bits(value: Tensor) -> Tensor:
    """32 well mixed bits of each int64, as int64."""
    value = value & MASK
    value = ((value ^ (value >> 16)) * FIRST) & MASK
    value = ((value ^ (value >> 15)) * SECOND) & MASK
    return value ^ (value >> 15)


def advance(seed: Tensor, salt: int) -> Tensor:
    """Another seed, which no other `salt` gives."""
    return hash_bits(hash_bits(seed) + salt * 0x9E3779B1 % MASK)


def uniform(shape: Any, seed: Tensor, device: torch.device) -> Tensor:
    """Numbers in [0, 1), float64 on devices that have it."""
    positions = torch.arange(math.prod(shape), device=device).reshape(tuple(shape))
    bits = hash_bits(positions ^ hash_bits(seed))
    return (bits >> 8).to(torch.float32) * (1 / 2**24)


def seeded_dropout(
    value: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, seed: Tensor, salt: int
) -> Tensor:
    """`torch.nn.functional.dropout` with the mask of a seed."""
    if not training or p == 0:
        return value.clone()
    keep = uniform(value.shape, advance(seed, salt), value.device) >= p
    return torch.where(keep, value / (1 - p), 0) if p < 1 else value * 0


def seeded_channel_dropout(
    value: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, seed: Tensor, salt: int
) -> Tensor:
    """`dropout1d`, `dropout2d` and `dropout3d` of a batch: whole channels."""
    if not training or p == 0:
        return value.clone()
    shape = (*value.shape[:2], *([1] * (value.dim() - 2)))
    keep = uniform(shape, advance(seed, salt), value.device) >= p
    return torch.where(keep, value / (1 - p), 0) if p < 1 else value * 0


def seeded_rand_like(value: Tensor, *, seed: Tensor, salt: int, **options: Any) -> Tensor:
    dtype = options.get("dtype") or value.dtype
    return uniform(value.shape, advance(seed, salt), value.device).to(dtype)


def seeded_randn_like(value: Tensor, *, seed: Tensor, salt: int, **options: Any) -> Tensor:
    return _normal(value.shape, seed, salt, value.device).to(options.get("dtype") or value.dtype)


def _normal(shape: Any, seed: Tensor, salt: int, device: torch.device) -> Tensor:
    """Box and Muller's transform of two uniform numbers."""
    first = 1 - uniform(shape, advance(seed, 2 * salt), device)
    second = uniform(shape, advance(seed, 2 * salt + 1), device)
    return torch.sqrt(-2 * torch.log(first)) * torch.cos(2 * math.pi * second)


def seeded_bernoulli(value: Tensor, p: float | None = None, *, seed: Tensor, salt: int) -> Tensor:
    chance = value if p is None else p
    return (uniform(value.shape, advance(seed, salt), value.device) < chance).to(value.dtype)


SEEDED: dict[Any, Callable[..., Tensor]] = {
    functional.dropout: seeded_dropout,
    torch.dropout: seeded_dropout,
    functional.dropout1d: seeded_channel_dropout,
    functional.dropout2d: seeded_channel_dropout,
    functional.dropout3d: seeded_channel_dropout,
    torch.rand_like: seeded_rand_like,
    torch.randn_like: seeded_randn_like,
    torch.bernoulli: seeded_bernoulli,
}
OTHER_FUNCTIONS = {
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.multinomial, torch.poisson),
    *(torch.randint_like, torch.rrelu, functional.rrelu, functional.alpha_dropout, functional.gumbel_softmax),
    *(functional.feature_alpha_dropout, functional.fractional_max_pool2d),
}
METHODS = {"bernoulli", "multinomial"}
IN_PLACE = {"bernoulli_", "uniform_", "normal_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_"}


def is_random(node: fx.Node) -> bool:
    """Return whether a node draws random numbers."""
    if node.op == "call_method":
        return node.target in METHODS | IN_PLACE
    if node.op != "call_function":
        return False
    if node.target is functional.scaled_dot_product_attention:
        dropout = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
        return bool(dropout != 0.0)
    return (node.target in SEEDED and not _is_off(node)) or node.target in OTHER_FUNCTIONS


def _is_off(node: fx.Node) -> bool:
    """Return whether a dropout is not in training."""
    if "dropout" not in getattr(node.target, "__name__", ""):
        return False
    return not node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)


def seed_branches_(graph_module: fx.GraphModule) -> int:
    """Replace the random operators in the branches of `graph_module` by seeded ones; says how many.

    Raises `ControlFlowError` for one that has no seeded form.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        if _is_control_flow(node) and any(_has_random(branch) for branch in _branches(graph_module, node)):
            with graph_module.graph.inserting_before(node):
                seed = graph_module.graph.call_function(torch.randint, (0, SEED_END, ()))
            count += _seed_node(graph_module, node, seed)
    if count:
        graph_module.recompile()
    return count


def has_control_flow(graph_module: fx.GraphModule) -> bool:
    """Return whether a graph has branches or loops."""
    return any(_is_control_flow(node) for node in graph_module.graph.nodes)


def _is_control_flow(node: fx.Node) -> bool:
    name = getattr(node.target, "_name", "") if node.op == "call_function" else ""
    return name in BRANCHES + LOOPS


def _branches(module: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    names = [argument for argument in node.args if isinstance(argument, fx.Node) and argument.op == "get_attr"]
    found = [getattr(module, str(name.target)) for name in names]
    return [branch for branch in found if isinstance(branch, fx.GraphModule)]


def graphs_of(graph_module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """Give the graph and those of all its branches and loops."""
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield module


def _has_random(module: fx.GraphModule) -> bool:
    return any(is_random(node) for graph in graphs_of(module) for node in graph.graph.nodes)


def _seed_node(module: fx.GraphModule, node: fx.Node, seed: fx.Node) -> int:
    """Hand `seed` to a branch or loop, and into what is inside it."""
    graphs = _branches(module, node)
    if getattr(node.target, "_name", "") in BRANCHES:
        operands = node.args[-1]
        assert isinstance(operands, (tuple, list))
        node.args = (*node.args[:-1], (*operands, seed))
        return sum(_seed_graph(graph, _add_input(graph, len(operands))) for graph in graphs)
    carried, extra = node.args[2], node.args[3]
    assert isinstance(carried, (tuple, list))
    node.args = (*node.args[:2], (*carried, seed), extra)
    condition, body = graphs
    _add_input(condition, len(carried))
    condition.recompile()
    inside = _add_input(body, len(carried))
    count = _seed_graph(body, inside)
    output = body.graph.output_node()
    with body.graph.inserting_before(output):
        following = body.graph.call_function(advance, (inside, 1))
    results = output.args[0]
    assert isinstance(results, (tuple, list))
    output.args = ((*results, following),)
    body.recompile()
    return count


def _add_input(module: fx.GraphModule, position: int) -> fx.Node:
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    if position < len(inputs):
        place = module.graph.inserting_before(inputs[position])
    elif inputs:
        place = module.graph.inserting_after(inputs[-1])
    else:
        place = module.graph.inserting_before(next(iter(module.graph.nodes)))
    with place:
        return module.graph.placeholder("deepseek_seed")


def _seed_graph(module: fx.GraphModule, seed: fx.Node) -> int:
    count = 0
    for salt, node in enumerate(list(module.graph.nodes), start=2):
        if is_random(node):
            _replace(module, node, seed, salt)
            count += 1
        elif _is_control_flow(node):
            with module.graph.inserting_before(node):
                inner = module.graph.call_function(advance, (seed, salt))
            count += _seed_node(module, node, inner)
    module.recompile()
    return count


def _replace(module: fx.GraphModule, node: fx.Node, seed: fx.Node, salt: int) -> None:
    target: Any = node.target
    if target == "bernoulli":
        target = torch.bernoulli
    if target not in SEEDED:
        lines = (node.meta.get("stack_trace") or "").strip().splitlines()
        raise ControlFlowError(
            f"{getattr(target, '__name__', target)} draws random numbers inside a tensor condition, and its backward"
            " would draw others; draw them"
            f" before the condition{': ' + lines[-2].strip() if len(lines) > 1 else ''}"
        )
    with module.graph.inserting_before(node):
        seeded = module.graph.call_function(SEEDED[target], node.args, {**node.kwargs, "seed": seed, "salt": salt})
    seeded.meta = dict(node.meta)
    node.replace_all_uses_with(seeded)
    module.graph.erase_node(node)
