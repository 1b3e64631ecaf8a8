"""A memory budget for compiled training: torch's partitioner keeps for the backward pass what fits, by operator.

`ds.jit(memory_budget=0.5)` and `optimize` hand captured graphs to the backends made here. The partitioner cuts the
joint graph of forward and backward where the fewest bytes cross (min-cut) and recomputes by operator, cheapest per byte
first. Models that run eagerly are recomputed by block instead: see `checkpoint/activations.py`.

A budget is a share of what is kept without recomputation: 1.0 keeps everything, 0.5 half.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch._functorch import config

from deepseek.core.errors import ConfigError

Backend = Callable[[fx.GraphModule, list[Tensor]], Any]


def inductor_with_budget(memory_budget: float, options: dict[str, Any] | None = None) -> Backend:
    """Build a backend for `torch.compile`: inductor, keeping for the backward pass about that share of what it would.

        step = torch.compile(model, backend=inductor_with_budget(0.5))

    Without a budget inductor already recomputes what costs next to nothing; below 1.0 it also recomputes what costs
    time. `options` are settings of inductor, as for `torch.compile`.
    """
    check_budget(memory_budget)
    from torch._inductor.compile_fx import compile_fx

    return _with_budget(functools.partial(compile_fx, config_patches=options), memory_budget)


def eager_with_budget(memory_budget: float) -> Backend:
    """Build the same for code that is captured and then run operator by operator, without generating code."""
    check_budget(memory_budget)
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    run_as_it_is = aot_autograd(
        fw_compiler=boxed_nop,
        partition_fn=min_cut_rematerialization_partition,
    )
    return _with_budget(run_as_it_is, memory_budget)


def _with_budget(backend: Backend, memory_budget: float) -> Backend:
    def compile_graph(graph_module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        with config.patch(activation_memory_budget=memory_budget):
            return backend(graph_module, inputs)

    return compile_graph


def check_budget(memory_budget: float) -> float:
    """Return the budget; raises `ConfigError` for one outside of (0, 1]."""
    if not 0 < memory_budget <= 1:
        raise ConfigError(
            f"memory_budget={memory_budget:g} is not a share of what is kept; choose over 0 and up to 1, such as 0.5"
        )
    return memory_budget
