import os
import re

import pytest
import torch
import torch.distributed as dist

from deepseek.core.errors import CollectiveMismatchError, ConfigError, PermanentError
from deepseek.distributed import DeepSeekComm
from deepseek.distributed.communicator import choose_backend
from tests.distributed.ranks import run_ranks

WORLD = 4
HOSTS = ["a", "b", "a", "b"]  # dealt out, so that placement is no identity


def join(**settings):
    return DeepSeekComm.init("gloo", init_method=f"file://{os.environ['STORE_FILE']}", timeout_s=60, **settings)


def make_numbers(rank, size=37, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def check_collectives(rank):
    """Everything that four ranks can do, each beside what float64 or torch says."""
    with join(mesh={"dp": 2, "tp": 2}, hosts=HOSTS) as comm:
        check_all_reduces(comm, rank)
        check_other_reductions(comm, rank)
        check_parts(comm, rank)
        check_groups(comm, rank)
        check_messages(comm, rank)
        check_records(comm)
        check_refusals(comm)
    with pytest.raises(PermanentError, match="after the communicator was closed"):
        comm.barrier()
    assert not dist.is_initialized()
    return rank


def check_all_reduces(comm, rank):
    for size in (0, 1, 3, 37, 4096):
        expected = sum(make_numbers(other, size).double() for other in range(WORLD))
        for algorithm in ("flat", "ring", "hierarchical", "tree", *(("auto",) if size in (3, 4096) else ())):
            found = make_numbers(rank, size)
            assert comm.all_reduce(found, algorithm=algorithm) is found
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert len(comm.algorithms.choices) == 2


def check_other_reductions(comm, rank):
    for op, name in ((dist.ReduceOp.MAX, "amax"), (dist.ReduceOp.MIN, "amin"), (dist.ReduceOp.PRODUCT, "prod")):
        expected = getattr(torch.stack([make_numbers(other) for other in range(WORLD)]), name)(0)
        for algorithm in ("ring", "hierarchical", "tree"):
            torch.testing.assert_close(comm.all_reduce(make_numbers(rank), op, algorithm=algorithm), expected)
    average = comm.all_reduce(make_numbers(rank), dist.ReduceOp.AVG, algorithm="hierarchical")
    torch.testing.assert_close(average, sum(make_numbers(other) for other in range(WORLD)) / WORLD)
    columns = torch.arange(12.0).view(3, 4).t()  # not contiguous
    torch.testing.assert_close(comm.all_reduce(columns * (rank + 1), algorithm="ring"), columns * 10)
    counts = torch.arange(5) * (rank + 1)
    assert comm.all_reduce(counts, algorithm="hierarchical").tolist() == [0, 10, 20, 30, 40]
    pending = [comm.all_reduce(torch.full((3,), float(rank + step)), async_op=True) for step in range(3)]
    later = comm.all_reduce(torch.ones(1))  # waits for its turn behind them
    assert [each.wait().tolist() for each in pending] == [[6.0 + 4 * step] * 3 for step in range(3)]
    assert float(later) == WORLD


def check_parts(comm, rank):
    whole = [torch.arange(8.0).view(8, 1) * (other + 1) + torch.arange(3.0) for other in range(WORLD)]
    for algorithm in ("flat", "ring", "auto"):
        part = comm.reduce_scatter(whole[rank].clone(), algorithm=algorithm)
        torch.testing.assert_close(part, sum(whole)[2 * rank : 2 * rank + 2])
        gathered = comm.all_gather(whole[rank], algorithm=algorithm)
        torch.testing.assert_close(gathered, torch.cat(whole))
    average = comm.reduce_scatter(whole[rank].clone(), dist.ReduceOp.AVG, algorithm="ring")
    torch.testing.assert_close(average, sum(whole)[2 * rank : 2 * rank + 2] / WORLD)


def check_groups(comm, rank):
    tp, dp = comm.group("tp"), comm.group("dp")
    assert (tp.ranks, dp.ranks) == ([rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2])
    for algorithm in ("flat", "ring", "auto"):
        assert float(tp.all_reduce(torch.tensor([float(rank)]), algorithm=algorithm)) == sum(tp.ranks)
        assert float(dp.all_reduce(torch.tensor([float(rank)]), algorithm=algorithm)) == sum(dp.ranks)
    with pytest.raises(ConfigError, match=r"unknown axis of the mesh 'pp' \(known: dp, tp\)"):
        comm.group("pp")


def check_messages(comm, rank):
    assert comm.broadcast(torch.tensor([rank]), source=2).tolist() == [2]
    tp = comm.group("tp")
    if tp.get_rank() == 0:
        tp.send(torch.tensor([float(rank)]), 1)
    else:
        assert float(tp.recv(torch.zeros(1), 0)) == rank - 1
    comm.require_equal("digest of the configuration", "abc")
    with pytest.raises(CollectiveMismatchError, match=r"'x' on ranks \[0, 1, 3\]; 'y' on ranks \[2\]"):
        comm.require_equal("digest", "y" if rank == 2 else "x")
    assert comm.measure_topology().num_hosts <= WORLD


def check_records(comm):
    """Sent bytes by class of link are the formula's: hierarchical sends a quarter of the ring's across two hosts."""
    before = dict(comm.ledger.sent_bytes)
    comm.all_reduce(torch.zeros(64), algorithm="hierarchical")
    key = "all_reduce(SUM)"
    across, inside = (comm.ledger.sent_bytes[key, link] - before[key, link] for link in ("across", "inside"))
    assert (across, inside) == (128, 256)  # 2 (2-1)/2 of half of 256 bytes; 2 (2-1)/2 of 256 bytes
    last = comm.ledger.calls[-1]
    assert last.signature == ("all_reduce(SUM)", (64,), "float32")
    assert re.fullmatch(r".*test_communicator\.py:\d+", last.site)
    text = comm.render_metrics()
    assert 'ds_communication_latency_count{operation="all_reduce(SUM)"' in text
    assert f'link="across",rank="{comm.get_rank()}"}} {comm.ledger.sent_bytes[key, "across"]}' in text


def check_refusals(comm):
    ones = torch.ones(3)
    for call, message in (
        (lambda: comm.all_reduce(ones, algorithm="rnig"), "did you mean 'ring'"),
        (lambda: comm.all_reduce(ones, algorithm="flat", payload=torch.bfloat16), "knows no payload"),
        (lambda: comm.all_reduce(ones.long(), dist.ReduceOp.AVG), "divide"),
        (lambda: comm.reduce_scatter(ones), "pad it"),
        (lambda: comm.all_to_all(ones), "no equal parts for 4 ranks"),
        (lambda: comm.all_to_all(ones, [1, 1]), r"sent=\[1, 1\] does not part 3 rows"),
        (lambda: comm.broadcast(ones, 4), "not one of 4 ranks"),
        (lambda: comm.send(ones, comm.get_rank()), "name another rank"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def check_nested(rank):
    """In a program that has its process group already; that stays when the communicator goes."""
    with pytest.raises(ConfigError, match="with 'gloo' before"):
        DeepSeekComm.init("nccl")
    with DeepSeekComm.init(timeout_s=60) as comm:
        assert float(comm.all_reduce(torch.ones(1), algorithm="ring")) == 2
    assert dist.is_initialized()
    total = torch.ones(1)
    dist.all_reduce(total)
    return float(total)


def test_four_ranks_agree_with_float64_and_with_torch_in_every_collective():
    assert run_ranks(check_collectives, WORLD, is_grouped=False) == list(range(WORLD))


def test_it_joins_a_program_that_initialized_torch_distributed_itself():
    assert run_ranks(check_nested, 2) == [2.0, 2.0]


def test_a_single_process_needs_no_environment(monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("SLURM", "MASTER_", "JOB_COMPLETION")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    with DeepSeekComm.init("Gloo", mesh={"dp": 1}) as comm:
        assert (comm.get_rank(), comm.get_world_size(), comm.backend) == (0, 1, "gloo")
        rows = torch.ones(2, 3, requires_grad=True)
        for algorithm in ("auto", "ring", "hierarchical", "tree", "flat"):
            assert comm.group("dp").all_reduce(torch.ones(2), algorithm=algorithm).tolist() == [1.0, 1.0]
        for algorithm in ("native", "ring", "pairwise", "hierarchical"):
            assert torch.equal(comm.all_to_all(rows, algorithm=algorithm), rows)
        assert torch.equal(comm.all_gather(rows), rows)
        assert torch.equal(comm.reduce_scatter(rows.detach()), rows)
        comm.barrier()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "glo"}, "did you mean 'gloo'"),
        ({"timeout_s": 0}, "seconds above 0"),
        ({"backend": "gloo", "mesh": {"dp": 2, "tp": 2}}, "has 4 ranks, and 1 were started"),
        ({"backend": "gloo", "hosts": ["a", "b"]}, "names 2 ranks of 1"),
    ],
)
def test_settings_that_fit_no_job_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DeepSeekComm.init(**settings)
    assert not dist.is_initialized()


def test_nccl_without_a_gpu_names_gloo(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees none here; use backend='gloo'"):
        choose_backend("NCCL")
    assert choose_backend("auto") == "gloo"
