"""Frozen parameters stay bit-equal, and so does what a frozen batch norm remembers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.models import zoo
from deepseek.models.decoder.model import Decoder
from deepseek.nn.freezing import freeze_
from tests.models.decoders import EXAMPLES


def train_a_little(model: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.train()
        model(*inputs).square().mean().backward()
        optimizer.step()
    return {name: tensor for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_what_matches_stays_and_the_rest_learns() -> None:
    torch.manual_seed(0)
    model = Decoder(EXAMPLES["llama"])
    frozen = freeze_(model, ["embed", "layers.0.*", "*norm*"])
    expected = {
        name for name, _ in model.named_parameters() if name.startswith(("embed.", "layers.0.")) or "norm" in name
    }
    assert set(frozen) == expected
    changed = train_a_little(model, torch.randint(0, 64, (2, 8)))
    assert set(changed) == {name for name, _ in model.named_parameters()} - expected


def test_batch_norms_of_frozen_blocks_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = zoo.build("resnet18", width=8, num_classes=3)
    freeze_(model, ["conv1", "bn1", "layer[12]"])
    changed = train_a_little(model, torch.randn(4, 3, 32, 32))
    assert not [name for name in changed if name.startswith(("conv1", "bn1", "layer1", "layer2"))]
    assert {"layer3.0.bn1.running_mean", "layer4.1.conv2.weight", "fc.weight"} <= set(changed)
    # A norm of a frozen block normalizes as in evaluation: the same image gives the same values in any batch.
    images = torch.randn(4, 3, 32, 32)
    stem = nn.Sequential(model.conv1, model.bn1, model.layer1, model.layer2).train()
    torch.testing.assert_close(stem(images)[:1], stem(images[:1]), rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_frozen_by_either_of_its_names() -> None:
    for pattern in ("head", "embed"):
        model = Decoder(EXAMPLES["llama with biases, tied"])
        freeze_(model, [pattern])
        assert not model.embed.weight.requires_grad


def test_a_pattern_that_matches_nothing_is_refused_with_near_names() -> None:
    model = Decoder(EXAMPLES["llama"])
    with pytest.raises(ConfigError, match=r"freeze has the pattern 'layer.0', which matches no parameter .*'layers.0'"):
        freeze_(model, ["embed", "layer.0"])
    with pytest.raises(ConfigError, match=r"matches no parameter of this model; they are called embed\.weight"):
        freeze_(model, ["xyz"])
    with pytest.raises(ConfigError, match="matches every parameter, so that nothing is left to train"):
        freeze_(model, ["*"])
