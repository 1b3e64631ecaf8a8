"""The whole product in one small test: text, training, artifact, int8, generation, a request over HTTP."""

import json
import math
import random
import urllib.request
from pathlib import Path

import torch

import deepseek as ds
from deepseek.artifact.reading import open_artifact
from deepseek.data.batching import evaluation_batches
from deepseek.data.corpus import load_data
from deepseek.data.tokenizing import load_tokenizer
from deepseek.recipes import load_recipe
from deepseek.serve.engine import Engine
from deepseek.serve.server import running_server
from deepseek.train import train

SENTENCES = ("the cat sat on the mat", "a dog ran to the door", "the dog sat on a cat", "a cat ran to a mat")
VOCAB_SIZE = 280


def test_text_becomes_a_model_that_is_served(tmp_path):
    write_text(tmp_path / "text")
    config = load_recipe("decoder_tiny").override(
        {
            "folder": str(tmp_path / "run"),
            "data.sources": [str(tmp_path / "text")],
            "data.heldout_fraction": 0.25,
            "data.vocab_size": VOCAB_SIZE,
            "data.sequence_length": 32,
            "model.vocab_size": VOCAB_SIZE,
            "model.num_layers": 1,
            "model.max_length": 64,
            "num_steps": 40,
            "log_every": 1,
        }
    )
    events = list(train(config))
    steps = [event for event in events if event.kind == "step_done"]
    (evaluated,) = (event for event in events if event.kind == "evaluated")
    assert len(steps) == 40
    assert abs(steps[0].loss - math.log(VOCAB_SIZE)) < 0.3  # an untrained model knows nothing
    assert evaluated.heldout_loss < 1.5  # four sentences leave little to guess

    folder, int8_folder = tmp_path / "run" / "model", tmp_path / "run" / "model-int8"
    assert open_artifact(folder).manifest.metrics["heldout_loss"] == evaluated.heldout_loss
    data = load_data(config.data, tmp_path / "run" / "data")
    report = ds.quantize(folder, int8_folder, evaluation_batches(data.heldout, config.data))
    assert report.bytes_ratio < 0.35
    assert math.isclose(report.loss_before, evaluated.heldout_loss, rel_tol=0.02)  # bf16 there, FP32 here
    assert report.loss_increase < 0.01

    tokenizer = load_tokenizer(int8_folder)
    prompt, expected = "the cat sat on", greedy_by_hand(folder, "the cat sat on", num_tokens=8)
    (answer,) = Engine(ds.load_model(folder, packed=True), tokenizer).generate([prompt], max_tokens=8)
    assert answer.text == expected

    int8 = ds.load_model(int8_folder, packed=True)
    (int8_answer,) = Engine(int8, tokenizer).generate([prompt], max_tokens=8)
    with running_server(int8, tokenizer) as server:
        served = post(
            f"{server.url}/v1/completions",
            {"model": "deepseek", "prompt": prompt, "max_tokens": 8, "temperature": 0},
        )
    assert served["choices"][0]["text"] == int8_answer.text
    assert served["usage"]["completion_tokens"] == int8_answer.num_generated


def write_text(folder: Path) -> None:
    folder.mkdir()
    for number in range(24):
        lines = random.Random(number).choices(SENTENCES, k=40)  # no two alike, so that none is held out and trained on
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")


@torch.inference_mode()
def greedy_by_hand(folder: Path, prompt: str, *, num_tokens: int) -> str:
    """The likeliest token again and again, over the whole text each time: no cache, no engine."""
    model, tokenizer = ds.load_model(folder), load_tokenizer(folder)
    tokens = tokenizer.encode(prompt)
    for _ in range(num_tokens):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokenizer.decode(tokens).removeprefix(prompt)


def post(url: str, body: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
