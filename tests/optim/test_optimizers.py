import copy
import math

import pytest
import torch
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.nn.masks import MaskConfig
from deepseek.nn.moe import MoEConfig
from deepseek.optim.optimizers import (
    JointOptimizer,
    OptimizerConfig,
    build_optimizer,
    load_optimizer_state,
    set_learning_rate,
    split_parameters,
)

SMALL = {"vocab_size": 64, "num_layers": 2, "hidden_size": 32, "num_heads": 2, "ffn_size": 48, "max_length": 16}
CONFIGS = {
    "llama": DecoderConfig(**SMALL),
    "llama with a head of its own": DecoderConfig(**SMALL, tie_embeddings=False),
    "gpt2": DecoderConfig(
        **SMALL, norm="layer", feedforward="gelu", position="learned", attention_bias=True, feedforward_bias=True
    ),
    "experts and mask": DecoderConfig(**SMALL, moe=MoEConfig(num_experts=3, ffn_size=16), mask=MaskConfig()),
}
NAMES = ["adamw", "muon", "sgd"]


def make(shape):
    torch.manual_seed(0)
    return Decoder(CONFIGS[shape])


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def parts_of(optimizer):
    return optimizer.parts if isinstance(optimizer, JointOptimizer) else (optimizer,)


def names_in(model, parameters):
    names = {id(each): name for name, each in model.named_parameters()}
    return {names[id(each)] for each in parameters}


@pytest.mark.parametrize("shape", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_each_parameter_is_in_exactly_one_group_and_moves(shape, name):
    model = make(shape)
    optimizer = build_optimizer(model, OptimizerConfig(name=name), 0.1)
    grouped = [id(each) for group in optimizer.param_groups for each in group["params"]]
    assert sorted(grouped) == sorted(id(each) for each in model.parameters())
    in_parts = [id(each) for part in parts_of(optimizer) for group in part.param_groups for each in group["params"]]
    assert sorted(in_parts) == sorted(grouped)
    before = {key: each.detach().clone() for key, each in model.named_parameters()}
    set_gradients(model, 1)
    optimizer.step()
    assert [key for key, each in model.named_parameters() if torch.equal(each, before[key])] == []


@pytest.mark.parametrize("shape", CONFIGS)
def test_only_weights_that_multiply_are_decayed(shape):
    model = make(shape)
    decayed, kept = (names_in(model, each) for each in split_parameters(model))
    assert decayed.isdisjoint(kept) and decayed | kept == {name for name, _ in model.named_parameters()}
    for name in kept:
        assert "norm" in name or name.endswith("bias") or "embed" in name, name
    for name in decayed:
        assert name.endswith("weight") or name.endswith("_proj"), name
        assert "norm" not in name and "embed" not in name, name
    assert ("head.weight" in decayed) == (not model.config.tie_embeddings)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_are_left_out(name):
    model = make("llama")
    model.layers[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig(name=name), 0.1)
    grouped = names_in(model, [each for group in optimizer.param_groups for each in group["params"]])
    assert grouped == {key for key, each in model.named_parameters() if each.requires_grad}


def adamw_by_hand(value, gradients, *, rate, decay, betas, eps):
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    value, first, second = value.double(), 0.0, 0.0
    for step, gradient in enumerate((each.double() for each in gradients), start=1):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient.square()
        corrected = [moment / (1 - beta**step) for moment, beta in zip((first, second), betas, strict=True)]
        value = value - rate * (corrected[0] / (corrected[1].sqrt() + eps) + decay * value)
    return value


def sgd_by_hand(value, gradients, *, rate, decay, momentum):
    value, velocity = value.double(), 0.0
    for gradient in (each.double() for each in gradients):
        velocity = momentum * velocity + gradient + decay * value
        value = value - rate * velocity
    return value


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_three_steps_are_the_formula_in_float64(name):
    config = OptimizerConfig(name=name, weight_decay=0.1, betas=(0.8, 0.97), eps=1e-6, momentum=0.9)
    model = make("experts and mask")
    before = {key: each.detach().clone() for key, each in model.named_parameters()}
    decayed = names_in(model, split_parameters(model)[0])
    optimizer = build_optimizer(model, config, 0.01)
    gradients = {key: [] for key in before}
    for seed in range(3):
        set_gradients(model, seed)
        for key, each in model.named_parameters():
            gradients[key].append(each.grad.clone())
        optimizer.step()
    for key, each in model.named_parameters():
        decay = 0.1 if key in decayed else 0.0
        if name == "adamw":
            expected = adamw_by_hand(before[key], gradients[key], rate=0.01, decay=decay, betas=(0.8, 0.97), eps=1e-6)
        else:
            expected = sgd_by_hand(before[key], gradients[key], rate=0.01, decay=decay, momentum=0.9)
        torch.testing.assert_close(each.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_decayed_without_decay():
    model = make("llama")
    before = {key: each.detach().clone() for key, each in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw", weight_decay=0.0), 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(each, before[key]) for key, each in model.named_parameters())


class TestMuon:
    @pytest.mark.parametrize("shape", CONFIGS)
    def test_it_takes_the_matrices_between_the_embedding_and_the_head(self, shape):
        model = make(shape)
        optimizer = build_optimizer(model, OptimizerConfig(name="muon"), 0.1)
        muon, adamw = (
            names_in(model, [each for group in part.param_groups for each in group["params"]])
            for part in optimizer.parts
        )
        for name in muon:
            assert name.startswith("layers.") and name.endswith("_proj.weight"), name
        for name in adamw:
            assert any(part in name for part in ("embed", "head", "norm", "bias", "gate", "feedforward.experts")), name

    def test_an_update_has_the_size_of_an_adamw_update_and_near_equal_singular_values(self):
        torch.manual_seed(0)
        model = nn.Linear(400, 16)
        before = model.weight.detach().clone()
        optimizer = build_optimizer(model, OptimizerConfig(name="muon", weight_decay=0.0), 0.01)
        set_gradients(model, 1)
        optimizer.step()
        update = (model.weight.detach() - before).double()
        # Liu et al. 2025, section 2.2: an orthogonal matrix times 0.2 sqrt(max(rows, columns)).
        singular = torch.linalg.svdvals(update) / (0.01 * 0.2 * math.sqrt(400))
        assert singular.min() > 0.6 and singular.max() < 1.3
        assert update.square().mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=0.35)

    def test_it_is_each_part_stepping_by_itself(self):
        model = make("experts and mask")
        twin = copy.deepcopy(model)
        config = OptimizerConfig(name="muon", weight_decay=0.1)
        joint, parts = build_optimizer(model, config, 0.01), build_optimizer(twin, config, 0.01).parts
        for seed in range(3):
            set_gradients(model, seed)
            set_gradients(twin, seed)
            joint.step()
            for part in parts:
                part.step()
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)

    def test_clearing_gradients_clears_those_of_both(self):
        model = make("llama")
        optimizer = build_optimizer(model, OptimizerConfig(name="muon"), 0.1)
        set_gradients(model, 0)
        optimizer.zero_grad()
        assert all(each.grad is None for each in model.parameters())

    def test_a_model_without_matrices_is_refused(self):
        model = nn.ModuleList([nn.Embedding(64, 32), nn.LayerNorm(32), nn.Linear(32, 4)])
        with pytest.raises(ConfigError, match="this model has none between its embedding and head; choose 'adamw'"):
            build_optimizer(model, OptimizerConfig(name="muon"), 0.1)

    def test_it_takes_no_closure(self):
        optimizer = build_optimizer(make("llama"), OptimizerConfig(name="muon"), 0.1)
        with pytest.raises(ConfigError, match=r"takes no closure; compute the gradients before step\(\)"):
            optimizer.step(lambda: 0.0)

    def test_a_hook_before_the_step_runs_once(self):
        model = make("llama")
        optimizer = build_optimizer(model, OptimizerConfig(name="muon"), 0.1)
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append(1))
        set_gradients(model, 0)
        optimizer.step()
        assert calls == [1]

    def test_a_schedule_of_torch_reaches_both_parts(self):
        optimizer = build_optimizer(make("llama"), OptimizerConfig(name="muon"), 0.1)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.05}


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_optimizer_goes_on_bit_equal(name, tmp_path):
    config = OptimizerConfig(name=name, momentum=0.9)
    model = make("experts and mask")
    optimizer = build_optimizer(model, config, 0.01)
    for seed in range(2):
        set_gradients(model, seed)
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    twin = make("experts and mask")
    twin.load_state_dict(state["model"])
    other = build_optimizer(twin, config, 0.5)
    other.load_state_dict(state["optimizer"])
    for seed in range(2, 4):
        for each, own in ((model, optimizer), (twin, other)):
            set_learning_rate(own, 0.01 / seed)
            set_gradients(each, seed)
            own.step()
    for one, again in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, again, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_reaches_every_part_also_after_loading(name):
    optimizer = build_optimizer(make("llama"), OptimizerConfig(name=name), 0.1)
    for rate in (0.2, 0.3):
        set_learning_rate(optimizer, rate)
        for part in (optimizer, *parts_of(optimizer)):
            assert {group["lr"] for group in part.param_groups} == {rate}
        optimizer.load_state_dict(optimizer.state_dict())
        for part in (optimizer, *parts_of(optimizer)):
            assert {group["lr"] for group in part.param_groups} == {rate}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "adam"}, "setting 'name' is 'adam': input should be 'adamw', 'muon', 'schedule_free' or 'sgd'"),
        ({"base_learning_rate": 0}, "setting 'base_learning_rate' is 0"),
        ({"grad_clip": 0}, "setting 'grad_clip' is 0"),
        ({"momentum": 1}, "setting 'momentum' is 1"),
        ({"schedule": "step"}, "setting 'schedule' is 'step'"),
        ({"weight_decy": 0.1}, r"unknown setting 'weight_decy'; did you mean 'weight_decay'\?"),
    ],
)
def test_settings_without_a_meaning_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**values)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_from_a_file_goes_on_where_channels_lie_last(name):
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Linear(16, 16)).to(memory_format=torch.channels_last)
        return model, build_optimizer(model, OptimizerConfig(name=name), 0.1)

    def step(model, optimizer, seed):
        set_gradients(model, seed)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        optimizer.step()

    whole, whole_optimizer = build()
    for seed in range(3):
        step(whole, whole_optimizer, seed)
    model, optimizer = build()
    for seed in range(2):
        step(model, optimizer, seed)
    rows = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.contiguous().clone(), optimizer.state_dict())
    again, again_optimizer = build()
    again.load_state_dict(model.state_dict())
    load_optimizer_state(again_optimizer, rows)
    step(again, again_optimizer, 2)
    for found, expected in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)
