"""Config files of every generation become settings of the trainer, or are refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepseek.compat.generation_configs import read_generation_config
from deepseek.compat.generations import load_table
from deepseek.compat.migration.applying import migrate
from deepseek.core.config import read_settings
from deepseek.core.errors import ConfigError
from deepseek.train.config import TrainConfig

# Values that a run on one device can follow, by key: (value in the file, setting of the trainer, its value).
FOLLOWED: dict[str, tuple[Any, str | None, Any]] = {
    "engine": ("pytorch", None, None),
    "backend": ("auto", None, None),
    "precision": ("fp32", "precision", "fp32"),
    "batch_size": (8, "data.batch_size", 8),
    "quantize": ("int8", None, None),
    "quantized": (True, None, None),
    "fp16": (False, "ds_amp_level", "O0"),
    "gradient_clip": (0.5, "optimizer.grad_clip", 0.5),
    "gradient_accumulation": (2, "accum_steps", 2),
    "distributed": ({"tensor_parallel": 1, "pipeline_parallel": 1}, None, None),
    "model_parallel": ({"tensor_parallel_size": 1}, None, None),
    "device_map": ({"gpu0": [0, 1]}, None, None),
    "data_loader": ({"shard_strategy": "hash", "buffer_size": 1024}, None, None),
    "ds_grad_clip": (0.5, "optimizer.grad_clip", 0.5),
    "ds_amp_level": ("O1", "ds_amp_level", "O1"),
    "ds_comm_backend": ("NCCL", None, None),
    "ds_memory_profiler": (True, "ds_memory_profiler", True),
    "ds_activation_checkpoint": (True, "ds_activation_checkpoint", "full"),
    "accum_steps": (4, "accum_steps", 4),
    "init_scale": (65536, None, None),
    "growth_factor": (2.0, None, None),
    "autoscaler": ({"minReplicas": 2}, None, None),
    "coldStartTimeout": ("60s", None, None),
    "initContainers": ([{"name": "model-loader"}], None, None),
}
FOLLOWED |= dict.fromkeys(("loss_scale", "backoff_factor", "growth_interval", "min_loss_scale"), (2, None, None))
RESOURCE = {"apiVersion", "kind", "spec"}


def setting(config: TrainConfig, name: str) -> Any:
    value: Any = config.to_dict()
    for part in name.split("."):
        value = value[part]
    return value


def test_every_key_of_every_generation_is_known() -> None:
    known = {key for row in load_table().generations for key in row.config_keys}
    assert known - RESOURCE <= set(FOLLOWED)


@pytest.mark.parametrize("row", load_table().generations, ids=lambda row: row.name)
def test_a_file_with_all_keys_of_a_generation_trains(row: Any) -> None:
    keys = [key for key in row.config_keys if key not in RESOURCE]
    values = {"generation": row.name, **{key: FOLLOWED[key][0] for key in keys}}
    reading = read_generation_config(values)
    assert reading is not None
    assert reading.generation == row.name
    config = TrainConfig.from_dict(reading.settings)
    for key in keys:
        value, name, expected = FOLLOWED[key]
        if name is not None:
            assert setting(config, name) == expected, key
        if name is None or (name, expected) != (key, value):
            assert key in str(reading), key


@pytest.mark.parametrize(
    ("values", "generation"),
    [
        ({"engine": "pytorch"}, "1.0"),
        ({"quantized": True}, "1.0-quant"),
        ({"fp16": True}, "2.0"),
        ({"gradient_clip": 1.0, "quantize": "int8"}, "2.3"),
        ({"ds_grad_clip": 1.0}, "3.0"),
        ({"coldStartTimeout": 30}, "4.0"),
        ({"backend": "auto"}, "5.0"),
        ({"gradient_clip": 1.0, "ds_amp_level": "O1"}, "5.0"),
    ],
)
def test_a_file_without_a_name_is_of_the_oldest_generation_with_its_keys(
    values: dict[str, Any], generation: str
) -> None:
    reading = read_generation_config(values)
    assert reading is not None
    assert str(reading).startswith(f"read as generation {generation}")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"num_steps": 3},
        {"ds_amp_level": "O0", "accum_steps": 2, "precision": "fp32"},
        {"ds_activation_checkpoint": "full", "data": {"batch_size": 4}},
    ],
)
def test_a_file_of_the_trainer_itself_is_left_alone(values: dict[str, Any]) -> None:
    assert read_generation_config(values) is None


def test_settings_of_the_trainer_go_with_those_of_a_generation() -> None:
    reading = read_generation_config(
        {"generation": "v2.0", "gradient_clip": 0.5, "optimizer": {"name": "sgd"}, "num_steps": 7}
    )
    assert reading is not None
    config = TrainConfig.from_dict(reading.settings)
    assert (config.optimizer.name, config.optimizer.grad_clip, config.num_steps) == ("sgd", 0.5, 7)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"generation": "v7.7"}, "unknown generation 'v7.7'"),
        ({"generation": None}, "unknown generation 'None'"),
        ({"engine": "tensorflow"}, "train on PyTorch"),
        ({"generation": "2.3", "precision": "int8"}, "deepseek quantize"),
        ({"fp16": "maybe"}, "expected true or false, or ds_amp_level"),
        ({"distributed": {"tensor_parallel": 4}}, "distributed.tensor_parallel is 4, and a run trains on one device"),
        ({"model_parallel": {"pipeline_parallel_size": True}}, "pipeline_parallel_size is True"),
        ({"model_parallel": {"tensor_parallel_sise": 1}}, "did you mean 'model_parallel.tensor_parallel_size'"),
        ({"model_parallel": [1]}, "expected a section"),
        ({"device_map": {"gpu0": [0], "gpu1": [1]}}, "names gpu0, gpu1"),
        ({"data_loader": {"shard_strategy": "robin"}}, "unknown data_loader.shard_strategy 'robin'"),
        ({"gradient_clip": 1.0, "ds_grad_clip": 2.0}, "gradient_clip and ds_grad_clip both set optimizer.grad_clip"),
        ({"gradient_clip": 1.0, "optimizer": {"grad_clip": 2.0}}, "both set optimizer.grad_clip"),
        ({"fp16": True, "ds_amp_level": "O0"}, "both set ds_amp_level"),
        ({"apiVersion": "deepseek.io/v1", "kind": "InferenceJob"}, "Kubernetes resource"),
    ],
)
def test_a_file_that_cannot_be_followed_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_generation_config(values)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("old", "changes"),
    [
        ("generation: v2.0\nfp16: false\ngradient_clip: 0.5\n", {"ds_amp_level": "O0", "optimizer.grad_clip": 0.5}),
        ("generation: v2.3\nfp16: yes\ngradient_accumulation: 2\n", {"ds_amp_level": "O1", "accum_steps": 2}),
        ("generation: v3.0\nds_activation_checkpoint: on\n", {"ds_activation_checkpoint": "full"}),
        ("engine: pytorch\nbatch_size: 4\nprecision: fp32\n", {"data.batch_size": 4, "precision": "fp32"}),
        ("generation: v3.1\ndata_loader: {buffer_size: 8}\nds_grad_clip: 2\n", {"optimizer.grad_clip": 2.0}),
    ],
)
def test_a_file_means_the_same_before_and_after_its_migration(
    old: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text(old)
    assert migrate(tmp_path / "project", tmp_path / "new", "v5.0") == []
    readings = [read_generation_config(read_settings(tmp_path / name / "config.yaml")) for name in ("project", "new")]
    expected = TrainConfig().override(changes)
    assert [TrainConfig.from_dict(reading.settings) for reading in readings if reading] == [expected, expected]


@pytest.mark.parametrize(
    ("text", "generation", "setting_name", "value"),
    [
        ("version: v2.0\nfp16: false\ngradient_clip: 0.5\n", "2.0", "optimizer.grad_clip", 0.5),
        ("version: 2.0\nseed: 3\n", "2.0", "seed", 3),
        ("fp16: true\nloss_scale: 1024\ngradient_clip: 0.5\n", "2.0", "optimizer.grad_clip", 0.5),
        ("precision: fp32\nloss_scale: dynamic\n", "1.0", "precision", "fp32"),
        ("precision: fp32\ndistributed: {data_parallel: 1}\n", "2.0", "precision", "fp32"),
    ],
)
def test_keys_beside_the_documented_ones_train_before_and_after_a_migration(
    tmp_path: Path, text: str, generation: str, setting_name: str, value: Any
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text(text)
    migrate(tmp_path / "old", tmp_path / "new", "v5.0")
    for folder, names in (("old", {generation}), ("new", {generation, "3.0", "5.0"})):
        reading = read_generation_config(read_settings(tmp_path / folder / "config.yaml"))
        assert reading is not None
        assert reading.generation in names
        assert setting(TrainConfig.from_dict(reading.settings), setting_name) == value


def test_data_parallel_sizes_above_one_are_refused_like_the_others() -> None:
    with pytest.raises(ConfigError, match=r"distributed.data_parallel is 4, and a run trains on one device"):
        read_generation_config({"distributed": {"data_parallel": 4}})
