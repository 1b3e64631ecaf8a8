"""A corrected layer is the formula of the paper, in its outputs and its gradients; only the correction learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.models import zoo
from deepseek.models.decoder.model import Decoder
from deepseek.models.loading import make_int8_
from deepseek.nn.lora import LoRAConfig, LoRALinear, add_lora_, find_adapted, merge_lora_
from deepseek.nn.quantized import Int8Linear
from tests.models.decoders import EXAMPLES, randomize


def fill(model: nn.Module) -> nn.Module:
    """Corrections that are not zero."""
    generator = torch.Generator().manual_seed(5)
    for layer in find_adapted(model).values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator) * 0.1
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_formula(bias: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=bias).double()
    layer = LoRALinear(base, rank=3, scaling=0.7).double()
    layer.lora_B.data.normal_()
    x, weight = torch.randn(2, 4, 6, dtype=torch.double, requires_grad=True), torch.randn(2, 4, 5, dtype=torch.double)
    (layer(x) * weight).sum().backward()
    a, b, other = (tensor.detach().clone().requires_grad_() for tensor in (layer.lora_A, layer.lora_B, x))
    expected = other @ (base.weight.detach() + 0.7 * b @ a).T + (base.bias.detach() if bias else 0)
    torch.testing.assert_close(layer(x), expected)
    (expected * weight).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, a.grad)
    torch.testing.assert_close(layer.lora_B.grad, b.grad)
    torch.testing.assert_close(x.grad, other.grad)
    assert base.weight.grad is None


def written_out(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    return layer.base(x) + layer.scaling * (x @ layer.lora_A.T) @ layer.lora_B.T


def make_adapted() -> tuple[LoRALinear, torch.Tensor]:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(16, 12), rank=4, scaling=0.5)
    layer.lora_B.data.normal_()
    return layer, torch.randn(2, 5, 16, requires_grad=True)


def test_under_autocast_outputs_and_gradients_are_those_of_the_written_out_form() -> None:
    layer, x = make_adapted()
    results = []
    for run in (layer, lambda x: written_out(layer, x)):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, layer.lora_A, layer.lora_B))))
    assert results[0][0].dtype == torch.bfloat16
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_what_watches_or_trains_the_layer_below_is_served() -> None:
    layer, x = make_adapted()
    seen = []
    handle = layer.base.register_forward_hook(lambda *arguments: seen.append(arguments[2].shape))
    layer(x)
    handle.remove()
    assert seen == [(2, 5, 12)]
    layer.base.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.base.weight.grad, x.detach().sum((0, 1)).expand(12, 16))


def test_a_compiled_layer_gives_the_same_gradients() -> None:
    layer, x = make_adapted()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for tensor in (x, layer.lora_A, layer.lora_B):
        ours, theirs = (torch.autograd.grad(run(x).square().sum(), tensor)[0] for run in (compiled, layer))
        torch.testing.assert_close(ours, theirs)


def test_dropout_is_before_the_correction_and_only_in_training() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(8, 4), rank=2, scaling=2.0, dropout=0.5)
    layer.lora_B.data.normal_()
    x = torch.randn(3, 8)
    torch.manual_seed(1)
    y = layer.train()(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(y, layer.base(x) + 2.0 * dropped @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer.eval()(x), x @ (layer.base.weight + layer.correction()).T + layer.base.bias)


def test_the_correction_is_scaled_by_alpha_over_the_rank_or_its_root() -> None:
    assert LoRAConfig(rank=4, alpha=12).scaling == 3
    assert LoRAConfig(rank=4, alpha=12, rank_stabilized=True).scaling == 6


@pytest.mark.parametrize("example", ["llama", "gpt2", "llama with biases, tied"])
def test_new_adapters_change_nothing_and_merged_ones_compute_the_same(example: str) -> None:
    model = randomize(Decoder(EXAMPLES[example]))
    tokens = torch.randint(0, 64, (2, 8))
    before = model(tokens)
    targets = add_lora_(model, LoRAConfig(rank=4))
    assert torch.equal(model(tokens), before)
    assert "head" not in targets
    adapted = fill(model)(tokens)
    assert (adapted - before).abs().max() > 0.01
    names = set(model.state_dict())
    merge_lora_(model)
    assert find_adapted(model) == {}
    assert not any("lora" in name for name in model.state_dict())
    assert names != set(model.state_dict())
    torch.testing.assert_close(model(tokens), adapted, rtol=1e-4, atol=1e-5)


def test_only_adapters_and_named_modules_learn() -> None:
    model = randomize(Decoder(EXAMPLES["llama"])).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = LoRAConfig(rank=2, targets=("q_proj", "mlp.down_proj"), modules_to_save=("layers.1.feedforward_norm",))
    aliases = {f"layers.{i}.feedforward.down_proj": f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    targets = add_lora_(model, config, aliases=aliases, new_tensors=["head.weight"])
    expected = [f"layers.{i}.{name}" for i in range(2) for name in ("attention.q_proj", "feedforward.down_proj")]
    assert sorted(targets) == sorted(expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_adapters = {name for name in trained if ".lora_" in name}
    assert trained - in_adapters == {"head.weight", "layers.1.feedforward_norm.weight"}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        model(torch.randint(0, 64, (2, 8))).square().mean().backward()
        optimizer.step()
    changed = {
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before.get(name.replace(".base", ""), tensor + 1))
    }
    assert changed == trained


def test_int8_weights_pass_gradients_on_as_their_floats_do() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 24)
    layer = Int8Linear.from_float(linear)
    x = torch.randn(5, 32, requires_grad=True)
    weight = torch.randn(5, 24)
    (layer(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight @ (layer.weight.float() * layer.weight_scale[:, None]))
    torch.testing.assert_close(layer(x), linear(x), rtol=0.05, atol=0.05)


def test_adapters_learn_on_int8_weights() -> None:
    torch.manual_seed(0)
    model = make_int8_(randomize(Decoder(EXAMPLES["llama"])))
    add_lora_(model, LoRAConfig(rank=4))
    tokens = torch.randint(0, 64, (4, 9))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert model.layers[0].attention.q_proj.base.weight.dtype is torch.int8
    with pytest.raises(ConfigError, match=r"q_proj has int8 weights, which an adapter cannot be added to"):
        merge_lora_(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q_porj",)}, r"adapter\.targets has the pattern 'q_porj', which matches no layer .*q_proj"),
        ({"modules_to_save": ("had",)}, r"adapter\.modules_to_save has the pattern 'had', which matches no layer"),
        ({"targets": ("head",)}, "shares its weights with embed, so that neither can be adapted alone"),
        (
            {"targets": ("q_proj", "embed")},
            "the pattern 'embed', which names embed, a TokenEmbedding, and adapters are for",
        ),
        ({"targets": ("*norm",)}, "which names layers.0.attention_norm, a .*, and adapters are for linear layers"),
    ],
)
def test_patterns_that_cannot_be_followed_are_refused(settings: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_lora_(Decoder(EXAMPLES["gpt2"]), LoRAConfig(**settings))


@pytest.mark.parametrize(("pattern", "kind"), [("experts", "SwiGLUExperts"), ("*.experts", "SwiGLUExperts")])
def test_experts_whose_weights_are_one_tensor_take_no_adapter(pattern: str, kind: str) -> None:
    settings = EXAMPLES["llama"].override({"moe": {"num_experts": 2, "top_k": 1}})
    with pytest.raises(ConfigError, match=f"which names layers.0.feedforward.experts, a {kind}, and adapters are for"):
        add_lora_(Decoder(settings), LoRAConfig(targets=("q_proj", pattern)))


def test_convolutions_take_no_adapter() -> None:
    with pytest.raises(ConfigError, match=r"which names conv1, a Conv2d, .* or train it in full with adapter.modules_"):
        add_lora_(zoo.build("resnet18", width=8), LoRAConfig(targets=("fc", "conv1")))
    model = zoo.build("resnet18", width=8)
    assert add_lora_(model, LoRAConfig(targets=("fc",), modules_to_save=("conv1",))) == ["fc"]
    assert model.conv1.weight.requires_grad and not model.layer1[0].conv2.weight.requires_grad


def test_a_model_with_nothing_but_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no linear layer of this ResNet besides its head"):
        add_lora_(zoo.build("resnet18", width=8), LoRAConfig())


def test_rank_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="setting 'rank' is 0: input should be greater than or equal to 1"):
        LoRAConfig(rank=0)
