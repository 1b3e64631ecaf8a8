"""What a rank holds, clips and refuses under a plan. That it learns as one process does is in test_parity.py."""

import pytest
import torch

from deepseek.core.errors import ConfigError, TrainingError
from deepseek.distributed.parallel.mesh import build_mesh
from deepseek.distributed.plan import Plan
from deepseek.models.parallelizing import parallelize
from deepseek.models.vit.model import ViT
from deepseek.nn.utils import clip_grad_norm_
from tests.distributed.parallel.cases import CONFIGS, IGNORED, ImageTask, TokenTask, build_batches, build_model
from tests.distributed.ranks import run_ranks

BOUND = 0.05


def clip_in_one_process(batches):
    model, task = build_model("llama"), TokenTask()
    num_units = sum(task.count_units(batch) for batch in batches)
    for batch in batches:
        (task.loss(task.forward(model, batch), batch) / num_units).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), BOUND)
    return float(norm), {name: parameter.grad for name, parameter in model.named_parameters()}


def clip_under_plans(rank):
    batches = build_batches("llama", 1)[0]
    norm, gradients = clip_in_one_process(batches)
    for settings in ({"dp": 2, "zero_stage": 3}, {"tp": 2}, {"pp": 2}):
        plan = Plan(**settings)
        mesh = build_mesh(plan)
        parallel = parallelize(build_model("llama"), plan, mesh)
        parallel.accumulate_gradients(TokenTask(), batches[mesh.coordinate("dp") :: plan.dp])
        assert parallel.clip_gradients_(BOUND) == pytest.approx(norm)
        for name, parameter in parallel.named_parameters():
            whole = parallel.gather(name, parameter.grad)
            torch.testing.assert_close(whole, gradients[name], rtol=1e-4, atol=1e-12)  # torch's bound adds 1e-6
        if plan.pp == 1:
            weights = [parameter for _, parameter in parallel.named_parameters()]
            assert float(clip_grad_norm_(weights, 1e9)) == pytest.approx(BOUND)
            assert float(clip_grad_norm_(weights, 1e9, torch.inf)) == pytest.approx(
                float(torch.nn.utils.get_total_norm(list(gradients.values()), torch.inf)), rel=1e-4
            )
        assert parallel.clip_gradients_(None) == pytest.approx(BOUND, rel=1e-4)
    return True


def test_gradients_in_pieces_are_clipped_as_whole_ones():
    assert run_ranks(clip_under_plans, 2) == [True, True]


def hold_parts(rank):
    plan = Plan(tp=2)
    parallel = parallelize(build_model("llama"), plan, build_mesh(plan))
    groups = parallel.parameter_groups()
    local = sum(
        getattr(weight, "to_local", lambda w=weight: w)().numel() for group in groups for weight in group["params"]
    )
    kinds = [{type(weight).__name__ for weight in group["params"]} for group in groups]
    for label, refused in {
        "recomputation='full' is applied": Plan(tp=2, recomputation="full"),
        "tp=2 does not divide": Plan(tp=2),
    }.items():
        model = build_model("llama")
        rows = None
        if "divide" in label:
            model.config = model.config.model_copy(update={"num_kv_heads": 1})
        with pytest.raises(ConfigError, match=label):
            parallelize(model, refused, build_mesh(refused), rows=rows)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(TrainingError, match="nothing to learn from on any rank"):
        parallel.accumulate_gradients(TokenTask(), [(tokens, torch.full_like(tokens, IGNORED))])
    for _, parameter in parallel.named_parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    with pytest.raises(TrainingError, match="the gradient norm is nan"):
        parallel.clip_gradients_(1.0)
    return local, kinds


def test_a_rank_holds_its_part_and_refuses_what_cannot_run():
    model = build_model("llama")
    cut = {name: weight.numel() for name, weight in model.named_parameters() if "norm" not in name}
    whole = sum(weight.numel() for name, weight in model.named_parameters() if "norm" in name)
    answers = run_ranks(hold_parts, 2)
    # 29 tokens: 15 rows of the table on rank 0 and 14 on rank 1; everything else divides.
    rest = sum(cut.values()) - cut["embed.weight"]
    assert [local for local, _ in answers] == [whole + rest // 2 + 15 * 16, whole + rest // 2 + 14 * 16]
    assert all(sorted(map(sorted, kinds)) == [["DTensor"], ["Parameter"]] for _, kinds in answers)


def drop(rank):
    """Outputs and gradients of a model with dropout whose ranks were seeded differently, under tp=2 and under dp=2."""
    batch = build_batches("vit", 1)[0][0]
    found = []
    for settings in ({"tp": 2}, {"dp": 2}):
        plan = Plan(**settings)
        torch.manual_seed(rank + 7)
        model = ViT(CONFIGS["vit"].model_copy(update={"dropout": 0.5})).double().train()
        parallel = parallelize(model, plan, build_mesh(plan))
        loss = parallel.accumulate_gradients(ImageTask(), [batch]).loss
        norm_grad = dict(parallel.named_parameters())["encoder.ln.weight"].grad.tolist()
        found.append((loss, norm_grad, torch.rand(1).item()))
    return found


def test_tensor_neighbors_drop_the_same_values_and_data_ranks_their_own():
    (tensor_first, data_first), (tensor_second, data_second) = run_ranks(drop, 2)
    assert tensor_first == tensor_second
    assert data_first[2] != data_second[2]
