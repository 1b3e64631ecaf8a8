"""8-bit layers against float64 products of the dequantized weights, within what rounding to steps allows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.nn import quantized
from deepseek.nn.moe import MoEConfig, MoERouter, SwiGLUExperts
from deepseek.nn.quantized import (
    Int8Embedding,
    Int8Experts,
    Int8Linear,
    activation_levels,
    quantize_rows,
    replace_with_int8_,
    widen_,
)

sizes = {
    "rows": st.integers(1, 9),
    "inputs": st.integers(1, 40),
    "outputs": st.integers(1, 20),
    "seed": st.integers(0, 99),
}


def make_linear(inputs, outputs, seed=0, *, bias=False):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias)


def make_rows(*shape, seed=0):
    """Rows of very different sizes, so that one scale for all of them would be seen."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(*shape, generator=generator) * torch.logspace(-3, 3, shape[0])[(...,) + (None,) * (len(shape) - 1)]
    )


def dequantize(values, scales):
    return values.double() * scales.double()[..., None]


def bound(x, weight_NK):
    """Largest error of x @ weight.T when each row of x is rounded to steps of its largest value, and float32's own."""
    step = x.double().abs().amax(dim=-1, keepdim=True) / activation_levels()
    return (step / 2 + 1e-5 * step * activation_levels()) * weight_NK.double().abs().sum(dim=-1)


def assert_within(ours, exact, allowed):
    excess = (ours.double() - exact).abs() - allowed
    assert excess.max() <= 0, f"{excess.max()} beyond the bound"


@settings(deadline=None)
@given(**sizes)
def test_a_weight_is_at_most_half_a_step_away_and_the_largest_is_exact(rows, inputs, outputs, seed):
    weight = torch.randn(rows, outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 9 - 4)
    values, scales = quantize_rows(weight)
    assert values.dtype == torch.int8 and values.shape == weight.shape and scales.shape == weight.shape[:-1]
    largest = weight.double().abs().amax(dim=-1)
    torch.testing.assert_close(scales.double(), largest / 127, rtol=1e-6, atol=0)
    assert_within(dequantize(values, scales), weight.double(), (largest / 254 * (1 + 1e-5))[..., None])
    assert (values.abs().amax(dim=-1) == 127).all()


def test_a_row_of_zeros_stays_zeros():
    values, scales = quantize_rows(torch.zeros(2, 3))
    assert not values.any() and scales.isfinite().all()
    layer = Int8Linear.from_float(nn.Linear(3, 2, bias=False))
    assert not layer(torch.zeros(4, 3)).any()


@settings(deadline=None)
@given(**sizes, bias=st.booleans())
def test_a_linear_layer_is_the_exact_product_within_its_step(rows, inputs, outputs, seed, bias):
    linear, x = make_linear(inputs, outputs, seed, bias=bias), make_rows(rows, inputs, seed=seed)
    layer = Int8Linear.from_float(linear)
    weight = dequantize(layer.weight, layer.weight_scale)
    exact = x.double() @ weight.T + (linear.bias.double() if bias else 0)
    assert_within(layer(x), exact, bound(x, weight) + 1e-6)


@pytest.mark.parametrize("has_vnni", [True, False])
def test_the_largest_products_do_not_saturate(monkeypatch, has_vnni):
    if not has_vnni:
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        largest_pair = 2 * (2 * activation_levels() + 1) * 127
        assert largest_pair <= 2**15 - 1  # FBGEMM adds two products of an unsigned and a signed byte in 16 bits
    layer = Int8Linear.from_float(nn.Linear(512, 4, bias=False))
    layer.weight.fill_(127)
    layer.weight_scale.fill_(1 / 127)
    x = torch.ones(3, 512)
    torch.testing.assert_close(layer(x), torch.full((3, 4), 512.0))
    torch.testing.assert_close(layer(-x), torch.full((3, 4), -512.0))


def test_seven_bits_are_within_their_own_step(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    test_a_linear_layer_is_the_exact_product_within_its_step()


@pytest.mark.parametrize("shape", [(6,), (1, 6), (4, 6), (2, 3, 6), (0, 6), (2, 0, 6)])
def test_any_leading_dims_will_do(shape):
    layer = Int8Linear.from_float(make_linear(6, 5, bias=True))
    x = torch.randn(*shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 5) and y.dtype == torch.float32
    for row, answer in zip(x.reshape(-1, 6), y.reshape(-1, 5), strict=True):
        torch.testing.assert_close(layer(row), answer, rtol=0, atol=0)


@settings(deadline=None)
@given(**sizes)
def test_a_rows_answer_is_bit_equal_alone_and_in_a_batch(rows, inputs, outputs, seed):
    layer, x = Int8Linear.from_float(make_linear(inputs, outputs, seed)), make_rows(rows, inputs, seed=seed)
    alone = torch.stack([layer(row) for row in x])
    torch.testing.assert_close(layer(x), alone, rtol=0, atol=0)
    torch.testing.assert_close(layer(x.flip(0)), alone.flip(0), rtol=0, atol=0)


def test_a_row_that_is_no_number_spoils_only_itself():
    layer, x = Int8Linear.from_float(make_linear(6, 5)), torch.randn(3, 6)
    expected = layer(x)
    x[1, 2] = torch.nan
    answer = layer(x)
    assert answer[1].isnan().all()
    torch.testing.assert_close(answer[[0, 2]], expected[[0, 2]], rtol=0, atol=0)


def test_bf16_in_is_bf16_out():
    layer, x = Int8Linear.from_float(make_linear(64, 16, bias=True)), make_rows(5, 64).bfloat16()
    weight = dequantize(layer.weight, layer.weight_scale)
    exact = x.double() @ weight.T + layer.bias.double()
    assert layer(x).dtype == torch.bfloat16
    assert_within(layer(x), exact, bound(x, weight) + 2**-7 * exact.abs() + 2**-8)


@settings(deadline=None)
@given(**sizes)
def test_without_fbgemm_the_weights_are_widened(rows, inputs, outputs, seed):
    layer, x = Int8Linear.from_float(make_linear(inputs, outputs, seed)), make_rows(rows, inputs, seed=seed).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "_has_fbgemm", lambda device: False)
        torch.testing.assert_close(layer(x), x @ dequantize(layer.weight, layer.weight_scale).T)


def test_an_embedding_gives_its_dequantized_rows():
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 5)
    layer = Int8Embedding.from_float(embedding)
    tokens = torch.tensor([[0, 6], [3, 3]])
    exact = dequantize(layer.weight, layer.weight_scale)[tokens]
    assert layer(tokens).dtype == torch.float32
    torch.testing.assert_close(layer(tokens).double(), exact, rtol=1e-6, atol=0)
    step = embedding.weight.detach().abs().amax(dim=-1)[tokens] / 127
    assert_within(layer(tokens), embedding(tokens).double(), step.double()[..., None] * 0.5001)


@settings(deadline=None, max_examples=50)
@given(num_experts=st.integers(1, 4), hidden=st.integers(1, 20), ffn=st.integers(1, 20), seed=st.integers(0, 99))
def test_experts_are_the_exact_ones_within_their_steps(num_experts, hidden, ffn, seed):
    torch.manual_seed(seed)
    layer = Int8Experts.from_float(SwiGLUExperts(num_experts, hidden, ffn))
    groups = [make_rows(count, hidden, seed=seed) for count in torch.randint(0, 4, (num_experts,)).tolist() if count]
    groups += [torch.zeros(0, hidden)] * (num_experts - len(groups))
    answers = layer.run(groups)
    assert [each.shape for each in answers] == [each.shape for each in groups]
    for expert, (x, ours) in enumerate(zip(groups, answers, strict=True)):
        if not len(x):
            continue
        gate_FD, up_FD, down_DF = (
            dequantize(getattr(layer, name)[expert], getattr(layer, f"{name}_scale")[expert])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        gate, up = x.double() @ gate_FD.T, x.double() @ up_FD.T
        hidden_error = _product_error(F.silu(gate).abs(), 1.1 * bound(x, gate_FD), up.abs(), bound(x, up_FD))
        exact_hidden = F.silu(gate) * up
        largest = (exact_hidden.abs() + hidden_error).amax(dim=-1, keepdim=True)
        allowed = hidden_error @ down_DF.abs().T + bound(largest, down_DF)
        assert_within(ours, exact_hidden @ down_DF.T, allowed + 1e-6)


def _product_error(one, one_error, other, other_error):
    """Largest error of a product; the slope of SiLU is below 1.1."""
    return one * other_error + other * one_error + one_error * other_error


def test_a_tokens_experts_answer_bit_equal_alone_and_in_a_batch():
    torch.manual_seed(0)
    # 32 hidden units: torch rounds a SiLU differently at the end of a tensor whose length is no multiple of that.
    router = MoERouter(SwiGLUExperts(4, 16, 32), 2, hidden_size=16).eval()
    replace_with_int8_(router, kept=("gate",))
    x = torch.randn(40, 16)
    routing = router.route(x)
    groups = [x[(routing.experts_NK == expert).any(dim=1)] for expert in range(4)]
    for expert, answers in enumerate(router.experts.run(groups)):
        assert len(answers) > 1
        for row, answer in zip(groups[expert], answers, strict=True):
            alone = [row[None] if each == expert else x[:0] for each in range(4)]
            torch.testing.assert_close(router.experts.run(alone)[expert][0], answer, rtol=0, atol=0)


class Tiny(nn.Module):
    """A head before the embedding whose weights it shares, so that the order of the modules is put to the test."""

    def __init__(self, *, is_tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 20, bias=False)
        self.gate = nn.Linear(8, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.embed = nn.Embedding(20, 8)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.gate(self.embed(tokens))))


TOKENS = torch.arange(20).view(2, 10)


def test_every_layer_is_replaced_but_those_that_are_kept():
    model = Tiny()
    replace_with_int8_(model, kept=("gate",))
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds == {
        "": Tiny,
        "head": Int8Linear,
        "gate": nn.Linear,
        "body": nn.Sequential,
        "body.0": Int8Linear,
        "body.1": nn.ReLU,
        "embed": Int8Embedding,
    }


def test_a_tied_head_shares_its_8_bits_with_the_embedding():
    model = Tiny()
    exact = model(TOKENS)
    replace_with_int8_(model, kept=())
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()
    assert model.head.weight_scale.data_ptr() == model.embed.weight_scale.data_ptr()
    assert (model(TOKENS) - exact).norm() < 0.03 * exact.norm()


def test_a_head_of_its_own_keeps_its_own_weights():
    model = Tiny(is_tied=False)
    weight = model.head.weight.detach().clone()
    replace_with_int8_(model, kept=())
    assert model.head.weight.data_ptr() != model.embed.weight.data_ptr()
    torch.testing.assert_close(
        dequantize(model.head.weight, model.head.weight_scale).float(), weight, rtol=0, atol=2e-3
    )


def make_int8(*, is_tied=True):
    model = Tiny(is_tied=is_tied)
    replace_with_int8_(model, kept=())
    return model


def test_a_copy_answers_alike_and_is_separate():
    model = make_int8()
    before = model(TOKENS)  # packs the weights
    twin = copy.deepcopy(model)
    twin.body[0].weight.zero_()
    torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=0)
    assert not twin.body[0](torch.ones(8)).sub(twin.body[0].bias).any()
    torch.testing.assert_close(copy.deepcopy(model)(TOKENS), before, rtol=0, atol=0)


def test_loaded_weights_are_the_ones_that_answer():
    model, other = make_int8(), make_int8(is_tied=False)
    assert not torch.equal(model(TOKENS), other(TOKENS))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(TOKENS), model(TOKENS), rtol=0, atol=0)


def test_loaded_experts_are_the_ones_that_answer():
    x = torch.randn(3, 6)
    one, other = (Int8Experts.from_float(SwiGLUExperts(2, 6, 5)) for _ in range(2))
    groups = [x, x]
    before = one.run(groups)
    other.run(groups)
    twin = copy.deepcopy(one)
    other.load_state_dict(one.state_dict())
    for each in (other, twin):
        torch.testing.assert_close(each.run(groups), before, rtol=0, atol=0)


def test_a_new_layer_has_the_shapes_that_a_file_of_another_has():
    linear, embedding = nn.Linear(6, 5), nn.Embedding(7, 6)
    experts = SwiGLUExperts(2, 6, 5)
    for empty, full in (
        (Int8Linear(6, 5, bias=True), Int8Linear.from_float(linear)),
        (Int8Embedding(7, 6), Int8Embedding.from_float(embedding)),
        (Int8Experts(2, 6, 5), Int8Experts.from_float(experts)),
    ):
        shapes = [{name: (each.shape, each.dtype) for name, each in one.state_dict().items()} for one in (empty, full)]
        assert shapes[0] == shapes[1]


def test_widened_layers_hold_the_values_that_int8_stands_for():
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "num_layers": 1, "hidden_size": 16, "num_heads": 2, "max_length": 8}
    model = Decoder(DecoderConfig(**shape, moe=MoEConfig(num_experts=2, ffn_size=8), attention_bias=True))
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    replace_with_int8_(model, ("gate",))
    widen_(model)
    widened = dict(model.named_parameters(remove_duplicate=False))
    assert expected.keys() <= widened.keys()
    for name, tensor in expected.items():
        # Half a step of each row of weights: the scale is the largest of its values over 127.
        largest = tensor.abs().amax(dim=-2 if ".experts." in name else -1, keepdim=True) if tensor.ndim > 1 else 0
        assert ((widened[name] - tensor).abs() <= largest / 127 / 2 + 1e-6).all(), name
    assert model(torch.zeros(1, 4, dtype=torch.long)).requires_grad
