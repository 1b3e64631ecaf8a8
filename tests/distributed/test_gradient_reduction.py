import os

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from deepseek.distributed import DeepSeekComm, average_gradients, average_shards, comm_overlap
from tests.distributed.ranks import run_ranks

WORLD = 4


def build_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()


def make_batch(rank):
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def compute_expected():
    """Gradients of the mean over all ranks' batches, by one process."""
    model = build_model()
    (sum(model(make_batch(rank)).square().mean() for rank in range(WORLD)) / WORLD).backward()
    return [parameter.grad for parameter in model.parameters()]


def check_hooks(rank):
    with DeepSeekComm.init(
        "gloo", mesh={"dp": 2, "shard": 2}, init_method=f"file://{os.environ['STORE_FILE']}", hosts=["a", "a", "b", "b"]
    ) as comm:
        for settings, tolerance in (({"algorithm": "hierarchical"}, 1e-12), ({"payload": torch.bfloat16}, 3e-2)):
            for is_overlapped in (True, False):
                check_ddp(comm, rank, settings, tolerance, is_overlapped)
        check_hsdp(comm, rank)
    return rank


def check_ddp(comm, rank, settings, tolerance, is_overlapped):
    model = DistributedDataParallel(build_model(), bucket_cap_mb=1e-4)  # a bucket or more for each layer
    model.register_comm_hook(None, average_gradients(comm, **settings))
    with comm_overlap(enabled=is_overlapped) as overlap:
        model(make_batch(rank)).square().mean().backward()
    for parameter, expected in zip(model.parameters(), compute_expected(), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=tolerance, atol=tolerance / 10)
    assert overlap.num_collectives >= 1
    assert overlap.communication_s > 0
    assert overlap.exposed_s > 0
    assert is_overlapped or overlap.hidden_s < 0.5 * overlap.communication_s


def check_hsdp(comm, rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "shard"))
    model = fully_shard(build_model(), mesh=mesh["shard"])
    model.set_all_reduce_hook(average_shards(comm.group("dp"), algorithm="ring"))
    model(make_batch(rank)).square().mean().backward()
    for parameter, expected in zip(model.parameters(), compute_expected(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), expected, rtol=1e-12, atol=1e-13)


def test_the_hooks_of_ddp_and_hsdp_leave_the_gradients_of_a_single_process():
    assert run_ranks(check_hooks, WORLD, is_grouped=False) == list(range(WORLD))
