"""Collectives as values: who sends which part of a buffer to whom, step by step.

One file each, one signature: `order_messages(world_size, num_elements, domain_size)` returns the steps, each a tuple
of `RankMessage`s that travel at the same time. `executing.py` moves numbers by them, over torch.distributed or
in one process; `planning/estimate/communication.py` times the same algorithms in closed form, and tests hold the bytes
of both against each other.
"""

from __future__ import annotations

from collections.abc import Callable

from deepseek.distributed.collectives import (
    hierarchical_all_reduce,
    pairwise_all_to_all,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    tree_all_reduce,
    tree_broadcast,
)
from deepseek.distributed.collectives.messages import Step

COLLECTIVES: dict[str, Callable[[int, int, int], tuple[Step, ...]]] = {
    "ring_all_reduce": ring_all_reduce.order_messages,
    "ring_reduce_scatter": ring_reduce_scatter.order_messages,
    "ring_all_gather": ring_all_gather.order_messages,
    "hierarchical_all_reduce": hierarchical_all_reduce.order_messages,
    "tree_all_reduce": tree_all_reduce.order_messages,
    "pairwise_all_to_all": pairwise_all_to_all.order_messages,
    "tree_broadcast": tree_broadcast.order_messages,
}
"""Name -> the function that orders its messages."""
