"""A model as one number: equal where structure, settings, code and weights are, another where any of them changes."""

import copy

import pytest
import torch
from torch import nn

from deepseek.compiler.runtimes.digests import digest_model


def test_the_digest_of_a_model_sees_settings_and_code():
    torch.manual_seed(0)
    one, same, other = (nn.Sequential(nn.LeakyReLU(slope)) for slope in (0.1, 0.1, 0.2))
    assert digest_model(one) == digest_model(same) != digest_model(other)
    assert digest_model(nn.Linear(2, 2)) != digest_model(nn.Linear(2, 2))


class Scale(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return x * self.weight


def change_one_bit(model):
    with torch.no_grad():
        model.weight.view(torch.int32)[0, 0] ^= 1


def change_the_shape(model):
    model.weight = nn.Parameter(model.weight.detach().reshape(3, 2))


def change_the_type_only(model):
    model.weight = nn.Parameter(model.weight.detach().view(torch.int32), requires_grad=False)


def change_a_buffer(model):
    model.count += 1


def rename_a_weight(model):
    model.gain = model.weight
    del model.weight


def add_a_layer(model):
    model.activation = nn.ReLU()


@pytest.mark.parametrize(
    "change",
    [change_one_bit, change_the_shape, change_the_type_only, change_a_buffer, rename_a_weight, add_a_layer],
)
def test_any_change_gives_another_digest(change):
    model = Scale(torch.arange(1.0, 7.0).reshape(2, 3))
    changed = copy.deepcopy(model)
    assert digest_model(changed) == digest_model(model)
    change(changed)
    assert digest_model(changed) != digest_model(model)


def test_another_forward_pass_of_a_class_of_the_same_name_gives_another_digest():
    def build(forward):
        kind = type("Scale", (Scale,), {"forward": forward, "__module__": __name__, "__qualname__": "Scale"})
        return kind(torch.ones(2))

    assert digest_model(build(lambda self, x: x * self.weight)) == digest_model(build(lambda self, x: x * self.weight))
    assert digest_model(build(lambda self, x: x * self.weight)) != digest_model(build(lambda self, x: x + self.weight))
    assert digest_model(build(lambda self, x: x.sin())) != digest_model(build(lambda self, x: x.cos()))


def test_how_weights_lie_in_memory_does_not_matter():
    weight = torch.arange(6.0).reshape(2, 3)
    lying = weight.t().contiguous().t()
    assert lying.stride() != weight.stride()
    assert digest_model(Scale(lying)) == digest_model(Scale(weight))


@pytest.mark.parametrize("weight", [torch.ones(0), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.bfloat16)])
def test_empty_meta_and_16_bit_weights_have_a_digest(weight):
    assert digest_model(Scale(weight)) == digest_model(Scale(weight.clone())) != digest_model(Scale(torch.ones(2)))
