"""What the ranks of distributed tests do; a module of its own, since a spawned process imports it by name."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from deepseek.distributed.collectives import COLLECTIVES
from deepseek.distributed.collectives.executing import run_steps_
from deepseek.distributed.collectives.messages import count_sent, cut
from tests.planning.plain_decoder import (
    measure_pipeline_step,
    measure_sharded_step,
    measure_tensor_parallel_step,
)

SIZE = 30


def exchange(rank, world):
    """Each schedule beside torch's own collective: largest difference, and bytes sent beside bytes counted."""
    results = {}
    for name, order in COLLECTIVES.items():
        size = SIZE * world if name == "pairwise_all_to_all" else SIZE
        steps = order(world, size, 2 if world % 2 == 0 and name.startswith("hier") else 1)
        tensor = torch.arange(size, dtype=torch.float32) * (rank + 1) + rank
        expected = compute_with_torch(name, tensor.clone(), rank, world)
        sent = run_steps_(tensor, steps)
        start, stop = (cut(size, world)[rank]) if name == "ring_reduce_scatter" else (0, size)
        results[name] = (float((tensor - expected)[start:stop].abs().max()), sent, 4 * count_sent(steps, rank))
    return results


def compute_with_torch(name, tensor, rank, world):
    if "reduce" in name:
        dist.all_reduce(tensor)
    elif name == "tree_broadcast":
        dist.broadcast(tensor, 0)
    elif name == "ring_all_gather":
        parts = [None] * world
        start, stop = cut(len(tensor), world)[rank]
        dist.all_gather_object(parts, tensor[start:stop])
        tensor = torch.cat(parts)
    else:
        parts = [None] * world
        dist.all_gather_object(parts, tensor)
        tensor = torch.cat([part[rank * SIZE : (rank + 1) * SIZE] for part in parts])
    return tensor


def measure_shapes(rank, shapes, world, micro_batch):
    """(peak bytes, bytes after a step) of this rank under FSDP2, for each shape."""
    mesh = init_device_mesh("cpu", (world,))
    return [measure_sharded_step(shape, micro_batch, mesh) for shape in shapes]


def measure_tensor_parallel(rank, shapes, world, micro_batch):
    """The same with tensors cut over the ranks."""
    mesh = init_device_mesh("cpu", (world,))
    return [measure_tensor_parallel_step(shape, micro_batch, mesh) for shape in shapes]


def measure_pipeline(rank, shapes, world, micro_batch, micro_batches):
    """The same with layers dealt to the ranks."""
    return [measure_pipeline_step(shape, micro_batch, rank, world, micro_batches) for shape in shapes]
