"""Files are converted like dicts, in shards that the safetensors library reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deepseek.compat.sharded_checkpoints import convert_files
from deepseek.compat.version_converter import VersionConverter
from deepseek.core.errors import ArtifactError, ConfigError
from tests.compat.models import build, logits


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}


def save_model(model: torch.nn.Module, folder: Path) -> Path:
    """A model as generation 5.0 has it on disk, with its config."""
    folder.mkdir()
    save_file({name: each.clone() for name, each in model.state_dict().items()}, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "resnet"])
def test_files_are_converted_like_dicts(family: str, tmp_path: Path) -> None:
    model = build(family)
    source = save_model(model, tmp_path / "source")
    converter = VersionConverter("5.0", "3.5")
    seen: list[tuple[int, int]] = []
    report = convert_files(
        converter, source, tmp_path / "out", max_shard_bytes=4000, on_progress=lambda *each: seen.append(each)
    )
    expected = converter.convert(model.state_dict())
    found = load_folder(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert set(report.actions) == set(expected.report.actions)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert seen[-1][0] == seen[-1][1] == sum(each.numel() * each.element_size() for each in expected.values())


def test_sharded_and_single_files_and_back_load_in_transformers(tmp_path: Path) -> None:
    model = build("llama")
    source = save_model(model, tmp_path / "source")
    convert_files(VersionConverter("5.0", "4.0"), source, tmp_path / "sharded", max_shard_bytes=3000)
    convert_files(VersionConverter("4.0", "2.0"), tmp_path / "sharded", tmp_path / "single")
    assert [path.name for path in sorted((tmp_path / "single").iterdir())] == ["config.json", "model.safetensors"]
    convert_files(VersionConverter("2.0", "5.0"), tmp_path / "single", tmp_path / "back", max_shard_bytes=3000)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert torch.equal(logits(loaded), logits(model))


def test_a_quantised_model_with_odd_sizes_is_read_by_the_library(tmp_path: Path) -> None:
    weights = {"a.weight": torch.randn(3, 5), "b.weight": torch.randn(5, 3), "b.bias": torch.randn(5)}
    save_file(weights, tmp_path / "in.safetensors")
    convert_files(VersionConverter("1.0", "1.0-quant"), tmp_path / "in.safetensors", tmp_path / "out")
    expected = VersionConverter("1.0", "1.0-quant").convert(weights)
    found = load_folder(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_empty_tensors_and_scalars_survive(tmp_path: Path) -> None:
    weights = {"none": torch.empty(0, 3), "one": torch.tensor(2.5), "flags": torch.tensor([True, False])}
    save_file(weights, tmp_path / "in.safetensors")
    convert_files(VersionConverter("2.0", "5.0"), tmp_path / "in.safetensors", tmp_path / "out")
    found = load_folder(tmp_path / "out")
    assert all(torch.equal(found[name], weights[name]) and found[name].shape == weights[name].shape for name in weights)


def test_an_existing_folder_is_never_written_over(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "in.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out exists"):
        convert_files(VersionConverter("2.0", "5.0"), tmp_path / "in.safetensors", tmp_path / "out")


def test_a_failing_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1e6])}, tmp_path / "in.safetensors")
    with pytest.raises(ArtifactError, match="beyond the range"):
        convert_files(VersionConverter("2.0", "3.5", dtype="fp16"), tmp_path / "in.safetensors", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_phi3_folder_is_left_alone_by_its_config(tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in build("phi3").state_dict().items()}
    (tmp_path / "old").mkdir()
    save_file(weights, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_text('{"model_type": "phi3"}')
    report = convert_files(VersionConverter("4.0", "5.0"), tmp_path / "old", tmp_path / "new")
    assert "transformers holds" in report.notes[0]
    new = load_file(tmp_path / "new" / "model.safetensors")
    assert set(new) == set(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in new.items())
