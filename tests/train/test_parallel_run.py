"""Runs under plans on two ranks, against the same run in one process: losses, weights, files, and going on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.artifact.reading import open_artifact, read_manifest
from deepseek.checkpoint.restoring import newest_valid
from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import Plan
from deepseek.train.config import TrainConfig
from deepseek.train.loop import train
from deepseek.train.parallel_run import DealtLoader, apply_settings, split_step
from tests.distributed.ranks import run_ranks
from tests.train.own_task import configure, line_with

NUM_STEPS = 4
PLANS: dict[str, dict[str, Any]] = {
    "dp": {"dp": 2},
    "tp": {"tp": 2},
    "pp": {"pp": 2, "recomputation": "full"},
    "zero": {"dp": 2, "zero_stage": 3},
    "cp": {"cp": 2},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "text"
    folder.mkdir()
    source = random.Random(0)
    words = ["def", "return", "import", "class", "self", "value", "for", "in", "range", "print"]
    for number in range(6):
        lines = [" ".join(source.choices(words, k=8)) for _ in range(60)]
        (folder / f"text{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def make_config(corpus: Path | str, folder: Path | str, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "folder": str(folder),
        "model": {"vocab_size": 301, "num_layers": 2, "hidden_size": 16, "num_heads": 2, "max_length": 32},
        "data": {
            "sources": [str(corpus)],
            "heldout_fraction": 0.2,
            "vocab_size": 300,
            "sequence_length": 16,
            "batch_size": 4,
        },
        "optimizer": {"name": "sgd", "base_learning_rate": 6.4, "schedule": "constant", "warmup_steps": 0},
        "num_steps": NUM_STEPS,
        "precision": "fp32",
        "log_every": 1,
    }
    return TrainConfig.from_dict(values).override(changes)


def losses_of(events: list[Any]) -> list[float]:
    return [event.loss for event in events if event.kind == "step_done"]


def read_weights(folder: Path) -> dict[str, Tensor]:
    return open_artifact(folder / "model").tensors()


def assert_same_weights(one: Path, other: Path, atol: float = 2e-6) -> None:
    left, right = read_weights(one), read_weights(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(
            tensor, right[name], rtol=2e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


ADAMW_ROUNDING = 1e-4  # a hundredth of a step: it takes the sign of a gradient that is zero but for rounding
ADAMW = {"optimizer.name": "adamw", "optimizer.base_learning_rate": 0.64, "ema_decay": 0.9, "checkpoint_every": 2}


def learn_under_plans(rank: int, corpus: str, folder: str) -> dict[str, list[float]]:
    """One run under each plan, a run that is stopped under one and goes on under another, and runs that are refused."""
    found = {}
    for name, settings in PLANS.items():
        events = list(train(make_config(corpus, f"{folder}/{name}"), plan=Plan(**settings)))
        assert rank == 0 or not events  # events are rank 0's
        found[name] = losses_of(events)

    events = train(make_config(corpus, f"{folder}/moved", **ADAMW), plan=Plan(dp=2, zero_stage=1))
    for event in events:
        if event.kind == "step_done" and event.step == 3:
            events.close()
            break
    list(train(make_config(corpus, f"{folder}/moved", **ADAMW), plan=Plan(tp=2)))
    list(train(make_config(corpus, f"{folder}/forth", **ADAMW), plan=Plan(pp=2)))  # one process began

    with pytest.raises(ConfigError, match=r"rank 1 has num_steps=5 and rank 0 num_steps=4; start all ranks"):
        list(train(make_config(corpus, f"{folder}/other", num_steps=NUM_STEPS + rank), plan=Plan(dp=2)))
    with pytest.raises(ConfigError, match=r"for 4 ranks and there are 2; start 4, or .* for 2: dp=2; "):
        list(train(make_config(corpus, f"{folder}/wide"), plan=Plan(dp=4)))
    return found


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(corpus: Path, folder: Path) -> list[float]:
    """Runs of one process, and the beginning of one that ranks go on with."""
    for name in ("adamw", "back"):
        list(train(make_config(corpus, folder / name, **ADAMW)))
    events = train(make_config(corpus, folder / "forth", **ADAMW))
    for event in events:
        if event.kind == "checkpoint_saved":
            break
    events.close()
    return losses_of(list(train(make_config(corpus, folder / "alone"))))


@pytest.fixture(scope="module")
def losses(corpus: Path, folder: Path, alone: list[float]) -> dict[str, list[float]]:
    return run_ranks(learn_under_plans, 2, str(corpus), str(folder))[0]


@pytest.mark.parametrize("name", PLANS)
def test_a_run_learns_the_same_under_a_plan(
    name: str, losses: dict[str, list[float]], alone: list[float], folder: Path
) -> None:
    assert len(alone) == NUM_STEPS
    assert alone[0] > alone[-1] + 0.1
    assert losses[name] == pytest.approx(alone, rel=1e-5)
    assert_same_weights(folder / name, folder / "alone")
    manifest, usual = read_manifest(folder / name / "model"), read_manifest(folder / "alone" / "model")
    assert manifest.plan == Plan(**PLANS[name]).as_dict()
    assert manifest.metrics == pytest.approx(usual.metrics, rel=1e-4)
    assert manifest.data_position == usual.data_position
    assert {name: file.num_bytes for name, file in manifest.files.items()} == {
        name: file.num_bytes for name, file in usual.files.items()
    }


def test_a_run_goes_on_under_another_plan_and_in_one_process(
    losses: dict[str, list[float]], corpus: Path, folder: Path
) -> None:
    for name in ("moved", "forth"):
        assert_same_weights(folder / name, folder / "adamw", ADAMW_ROUNDING)
    half = folder / "moved" / "checkpoints" / "step-00000003"
    list(train(make_config(corpus, folder / "home", resume_from=str(half), **ADAMW)))
    assert_same_weights(folder / "home", folder / "adamw", ADAMW_ROUNDING)


def test_a_checkpoint_of_ranks_is_that_of_one_process(losses: dict[str, list[float]], folder: Path) -> None:
    one, other = (newest_valid(folder / name / "checkpoints") for name in ("adamw", "forth"))
    assert one is not None
    assert other is not None
    assert one.state.keys() ^ other.state.keys() == {"ranks_rng"}
    assert one.state["model"].keys() == other.state["model"].keys()
    left, right = one.state["optimizer"], other.state["optimizer"]
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for index, values in left["state"].items():
        for key, value in values.items():
            torch.testing.assert_close(value, right["state"][index][key], rtol=1e-3, atol=1e-6)
    for name, average in one.state["average"]["averages"].items():
        torch.testing.assert_close(average, other.state["average"]["averages"][name], rtol=2e-4, atol=2e-6)


def meet_a_bad_step(rank: int, folder: str) -> list[str]:
    """A point that is no number lies in the rows of one rank; both leave the step out, or go back."""
    kinds: list[str] = []
    for answer in ("skip", "rewind"):
        config = configure(Path(folder) / answer, on_bad_step=answer, num_steps=8, accum_steps=2)
        kinds += [event.kind for event in train(config, task=line_with(7), plan=Plan(dp=2))]
    return kinds


def test_a_step_that_is_no_number_on_one_rank_is_taken_by_none(tmp_path: Path) -> None:
    kinds = run_ranks(meet_a_bad_step, 2, str(tmp_path))[0]
    assert "step_skipped" in kinds
    assert "run_rewound" in kinds
    config = configure(tmp_path / "alone", on_bad_step="skip", num_steps=8, accum_steps=2)
    events = list(train(config, task=line_with(7)))
    assert kinds.count("step_skipped") == sum(event.kind == "step_skipped" for event in events)
    ranks, alone = read_weights(tmp_path / "skip"), read_weights(tmp_path / "alone")
    assert all(torch.isfinite(tensor).all() for tensor in ranks.values())
    assert ranks.keys() == alone.keys()


def test_rows_of_a_step_are_dealt_over_ranks() -> None:
    config = TrainConfig.from_dict({"data": {"batch_size": 12}, "accum_steps": 2})
    cases = {(1, 1): (12, 2), (2, 1): (12, 2), (4, 1): (6, 4), (8, 1): (3, 8), (2, 4): (4, 6), (3, 1): (8, 3)}
    for (dp, size), expected in cases.items():
        split = split_step(config, Plan(dp=dp, micro_batch_size=size))
        assert (split.data.rows_per_batch, split.accum_steps) == expected
        assert split.sequences_per_step == config.sequences_per_step
        assert split.accum_steps % dp == 0


def test_a_pipeline_gets_micro_batches_enough_to_be_busy() -> None:
    config = TrainConfig.from_dict({"data": {"batch_size": 16}})
    interleaved = Plan(pp=4, schedule="interleaved", virtual_stages=2)
    plans = {Plan(pp=2): 4, Plan(pp=4, dp=2): 1, Plan(pp=2, micro_batch_size=8): 8, interleaved: 2}
    assert {plan: split_step(config, plan).data.rows_per_batch for plan in plans} == plans
    with pytest.raises(ConfigError, match="1 micro-batches cannot be interleaved over 4 stages"):
        split_step(config, Plan(pp=4, schedule="interleaved", virtual_stages=2, micro_batch_size=16))


def test_rows_that_cannot_be_dealt_are_refused_with_those_that_can() -> None:
    config = TrainConfig.from_dict({"data": {"batch_size": 4}})
    with pytest.raises(ConfigError, match=r"dp=3 does not divide the 4 rows of a step .* choose one of 1, 2, 4"):
        split_step(config, Plan(dp=3))
    with pytest.raises(ConfigError, match="micro_batch_size=3 does not divide the 2 rows"):
        split_step(config, Plan(dp=2, micro_batch_size=3))
    whole = TrainConfig.from_dict({"data": {"batching": "token_budget", "max_len": 64}})
    with pytest.raises(ConfigError, match=r"whole batches, .* accum_steps=1 to a multiple of dp=2"):
        split_step(whole, Plan(dp=2))


@pytest.mark.parametrize(
    ("changes", "plan", "message"),
    [
        ({"precision": "dynamic"}, {"dp": 2}, "precision=dynamic decides in one process"),
        ({"ds_memory_profiler": True}, {"dp": 2}, "ds_memory_profiler watches one process"),
        ({"ds_activation_checkpoint": 0.5}, {"dp": 2}, "measured on a whole model"),
        ({"compile": "blocks"}, {"tp": 2}, "compile=blocks goes with plans that cut nothing"),
        ({"ds_activation_checkpoint": "selective"}, {"recomputation": "full"}, "leave one of them out"),
    ],
)
def test_what_a_plan_cannot_have_is_refused_by_name(
    changes: dict[str, Any], plan: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_settings(TrainConfig().override(changes), Plan(**plan))


def test_recomputation_of_a_plan_is_that_of_the_run() -> None:
    assert apply_settings(TrainConfig(), Plan(recomputation="full")).ds_activation_checkpoint == "block"
    assert apply_settings(TrainConfig(compile="blocks"), Plan(dp=2)).compile == "blocks"


def test_a_loader_that_knows_of_no_ranks_is_dealt_out() -> None:
    class Numbers:
        def __init__(self) -> None:
            self.next = 0

        def next_batch(self) -> int:
            self.next += 1
            return self.next - 1

        def state_dict(self) -> dict[str, Any]:
            return {"next": self.next}

        def load_state_dict(self, state: Any) -> None:
            self.next = state["next"]

    loaders = [DealtLoader(Numbers(), rank, 3) for rank in range(3)]
    assert [[loader.next_batch() for _ in range(2)] for loader in loaders] == [[0, 3], [1, 4], [2, 5]]
    assert {loader.state_dict()["next"] for loader in loaders} == {6}
    loaders[1].load_state_dict({"next": 3})
    assert loaders[1].next_batch() == 4


def test_a_plan_of_several_ranks_says_how_to_start_them(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"for 4 ranks and this process is alone; .* deepseek launch --ranks 4 train"):
        list(train(make_config(corpus, tmp_path), plan=Plan(tp=2, dp=2)))
