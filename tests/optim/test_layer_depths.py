"""Depths follow the blocks of every family, and learning rates follow the depths."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.models import zoo
from deepseek.models.decoder.model import Decoder
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.optim.layer_depths import find_depths
from deepseek.optim.optimizers import OptimizerConfig, build_optimizer, set_learning_rate
from tests.models.decoders import EXAMPLES

BERT = transformers.BertConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40
)


def depths_by_prefix(model: nn.Module, *prefixes: str) -> tuple[list[set[int]], int]:
    depths, last = find_depths(model)
    return [{depth for name, depth in depths.items() if name.startswith(prefix)} for prefix in prefixes], last


def test_a_decoders_layers_are_its_blocks() -> None:
    found, last = depths_by_prefix(
        Decoder(EXAMPLES["gpt2, not tied"]), "embed", "position", "layers.0.", "layers.1.", "norm", "head"
    )
    assert (found, last) == ([{0}, {0}, {1}, {2}, {3}, {3}], 3)


def test_an_encoders_layers_are_its_blocks() -> None:
    model = TransformersModel(transformers.BertForSequenceClassification(BERT))
    prefix = "model.bert.encoder.layer"
    found, last = depths_by_prefix(model, "model.bert.embeddings", f"{prefix}.0.", f"{prefix}.1.", "model.classifier")
    assert (found, last) == ([{0}, {1}, {2}, {3}], 3)


def test_a_vits_layers_are_its_blocks() -> None:
    model = zoo.build("vit_b_16", image_size=32, hidden_size=24, num_heads=2, num_layers=2, mlp_size=24)
    prefix = "encoder.layers.encoder_layer_"
    found, last = depths_by_prefix(
        model, "class_token", "conv_proj", "encoder.pos", f"{prefix}0", f"{prefix}1", "encoder.ln", "heads"
    )
    assert (found, last) == ([{0}, {0}, {0}, {1}, {2}, {3}, {3}], 3)


def test_a_resnets_blocks_count_through_its_stages() -> None:
    found, last = depths_by_prefix(
        zoo.build("resnet18", width=8), "conv1", "layer1.0", "layer1.1", "layer2.0", "layer4.1", "fc"
    )
    assert (found, last) == ([{0}, {1}, {2}, {3}, {8}, {9}], 9)


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_each_block_learns_at_its_power_of_the_decay(name: str) -> None:
    torch.manual_seed(0)
    model = Decoder(EXAMPLES["llama"])
    optimizer = build_optimizer(model, OptimizerConfig(name=name, layer_decay=0.5), 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for peak in (0.1, 0.02):
        set_learning_rate(optimizer, peak)
        rates = {names[id(parameter)]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        assert len(rates) == len(names)
        expected = {"head.weight": 1, "norm.weight": 1, "layers.1.attention.q_proj.weight": 0.5}
        expected |= {"layers.0.feedforward_norm.weight": 0.25, "embed.weight": 0.125}
        assert {name: rates[name] for name in expected} == {
            name: pytest.approx(peak * factor) for name, factor in expected.items()
        }


def test_one_step_of_sgd_moves_each_weight_by_its_own_rate() -> None:
    torch.manual_seed(0)
    model = Decoder(EXAMPLES["llama"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = OptimizerConfig(name="sgd", layer_decay=0.5, weight_decay=0)
    optimizer = build_optimizer(model, config, 0.1)
    model(torch.randint(0, 64, (2, 8))).square().mean().backward()
    optimizer.step()
    for name, factor in (("head.weight", 1), ("layers.1.feedforward.up_proj.weight", 0.5), ("embed.weight", 0.125)):
        parameter = model.get_parameter(name)
        torch.testing.assert_close(parameter, before[name] - 0.1 * factor * parameter.grad)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no list of blocks; set optimizer"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(layer_decay=0.9), 0.1)
