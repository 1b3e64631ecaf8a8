"""Settings that contradict each other are refused before anything is done."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek.core.errors import ConfigError
from deepseek.data.config import DataConfig, ImagesConfig
from deepseek.train.config import TrainConfig
from deepseek.train.run_state import deciding_settings


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"sequence_length": 65}, "sequence_length"),
        ({"sequence_length": 64, "max_len": 2048}, None),  # packed rows are not cut at max_len
        ({"batching": "token_budget", "sequence_length": 64, "max_len": 65}, "max_len"),
        ({"batching": "token_budget", "sequence_length": 65, "max_len": 64}, "sequence_length"),
        ({"batching": "token_budget", "sequence_length": 65, "max_len": 64, "heldout_fraction": 0}, None),
    ],
)
def test_rows_longer_than_the_models_are_refused_in_training_and_in_evaluation(
    data: dict[str, Any], name: str | None
) -> None:
    values = {"model": {"max_length": 64}, "data": data}
    if name is None:
        TrainConfig.from_dict(values)
        return
    with pytest.raises(ConfigError, match=rf"data\.{name} makes rows of 65 tokens and model\.max_length is 64"):
        TrainConfig.from_dict(values)


def test_a_step_learns_from_the_rows_of_all_its_micro_batches() -> None:
    packed = {"data": {"batch_size": 6, "sequence_length": 32}, "accum_steps": 5}
    assert TrainConfig.from_dict(packed).sequences_per_step == 30
    budget = {"batching": "token_budget", "max_tokens": 100, "max_len": 30, "sequence_length": 32}
    assert TrainConfig.from_dict({"data": budget, "accum_steps": 2}).sequences_per_step == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_weights": "a.safetensors"}, "belong to a model that init names; give init, too"),
        ({"init_settings": {"width": 8}}, "belong to a model that init names; give init, too"),
        ({"init": "gpt2", "model": {"num_layers": 2}}, "init=gpt2 brings the model's shape, and model is set as well"),
    ],
)
def test_init_that_contradicts_other_settings_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)


def test_the_length_of_a_model_of_init_is_not_known_before_it_is_open() -> None:
    TrainConfig.from_dict({"init": "gpt2", "data": {"sequence_length": 5000}})


@pytest.mark.parametrize("task", ["image_classification", {"kind": "image_classification", "label_smoothing": 0.0}])
def test_data_without_a_kind_is_of_the_kind_that_the_task_asks_for(task: Any) -> None:
    config = TrainConfig.from_dict({"task": task, "data": {"sources": "birds"}})
    assert config.data == ImagesConfig(sources=("birds",))
    assert TrainConfig.from_dict({}).data == DataConfig() == TrainConfig.from_dict({"data": {}}).data


def test_another_task_brings_its_kind_of_data_unless_one_is_chosen() -> None:
    text = TrainConfig.from_dict({"data": {"sequence_length": 32}})
    images = text.override({"task": "image_classification", "data.sources": "birds", "data.augmentation.flip": 0})
    assert images.data == ImagesConfig.from_dict({"sources": "birds", "augmentation": {"flip": 0}})
    assert images.override({"task.kind": "image_classification"}) == images
    assert images.override({"task": "causal_lm"}).data == DataConfig()
    assert text.override({"task": "causal_lm"}).data == text.data
    mixed = text.override({"task": "image_classification", "data.kind": "text"})
    assert mixed.data == text.data
    with pytest.raises(ConfigError, match=r"learns from data of the kind images and data\.kind is text; set"):
        mixed.data_of(ImagesConfig)


def test_rows_longer_than_the_decoders_say_nothing_of_another_model() -> None:
    TrainConfig.from_dict({"task": "image_classification", "model": {"max_length": 64}, "data": {"sources": "birds"}})


def test_another_number_of_workers_is_no_other_run() -> None:
    images = TrainConfig.from_dict({"task": "image_classification", "data": {"sources": "birds"}})
    assert deciding_settings(images) == deciding_settings(images.override({"data.num_workers": 3}))
    assert deciding_settings(images) != deciding_settings(images.override({"data.seed": 3}))


def test_two_averages_of_the_weights_are_refused():
    with pytest.raises(ConfigError, match="schedule_free, which averages the weights itself; leave ema_decay out"):
        TrainConfig(ema_decay=0.9, optimizer={"name": "schedule_free"})


def test_the_documents_name_of_clipping_is_read():
    assert TrainConfig(ds_grad_clip=0.5) == TrainConfig(optimizer={"grad_clip": 0.5})
    with pytest.raises(ConfigError, match=r"ds_grad_clip and optimizer\.grad_clip are two names of one setting"):
        TrainConfig(ds_grad_clip=0.5, optimizer={"grad_clip": 0.5})
