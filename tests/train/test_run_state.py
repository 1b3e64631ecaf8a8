"""Going on: with more steps, from any checkpoint, and not from what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from deepseek.artifact.reading import open_artifact
from deepseek.core.errors import CheckpointError
from deepseek.models import zoo
from deepseek.train.loop import train
from deepseek.train.run_state import compile_blocks_
from tests.train import tiny_texts
from tests.train.own_task import Line, configure


def run(folder: Path, **changes: object) -> list[int]:
    return [event.step for event in train(configure(folder, **changes), task=Line) if event.kind == "step_done"]


def assert_same_model(one: Path, other: Path) -> None:
    left, right = (open_artifact(folder / "model").tensors() for folder in (one, other))
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    assert run(tmp_path / "parts", num_steps=10) == list(range(1, 11))
    assert run(tmp_path / "parts", num_steps=30) == list(range(11, 31))
    assert_same_model(tmp_path / "whole", tmp_path / "parts")  # the rate is constant, so that the schedule is the same


def test_a_new_run_goes_on_from_a_checkpoint_of_another(tmp_path: Path) -> None:
    run(tmp_path / "whole", keep_checkpoints=20)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000012"
    assert run(tmp_path / "branch", resume_from=str(checkpoint))[0] == 13
    assert_same_model(tmp_path / "whole", tmp_path / "branch")
    assert run(tmp_path / "branch", resume_from=str(checkpoint)) == []  # its own checkpoints are newer


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(CheckpointError, match="has done 30 steps and num_steps is 20"):
        run(tmp_path, num_steps=20)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(CheckpointError, match=r"optimizer\.weight_decay was 0\.0 and is 0\.5"):
        run(tmp_path, **{"optimizer.weight_decay": 0.5})


# Settings whose features keep something from step to step.
FEATURES = {
    "adaptive clipping": {"optimizer.adaptive_clip": 60, "optimizer.adaptive_clip_window": 5},
    "gradient prediction": {"optimizer.gradient_prediction": {"sensitivity": 0.1}},
    "schedule-free": {"optimizer.name": "schedule_free"},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_run_that_was_stopped_becomes_equal_with_everything_that_has_a_memory(feature: str, tmp_path: Path) -> None:
    if feature == "schedule-free":
        pytest.importorskip("schedulefree")
    # Norms are free to vary, and the rate is one at which they do.
    common = {"evaluate_every": 7, "optimizer.grad_clip": None, "optimizer.base_learning_rate": 20.0}
    changes = common | FEATURES[feature]
    run(tmp_path / "plain", **common)
    run(tmp_path / "whole", **changes)
    for last in (6, 7, 13):  # within a window, at an evaluation, and after one
        for event in (events := train(configure(tmp_path / "parts", **changes), task=Line)):
            if event.kind == "step_done" and event.step == last:
                events.close()
                break
    run(tmp_path / "parts", **changes)
    assert_same_model(tmp_path / "whole", tmp_path / "parts")
    plain, whole = (open_artifact(tmp_path / name / "model").tensors() for name in ("plain", "whole"))
    assert not torch.equal(plain["2.weight"], whole["2.weight"])  # the feature is at work


def test_blocks_of_many_shapes_are_all_compiled_for_training_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    def compile_with_count(module: nn.Module) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=count)

    monkeypatch.setattr(nn.Module, "compile", compile_with_count)
    model = zoo.build("resnet18", width=2, depths=[2, 2], stem="cifar", num_classes=2)
    # Not by monkeypatch, which deletes settings of this module when it is done.
    with torch._dynamo.config.patch(recompile_limit=4, fail_on_recompile_limit_hit=True), torch.no_grad():
        compile_blocks_(model)
        for is_training in (True, False):
            model.train(is_training)(torch.randn(2, 3, 8, 8))
    assert len(compiled) == 2 * 3  # in each stage the first block and the others, which are alike in the first stage


@pytest.mark.filterwarnings("ignore:the texts yield")
def test_a_key_that_is_new_in_a_users_own_settings_is_another_run(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": number % 2} for number in range(8)]
    sources = tiny_texts.write_rows(tmp_path / "rows.jsonl", rows)
    data = {"sources": sources, "batch_size": 4, "heldout_fraction": 0, "max_len": 32}
    config = tiny_texts.configure(tmp_path / "run", {"kind": "sequence_classification"}, data, num_steps=1)
    list(train(config))
    changed = config.override({"num_steps": 2, "init_settings": {**config.init_settings, "hidden_act": "relu"}})
    with pytest.raises(CheckpointError, match=r"other settings \(init_settings\.hidden_act was None and is 'relu'\)"):
        list(train(changed))
