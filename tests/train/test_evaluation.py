"""The held-out loss: of the model as it will be loaded, and without a trace in the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek.data.batching import evaluation_batches
from deepseek.data.corpus import load_data
from deepseek.models.loading import load_model
from deepseek.train.evaluation import evaluate
from deepseek.train.events import Evaluated
from deepseek.train.loop import train
from deepseek.train.tasks.causal_lm import CausalLM
from tests.train.test_loop import assert_bit_equal, make_config, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "text"
    write_corpus(folder)
    return folder


def test_evaluating_on_the_way_changes_no_weight(corpus: Path, tmp_path: Path) -> None:
    for _ in train(make_config(corpus, tmp_path / "quiet")):
        pass
    events = list(train(make_config(corpus, tmp_path / "watched", evaluate_every=2)))
    assert [event.step for event in events if isinstance(event, Evaluated)] == [2, 4, 6, 8, 10, 12]
    assert_bit_equal(tmp_path / "quiet", tmp_path / "watched")


def test_a_run_too_short_to_open_its_mask_reports_the_loss_of_the_model_that_is_loaded(
    corpus: Path, tmp_path: Path
) -> None:
    changes = {"model.mask.opening_steps": 1000, "precision": "fp32", "optimizer.base_learning_rate": 2.0}
    config = make_config(corpus, tmp_path, **changes)
    (evaluated,) = [event for event in train(config) if isinstance(event, Evaluated)]
    data = load_data(config.data, tmp_path / "data")
    assert data.heldout is not None
    batches = evaluation_batches(data.heldout, config.data)
    metrics, num_tokens = evaluate(CausalLM(config), load_model(tmp_path / "model"), batches, precision="fp32")
    expected = pytest.approx(metrics["heldout_loss"], rel=1e-6), num_tokens
    assert (evaluated.heldout_loss, evaluated.num_units) == expected


def test_evaluation_stops_at_its_limit_and_leaves_the_mode_as_it_was(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path)
    for _ in train(config):
        pass
    data = load_data(config.data, tmp_path / "data")
    assert data.heldout is not None
    model = load_model(tmp_path / "model")
    for is_training in (True, False):
        model.train(is_training)
        batches = evaluation_batches(data.heldout, config.data)
        _, num_tokens = evaluate(CausalLM(config), model, batches, precision="fp32", max_units=200)
        assert num_tokens == 256  # two batches of 4 rows of 32
        assert model.training is is_training
    assert all(not parameter.requires_grad or parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
