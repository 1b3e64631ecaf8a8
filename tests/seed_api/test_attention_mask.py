"""The dynamic attention mask: local (distance at most 5) on some heads and global on others, by content and step."""

import pytest
import torch

import deepseek as ds
from deepseek.models.decoder.model import Decoder, DecoderConfig

LENGTH = 20
CHANGED = 4


def build(**mask):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=32, num_layers=1, hidden_size=32, num_heads=4, ffn_size=32, mask=ds.nn.MaskConfig(**mask)
    )
    return Decoder(config).double().eval()


def close_gates(model):
    """Every token says: near only."""
    with torch.no_grad():
        model.layers[0].attention.far_gate.weight.zero_()
        model.layers[0].attention.far_gate.bias.fill_(-1000)


@torch.inference_mode()
def positions_that_notice(model):
    """Positions whose logits change when the token at `CHANGED` becomes another one."""
    tokens = torch.arange(LENGTH)[None] % 32
    other = tokens.clone()
    other[0, CHANGED] = 31
    differences = (model(tokens) - model(other)).abs().amax(dim=-1)[0]
    return [position for position, difference in enumerate(differences.tolist()) if difference > 1e-12]


def test_five_tokens_back_is_the_default_distance():
    hard = build(local_heads=1.0, is_dynamic=False)
    assert positions_that_notice(hard) == list(range(CHANGED, CHANGED + 5 + 1))


@pytest.mark.parametrize("distance", [1, 3, 8])
def test_the_distance_can_be_chosen(distance):
    hard = build(local_heads=1.0, is_dynamic=False, local_distance=distance)
    assert positions_that_notice(hard) == list(range(CHANGED, CHANGED + distance + 1))


def test_with_global_heads_beside_local_ones_every_later_token_notices():
    assert positions_that_notice(build(local_heads=0.5, is_dynamic=False)) == list(range(CHANGED, LENGTH))


def test_by_default_the_content_of_a_token_opens_its_local_heads():
    model = build(local_heads=1.0)
    assert positions_that_notice(model) == list(range(CHANGED, LENGTH))
    close_gates(model)
    assert positions_that_notice(model) == list(range(CHANGED, CHANGED + 5 + 1))


def test_over_the_first_steps_local_heads_close_from_global():
    model = build(local_heads=1.0, opening_steps=100)
    close_gates(model)
    model.set_step(0)
    assert positions_that_notice(model) == list(range(CHANGED, LENGTH))
    model.set_step(100)
    assert positions_that_notice(model) == list(range(CHANGED, CHANGED + 5 + 1))


def test_the_first_generations_recipe_uses_it():
    mask = ds.recipes.load_recipe("decoder_120m").model.mask
    assert mask.local_distance == 5
    assert mask.is_dynamic
    assert 0 < mask.local_heads < 1
