"""From a float artifact to an int8 one: what it costs, what it says of itself, and when it is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deepseek as ds
from deepseek.artifact.reading import open_artifact
from deepseek.compress.quantizing import quantize
from deepseek.core.errors import ArtifactError, ConfigError, CorruptArtifactError, DataError, PermanentError
from deepseek.data.batching import Batch
from deepseek.models.decoder.model import Decoder
from deepseek.models.loading import load_model, save_model
from tests.compress.test_quality import plain_loss


def test_public_name_is_this_function() -> None:
    assert ds.quantize is quantize


def test_the_comparison_is_what_the_files_and_a_plain_computation_say(
    source: Path, model: Decoder, batches: list[Batch], tmp_path: Path
) -> None:
    comparison = quantize(source, tmp_path / "int8", iter(batches))
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "int8" / "model.safetensors")
    assert comparison.bytes_before == sum(each.nbytes for each in before.values())
    assert comparison.bytes_after == sum(each.nbytes for each in after.values())
    assert comparison.bytes_ratio < 0.35
    assert comparison.num_tokens == sum(batch.num_target_tokens for batch in batches)
    assert comparison.loss_before == pytest.approx(plain_loss(model, batches), rel=1e-4)
    assert comparison.loss_after == pytest.approx(comparison.loss_before, rel=0.02)


def test_the_stored_model_is_the_measured_one(source: Path, batches: list[Batch], tmp_path: Path) -> None:
    """What was compared was packed for speed; what is loaded is not, and says the same."""
    comparison = quantize(source, tmp_path / "int8", batches)
    loaded = load_model(tmp_path / "int8")
    with torch.no_grad():
        summed = sum(
            torch.nn.functional.cross_entropy(
                loaded(batch.tokens_BT).flatten(0, 1), batch.targets_BT.flatten(), reduction="sum"
            ).item()
            for batch in batches
        )
    assert summed / comparison.num_tokens == pytest.approx(comparison.loss_after, rel=1e-3)


def test_every_stored_weight_is_the_original_within_half_a_step(source: Path, model: Decoder, tmp_path: Path) -> None:
    quantize(source, tmp_path / "int8", one_batch())
    stored, original = load_file(tmp_path / "int8" / "model.safetensors"), model.state_dict()
    rounded = [name for name, tensor in stored.items() if tensor.dtype is torch.int8]
    assert len(rounded) == 1 + 2 * (4 + 3)  # embedding, attention, experts
    for name in rounded:
        step = stored[f"{name}_scale"][..., None]
        turned = original[name].mT if "experts" in name else original[name]  # int8 experts are (outputs, inputs)
        error = (stored[name] * step - turned).abs()
        assert (error <= step * 0.501).all(), name
    kept = stored.keys() - rounded - {f"{name}_scale" for name in rounded}
    assert any("gate" in name for name in kept)  # what decides stays in float
    for name in kept:
        assert torch.equal(stored[name], original[name]), name


def one_batch() -> list[Batch]:
    tokens = torch.arange(20).reshape(2, 10)
    return [Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), 18)]


def test_the_new_artifact_names_its_parent_its_run_and_its_loss(
    source: Path, batches: list[Batch], tmp_path: Path
) -> None:
    comparison = quantize(source, tmp_path / "int8", batches)
    parent, child = open_artifact(source).manifest, open_artifact(tmp_path / "int8").manifest
    assert child.parent_digest == parent.digest != child.digest
    assert child.config_digest == parent.config_digest == "a run"
    assert child.precision == "int8"
    assert child.metrics == {"heldout_loss": comparison.loss_after}
    assert child.architecture_config == parent.architecture_config
    assert (tmp_path / "int8" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert parent.metrics == {"heldout_loss": 9.0}


def test_a_model_without_a_tokenizer_is_quantized_as_well(model: Decoder, batches: list[Batch], tmp_path: Path) -> None:
    save_model(model, tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "int8", batches)
    assert not (tmp_path / "int8" / "tokenizer.json").exists()


@pytest.mark.parametrize("bound", [-1.0, math.nan])
def test_above_the_bound_nothing_is_written(source: Path, batches: list[Batch], tmp_path: Path, bound: float) -> None:
    with pytest.raises(PermanentError, match="nothing was written") as caught:
        quantize(source, tmp_path / "int8", batches, max_loss_increase=bound)
    assert not isinstance(caught.value, ConfigError)
    assert list(tmp_path.iterdir()) == [source]


def test_a_model_whose_loss_is_not_a_number_is_not_written(
    model: Decoder, batches: list[Batch], tmp_path: Path
) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.norm.weight.fill_(math.nan)
    save_model(broken, tmp_path / "model")
    with pytest.raises(PermanentError, match="nothing was written"):
        quantize(tmp_path / "model", tmp_path / "int8", batches)
    assert not (tmp_path / "int8").exists()


def test_an_older_artifact_survives_a_refusal(source: Path, batches: list[Batch], tmp_path: Path) -> None:
    quantize(source, tmp_path / "int8", batches)
    before = open_artifact(tmp_path / "int8").manifest
    with pytest.raises(PermanentError, match="nothing was written"):
        quantize(source, tmp_path / "int8", batches, max_loss_increase=-1, overwrite=True)
    with pytest.raises(ArtifactError, match="holds an artifact already"):
        quantize(source, tmp_path / "int8", batches)
    assert open_artifact(tmp_path / "int8").manifest == before
    quantize(source, tmp_path / "int8", batches, overwrite=True)
    assert open_artifact(tmp_path / "int8").manifest.created_at > before.created_at


def test_a_target_in_use_is_refused_before_anything_is_measured(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "int8", one_batch())

    def unread() -> object:
        raise AssertionError("measured")
        yield

    with pytest.raises(ArtifactError, match="holds an artifact already"):
        quantize(source, tmp_path / "int8", unread())  # type: ignore[arg-type]


def test_a_folder_that_is_no_artifact_is_never_overwritten(source: Path, batches: list[Batch], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ArtifactError, match="not an artifact, and is left alone"):
        quantize(source, tmp_path / "photos", batches, overwrite=True)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


@pytest.mark.parametrize("way", ["same", "link"])
def test_the_float_model_is_kept(source: Path, batches: list[Batch], tmp_path: Path, way: str) -> None:
    target = source
    if way == "link":
        target = tmp_path / "link"
        target.symlink_to(source)
    with pytest.raises(ConfigError, match="the float model itself"):
        quantize(source, target, batches, overwrite=True)
    assert open_artifact(source).manifest.precision == "fp32"


def test_int8_of_int8_is_refused(source: Path, batches: list[Batch], tmp_path: Path) -> None:
    quantize(source, tmp_path / "int8", batches)
    with pytest.raises(ConfigError, match="int8 already"):
        quantize(tmp_path / "int8", tmp_path / "again", batches)
    assert not (tmp_path / "again").exists()


def test_no_text_to_compare_on_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token to predict"):
        quantize(source, tmp_path / "int8", [])
    assert not (tmp_path / "int8").exists()


def test_a_damaged_artifact_is_not_quantized(source: Path, batches: list[Batch], tmp_path: Path) -> None:
    path = source / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"model\.safetensors"):
        quantize(source, tmp_path / "int8", batches)
    assert not (tmp_path / "int8").exists()
