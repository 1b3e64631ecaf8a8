"""`deepseek quantize`: a smaller artifact and what it costs, or one sentence and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek.artifact.reading import open_artifact
from tests.cli.commands import Finished, Result, assert_one_sentence

Call = Callable[..., Result]


@pytest.fixture(scope="module")
def int8(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deepseek.cli.verbs.quantize import heldout_batches
    from deepseek.compress.quantizing import quantize

    folder = tmp_path_factory.mktemp("int8") / "model"
    with heldout_batches(model, str(corpus), 1000) as batches:
        quantize(model, folder, batches)
    return folder


def test_the_report_is_one_json_object_that_fits_the_files(
    call: Call, model: Path, corpus: Path, tmp_path: Path
) -> None:
    result = call("quantize", model, tmp_path / "int8", "--text", corpus, "--json")
    assert (result.status, result.err) == (0, "")
    report = json.loads(result.out)
    assert report["bytes_ratio"] == report["bytes_after"] / report["bytes_before"] < 0.35
    assert report["loss_increase"] == pytest.approx(report["loss_after"] / report["loss_before"] - 1)
    before = (model / "model.safetensors").stat().st_size
    after = (tmp_path / "int8" / "model.safetensors").stat().st_size
    assert report["bytes_before"] == pytest.approx(before, rel=0.05)
    assert report["bytes_after"] == pytest.approx(after, rel=0.15)  # the headers of files of a few kB
    artifact = open_artifact(tmp_path / "int8")
    assert artifact.manifest.precision == "int8"
    assert artifact.manifest.parent_digest == open_artifact(model).manifest.digest


def test_the_table_says_what_it_costs(call: Call, model: Path, corpus: Path, tmp_path: Path) -> None:
    result = call("quantize", model, tmp_path / "int8", "--text", corpus)
    assert result.status == 0
    for word in ("weights, MB", "loss, nats per token", "decoding, tokens/s", "before", "after", "ratio"):
        assert word in result.out
    assert "\x1b" not in result.out


def test_max_tokens_bounds_what_is_read(call: Call, model: Path, corpus: Path, tmp_path: Path) -> None:
    result = call("quantize", model, tmp_path / "int8", "--text", corpus, "--max-tokens", "100", "--json")
    assert json.loads(result.out)["num_tokens"] == 64 * 16  # one batch of rows as long as this model's context


def test_an_artifact_in_the_way_is_kept_unless_it_is_to_be_overwritten(call: Call, model: Path, int8: Path) -> None:
    before = (int8 / "manifest.json").read_bytes()
    result = call("quantize", model, int8, "--text", model / "tokenizer.json", "--json")
    assert_one_sentence(result, 1, str(int8), "holds an artifact already", "overwritten")
    assert (int8 / "manifest.json").read_bytes() == before
    assert call("quantize", model, int8, "--text", model / "tokenizer.json", "--overwrite", "--json").status == 0
    assert (int8 / "manifest.json").read_bytes() != before


def test_the_float_model_is_never_overwritten_by_its_own_int8(call: Call, model: Path, corpus: Path) -> None:
    before = open_artifact(model).manifest
    result = call("quantize", model, model / "..", "--text", corpus, "--overwrite", "--json")
    assert_one_sentence(result, 1, "not an artifact")
    result = call("quantize", model, model.parent / "checkpoints" / ".." / "model", "--text", corpus, "--overwrite")
    assert_one_sentence(result, 2, "the float model itself")
    assert open_artifact(model).manifest == before


def test_int8_of_int8_is_refused(call: Call, int8: Path, corpus: Path, tmp_path: Path) -> None:
    result = call("quantize", int8, tmp_path / "again", "--text", corpus, "--json")
    assert_one_sentence(result, 2, "int8 already", "float model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bound", ["-1", "nan"])
def test_a_loss_over_the_bound_writes_nothing(
    call: Call, model: Path, corpus: Path, tmp_path: Path, bound: str
) -> None:
    result = call(
        "quantize", model, tmp_path / "int8", "--text", corpus, "--max-loss-increase", bound, "--max-tokens", "1"
    )
    assert_one_sentence(result, 1, "nothing was written")
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_not_utf8_is_counted_on_standard_error(
    call: Call, model: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_bytes(b"def value(self) caf\xe9\n" * 40)
    with pytest.warns(UserWarning, match="40 places in 1 files are not UTF-8"):
        result = call("quantize", model, tmp_path / "int8", "--text", tmp_path / "text.txt", "--json")
    assert list(json.loads(result.out))[:2] == ["bytes_before", "bytes_after"]


@pytest.mark.parametrize(("text", "words"), [("/no/such", "/no/such"), ("empty.txt", "no text in")])
def test_text_that_is_missing_or_empty_is_one_sentence(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    result = call("quantize", model, "int8", "--text", text, "--json")
    assert_one_sentence(result, 1, words)
    assert not (tmp_path / "int8").exists()


def test_a_hugging_face_folder_and_a_run_are_quantized_like_the_artifact(
    call: Call, trained: Finished, corpus: Path, tmp_path: Path
) -> None:
    huggingface = shutil.copytree(trained.folder / "model", tmp_path / "hub")
    (huggingface / "manifest.json").unlink()
    weights = {}
    for name, source in (("artifact", trained.folder / "model"), ("hub", huggingface), ("run", trained.folder)):
        result = call("quantize", source, tmp_path / f"{name}-int8", "--text", corpus)
        assert (result.status, result.err) == (0, ""), name
        weights[name] = (tmp_path / f"{name}-int8" / "model.safetensors").read_bytes()
    assert weights["artifact"] == weights["hub"] == weights["run"]
    assert open_artifact(tmp_path / "hub-int8").manifest.parent_digest is None
