"""The loss of the task is torch's cross-entropy over the targets that count."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from deepseek.data.batching import IGNORED_TARGET, Batch
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.train.config import TrainConfig
from deepseek.train.tasks.causal_lm import CausalLM

SHAPE = {"vocab_size": 32, "num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_length": 16}


def test_the_loss_is_torchs_over_the_targets_that_count() -> None:
    torch.manual_seed(0)
    task = CausalLM(TrainConfig.from_dict({"model": SHAPE, "data": {"sequence_length": 8, "max_len": 16}}))
    model = Decoder(DecoderConfig.from_dict(SHAPE))
    targets = torch.randint(0, 32, (3, 8))
    targets[1, 4:] = IGNORED_TARGET
    batch = Batch(torch.randint(0, 32, (3, 8)), targets, int((targets != IGNORED_TARGET).sum()))
    outputs = task.forward(model, batch)
    expected = F.cross_entropy(model(batch.tokens_BT).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(task.loss(outputs, batch), expected)
    assert task.count_units(batch) == 20


def test_evaluation_sees_the_mask_wholly_in_force() -> None:
    settings = {"model": SHAPE | {"mask": {"opening_steps": 100}}, "data": {"sequence_length": 8, "max_len": 16}}
    task = CausalLM(TrainConfig.from_dict(settings))
    model = Decoder(task.config.model)
    tokens = torch.randint(0, 32, (1, 12))
    model.eval()
    task.on_step(model, 0)
    opening = model(tokens)
    task.on_step(model, 0, is_evaluating=True)
    closed = model(tokens)
    task.on_step(model, 100)
    assert torch.equal(closed, model(tokens))
    assert not torch.equal(opening, closed)
