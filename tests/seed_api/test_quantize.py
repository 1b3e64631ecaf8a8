"""int8 for transformers: a report of size, loss and speed against the original, with refusal when it costs too much."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import deepseek as ds
from deepseek.core.errors import DeepSeekError
from deepseek.data.batching import Batch

COMMAND = str(Path(sys.executable).with_name("deepseek"))


@pytest.fixture(scope="module")
def batches(tokenizer, text):
    ids = torch.tensor(tokenizer.encode(text)[: 4 * 65]).view(4, 65)
    return [Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), 4 * 64)]


@torch.inference_mode()
def loss_of_transformers(folder, batches):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (batch,) = batches
    logits = model(batch.tokens_BT).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten()).item()


def test_the_report_says_what_int8_costs_and_brings(model_folder, batches, tmp_path):
    report = ds.quantize(model_folder, tmp_path / "int8", batches)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (model_folder, tmp_path / "int8")]
    assert report.bytes_ratio == pytest.approx(sizes[1] / sizes[0], abs=0.02)  # files have headers, too
    assert report.bytes_ratio < 0.35
    assert report.loss_before == pytest.approx(loss_of_transformers(model_folder, batches), rel=1e-4)
    assert report.loss_after == pytest.approx(report.loss_before, rel=0.02)
    assert report.decode_speedup > 0


def test_nothing_is_written_when_the_loss_rises_too_much(model_folder, batches, tmp_path):
    assert inspect.signature(ds.quantize).parameters["max_loss_increase"].default == 0.02
    with pytest.raises(DeepSeekError, match="nothing was written"):
        ds.quantize(model_folder, tmp_path / "int8", batches, max_loss_increase=-0.5)
    assert list(tmp_path.iterdir()) == []


def test_the_command_reports_the_same_and_the_new_model_names_its_parent(model_folder, text, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    command = [COMMAND, "quantize", str(model_folder), "int8", "--text", "text.txt", "--max-tokens", "2000", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["bytes_ratio"] < 0.35
    child, parent = (ds.artifact.reading.read_manifest(folder) for folder in (tmp_path / "int8", model_folder))
    assert child.parent_digest == parent.digest
    assert child.precision == "int8"
