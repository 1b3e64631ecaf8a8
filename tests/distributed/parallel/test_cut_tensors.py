import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from deepseek.distributed.parallel.cut_tensors import find_cut_axes, gather_whole, measure_norm, scale_, sum_over
from deepseek.distributed.parallel.data_parallel import as_local
from deepseek.distributed.parallel.mesh import build_mesh
from deepseek.distributed.plan import Plan
from deepseek.models.parallelizing import parallelize
from tests.distributed.parallel.cases import build_model
from tests.distributed.ranks import run_ranks


def measure(rank):
    mesh = build_mesh(Plan(dp=2, ep=2))
    whole = torch.arange(1.0, 8.0, dtype=torch.float64)
    cut = distribute_tensor(whole, mesh.base["dp"], [Shard(0)])  # 4 values on rank 0 and 3 on rank 1
    alike = torch.tensor([2.0], dtype=torch.float64)
    expert = torch.tensor([3.0 + rank], dtype=torch.float64)
    assert find_cut_axes(cut, is_expert=False) == ("dp",) and find_cut_axes(alike, is_expert=True) == ("ep",)
    norm = measure_norm([(cut, False), (alike, False), (expert, True)], mesh)
    gathered = gather_whole(expert, mesh, is_expert=True), gather_whole(cut, mesh, is_expert=False)
    scale_([cut], 2.0)
    summed = [torch.ones(2) * (rank + 1), nn.Parameter(torch.ones(1, dtype=torch.float64)).data]
    sum_over(summed, mesh.group("dp"))
    return (
        norm,
        [tensor.tolist() for tensor in gathered],
        cut.full_tensor().tolist(),
        [each.tolist() for each in summed],
    )


def test_what_ranks_hold_alike_counts_once_and_what_is_cut_counts_whole():
    values = [float(value) for value in range(1, 8)]
    expected = (sum(value**2 for value in values) + 2.0**2 + 3.0**2 + 4.0**2) ** 0.5
    for norm, gathered, doubled, summed in run_ranks(measure, 2):
        assert abs(norm - expected) < 1e-12
        assert gathered == [[3.0, 4.0], values]
        assert doubled == [2 * value for value in values]
        assert summed == [[3.0, 3.0], [2.0]]


def cut_and_gather(rank):
    """Whole tensors, cut as weights are: in rows, in columns, unevenly, twice, by experts, not at all."""
    answers = []
    for name, settings in (
        ("llama", {"tp": 2, "dp": 2, "zero_stage": 3}),
        ("moe", {"dp": 4, "ep": 2, "zero_stage": 1}),
    ):
        plan = Plan(**settings)
        parallel = parallelize(build_model(name), plan, build_mesh(plan))
        torch.manual_seed(3)
        for weight, parameter in parallel.named_parameters():
            whole = torch.randn_like(parallel.gather(weight, parameter))
            piece = parallel.cut(weight, whole, parameter)
            assert type(piece) is type(parameter.data), weight
            local, expected = as_local(piece), as_local(parameter.detach())
            assert (local.shape, local.dtype) == (expected.shape, expected.dtype), weight
            assert torch.equal(parallel.gather(weight, piece), whole), weight
            answers.append(local.shape != whole.shape)
    return sum(answers)


def test_a_whole_tensor_is_cut_as_a_weight_and_gathered_again():
    assert min(run_ranks(cut_and_gather, 4)) > 20
