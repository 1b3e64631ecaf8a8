"""Recipe defaults: learning rate 5e-4 * batch_size / 256, AdamW, weight decay 0.01, clipping at 1.0, `accum_steps`."""

import pytest
import torch

import deepseek as ds
from deepseek.core.errors import ConfigError
from deepseek.optim.learning_rates import scale_learning_rate
from deepseek.optim.optimizers import build_optimizer
from deepseek.train import TrainConfig, train


@pytest.mark.parametrize("batch_size", [1, 64, 256, 1000])
def test_the_learning_rate_scales_with_the_batch(batch_size):
    assert scale_learning_rate(batch_size) == pytest.approx(5e-4 * batch_size / 256)


def test_the_default_optimizer_is_adamw_with_a_decay_of_a_hundredth_and_clipping_at_one():
    settings = TrainConfig().optimizer
    assert (settings.weight_decay, settings.grad_clip) == (0.01, 1.0)
    net = torch.nn.Linear(3, 3)
    optimizer = build_optimizer(net, settings, learning_rate=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    before = net.weight.detach().clone()
    net.weight.grad, net.bias.grad = torch.zeros(3, 3), torch.zeros(3)
    optimizer.step()  # without a gradient, a step is the decay alone
    torch.testing.assert_close(net.weight, before * (1 - 0.1 * 0.01))


def test_a_run_peaks_at_the_rate_for_all_rows_of_a_step(tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    started = {}
    for name, rows in {"wide": {"data.batch_size": 8}, "narrow": {"data.batch_size": 2, "accum_steps": 4}}.items():
        config = tiny_run(tmp_path / name, tmp_path / "text.txt").override(rows)
        events = {event.kind: event for event in train(config)}
        started[name] = events["run_started"].learning_rate
    assert started == {"wide": pytest.approx(5e-4 * 8 / 256), "narrow": pytest.approx(5e-4 * 8 / 256)}


def test_a_checkpoint_comes_at_least_every_500_steps():
    assert TrainConfig().checkpoint_every <= 500
    with pytest.raises(ConfigError, match="checkpoint_every"):
        TrainConfig(checkpoint_every=501)


def test_the_120_million_parameter_recipe_has_120_million_parameters():
    config = ds.recipes.load_recipe("decoder_120m")
    with torch.device("meta"):
        model = ds.models.decoder.model.Decoder(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(120e6, rel=0.05)
    assert (config.optimizer.name, config.optimizer.weight_decay) == ("adamw", 0.01)
    assert config.data.sequence_length == 2048


def tiny_run(folder, source):
    """A run of two steps whose optimizer is the default one."""
    return TrainConfig(num_steps=2).override(
        {
            "folder": str(folder),
            "data.sources": [str(source)],
            "data.document_separator": "\n",
            "data.vocab_size": 257,
            "data.sequence_length": 8,
            "model.vocab_size": 257,
            "model.num_layers": 1,
            "model.hidden_size": 16,
            "model.num_heads": 2,
            "model.ffn_size": 16,
        }
    )
