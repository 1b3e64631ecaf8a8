"""A loss that is no number: skipped, stopped or rewound, and the same weights however the run was interrupted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from deepseek.artifact.reading import open_artifact
from deepseek.checkpoint.restoring import newest_valid
from deepseek.core.errors import TrainingError
from deepseek.train.loop import train
from tests.train.own_task import NUM_POINTS, configure, line_with

BAD = (7, 19)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return open_artifact(folder / "model").tensors()


def assert_same_model(one: Path, other: Path) -> None:
    left, right = weights_of(one), weights_of(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_a_run_stops_at_a_bad_step_with_the_position_of_its_batch(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step \d+, in the batch at epoch 0, index \d+ of the data.*checkpoint"
    ):
        list(train(configure(tmp_path), task=line_with(*BAD)))
    assert not (tmp_path / "model").exists()
    saved = newest_valid(tmp_path / "checkpoints")
    assert saved is None or all(torch.isfinite(value).all() for value in saved.state["model"].values())


@pytest.mark.parametrize("answer", ["skip", "rewind"])
def test_a_run_goes_on_past_bad_steps_with_finite_weights_and_statistics(answer: str, tmp_path: Path) -> None:
    events = list(train(configure(tmp_path, on_bad_step=answer), task=line_with(*BAD)))
    kind = {"skip": "step_skipped", "rewind": "run_rewound"}[answer]
    bad = [event for event in events if event.kind == kind]
    num_epochs = 30 * 4 / NUM_POINTS
    most = math.ceil(num_epochs) if answer == "skip" else math.inf  # a run that goes back sees more of the data
    assert len(BAD) * math.floor(num_epochs) <= len(bad) <= len(BAD) * most
    assert all(event.reason == "the loss is nan" for event in bad)
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(tmp_path).values())
    assert events[-1].kind == "model_saved"


def test_a_skipped_step_changes_nothing_but_the_count(tmp_path: Path) -> None:
    """Against a loop by hand that leaves the batches with a bad point out."""
    task = line_with(*BAD)(configure(tmp_path, on_bad_step="skip"))
    list(train(task.config, task=type(task)))
    data = task.open_data(tmp_path)
    torch.manual_seed(task.config.seed)
    model = task.build_model(data).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.6 * task.config.sequences_per_step / 256)
    for _ in range(task.config.num_steps):
        batch = data.loader.next_batch()
        if batch.isnan().any():
            continue
        optimizer.zero_grad()
        (task.loss(model(*task.inputs(batch)), batch) / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, tensor in weights_of(tmp_path).items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=1e-3)


def test_a_rewound_run_is_the_run_without_the_batch(tmp_path: Path) -> None:
    """Going back changes when a step is done, and neither its number nor its batch: a loop by hand leaves them out."""
    task = line_with(*BAD)(configure(tmp_path, on_bad_step="rewind"))
    events = list(train(task.config, task=type(task)))
    rewound = [event for event in events if event.kind == "run_rewound"]
    assert rewound and all(event.to_step % 4 == 0 and event.to_step < event.step for event in rewound)
    data = task.open_data(tmp_path)
    torch.manual_seed(task.config.seed)
    model = task.build_model(data).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.6 * task.config.sequences_per_step / 256)
    num_steps = 0
    while num_steps < task.config.num_steps:
        batch = data.loader.next_batch()
        if batch.isnan().any():
            continue
        optimizer.zero_grad()
        (task.loss(model(*task.inputs(batch)), batch) / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        num_steps += 1
    for name, tensor in weights_of(tmp_path).items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("answer", ["skip", "rewind"])
def test_bad_steps_are_the_same_for_a_run_that_is_interrupted(answer: str, tmp_path: Path) -> None:
    changes = {"on_bad_step": answer}
    list(train(configure(tmp_path / "whole", **changes), task=line_with(*BAD)))
    for _ in range(40):
        events = train(configure(tmp_path / "parts", **changes), task=line_with(*BAD))
        for number, event in enumerate(events):
            if number >= 6 and event.kind in ("step_done", "step_skipped", "run_rewound"):
                events.close()
                break
            if event.kind == "model_saved":
                break
        else:
            break
        if (tmp_path / "parts" / "model").exists():
            break
    assert_same_model(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("answer", ["skip", "rewind"])
def test_a_precision_that_is_chosen_by_layer_sees_every_step_and_survives_bad_ones(answer: str, tmp_path: Path) -> None:
    changes = {"on_bad_step": answer, "precision": "dynamic"}
    events = list(train(configure(tmp_path / "whole", **changes), task=line_with(*BAD)))
    skipped = [event.step for event in events if event.kind == "step_skipped"]
    assert bool(skipped) == (answer == "skip")
    planned = [event.step for event in events if event.kind == "precision_planned"]
    assert planned and max(planned) <= 30  # steps of the run, those that were skipped counted in
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(tmp_path / "whole").values())
    for last in (5, 9, 20):
        for event in (parts := train(configure(tmp_path / "parts", **changes), task=line_with(*BAD))):
            if event.kind in ("step_done", "step_skipped") and event.step >= last:
                parts.close()
                break
    list(train(configure(tmp_path / "parts", **changes), task=line_with(*BAD)))
    assert_same_model(tmp_path / "whole", tmp_path / "parts")


def test_a_skipped_step_is_evaluated_and_saved_like_any_other(tmp_path: Path) -> None:
    """Whether it is one in the middle or the last: what goes on from there ends with the same weights."""
    answer = {"on_bad_step": "skip", "checkpoint_every": 500}
    whole = list(train(configure(tmp_path / "whole", **answer), task=line_with(*BAD)))
    skipped = [event.step for event in whole if event.kind == "step_skipped"]
    middle = next(step for step in skipped if step > 5)
    changes = answer | {"checkpoint_every": middle, "evaluate_every": middle, "keep_checkpoints": 9}
    for folder, num_steps in (("on", 30), ("last", middle)):
        config = configure(tmp_path / folder, **changes, num_steps=num_steps)
        events = list(train(config, task=line_with(*BAD)))
        saved = [event.step for event in events if event.kind == "checkpoint_saved"]
        assert saved == [*range(middle, num_steps, middle), num_steps]
        if folder == "on":
            assert [event.step for event in events if event.kind == "evaluated"] == saved
            assert_same_model(tmp_path / "whole", tmp_path / folder)
    list(train(configure(tmp_path / "last", **changes), task=line_with(*BAD)))
    assert_same_model(tmp_path / "whole", tmp_path / "last")


@pytest.mark.parametrize("answer", ["skip", "rewind"])
def test_bad_steps_without_end_end_the_run(answer: str, tmp_path: Path) -> None:
    config = configure(tmp_path, on_bad_step=answer, max_bad_steps=3)
    with pytest.raises(TrainingError, match="3 bad steps in a row"):
        list(train(config, task=line_with(*range(NUM_POINTS))))
