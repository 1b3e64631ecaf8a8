"""Attention against loops over rows, heads, queries and keys in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from deepseek.nn.attention import Attention, attend_with_bias
from deepseek.nn.masks import see
from deepseek.nn.rotary import rotary_table

B, T, D, DISTANCE = 2, 9, 12, 2


def look(num_tokens=T, *, is_local=True, openness=0.7):
    return see(
        torch.arange(num_tokens)[None],
        num_tokens,
        is_whole=True,
        local_distance=DISTANCE if is_local else None,
        openness=torch.tensor(openness) if is_local else None,
    )


def make(num_heads, num_kv_heads, seed=0, **options):
    torch.manual_seed(seed)
    module = Attention(D, num_heads, num_kv_heads, 4, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module, torch.randn(B, T, D, dtype=torch.float64)


def project(linear, x):
    y = x @ linear.weight.T
    return y if linear.bias is None else y + linear.bias


def add_far_bias(module, x_D, head, openness):
    """What a local head adds to a score beyond its distance."""
    if head >= module.num_local_heads:
        return torch.zeros(())
    if module.far_gate is None:
        return torch.tensor(-math.inf)
    return F.logsigmoid(x_D @ module.far_gate.weight[head] + module.far_gate.bias[head]) * openness


def naive(module, x_BTD, openness=0.7, turn=lambda x_H, position: x_H):
    """Every head of every query by itself, with a softmax written out."""
    size, group = module.head_size, module.num_heads // module.num_kv_heads
    rows = []
    for x_TD in x_BTD:
        queries, keys, values = (project(each, x_TD) for each in (module.q_proj, module.k_proj, module.v_proj))
        row = []
        for query in range(len(x_TD)):
            heads = []
            for head in range(module.num_heads):
                own, shared = (slice(at * size, (at + 1) * size) for at in (head, head // group))
                weights = []
                for key in range(query + 1):
                    score = turn(queries[query, own], query) @ turn(keys[key, shared], key) / math.sqrt(size)
                    if query - key > DISTANCE:
                        score = score + add_far_bias(module, x_TD[query], head, openness)
                    weights.append(score.exp())
                total = sum(weights)
                heads.append(sum(weight / total * values[key, shared] for key, weight in enumerate(weights)))
            row.append(project(module.o_proj, torch.cat(heads)))
        rows.append(torch.stack(row))
    return torch.stack(rows)


CASES = {
    "multi-head": ((3, 3), {}),
    "multi-head with biases": ((3, 3), {"bias": True, "output_bias": True}),
    "grouped queries": ((6, 2), {}),
    "multi-query": ((4, 1), {}),
    "dynamic local heads": ((4, 2), {"num_local_heads": 2}),
    "all heads local": ((2, 2), {"num_local_heads": 2}),
    "hard local heads": ((4, 2), {"num_local_heads": 3, "is_dynamic": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_loops(case):
    heads, options = CASES[case]
    module, x_BTD = make(*heads, **options)
    x_BTD.requires_grad_()
    visibility = look(is_local="num_local_heads" in options)
    tensors = [x_BTD, *module.parameters()]
    towards = torch.randn_like(x_BTD)
    expected = naive(module, x_BTD)
    ours = module(x_BTD, None, visibility)
    # The gates pass through float32 on their way into the bias.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if module.far_gate else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(ours, expected, **tolerance)
    with torch.no_grad():  # another kernel than with a gradient
        torch.testing.assert_close(module(x_BTD, None, visibility), expected, **tolerance)
    for one, other in zip(*(torch.autograd.grad((y * towards).sum(), tensors) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_rotary_positions_turn_queries_and_keys_and_leave_values():
    module, x_BTD = make(4, 2)
    table = rotary_table(T, 4, theta=100.0)

    def turn(x_H, position):
        z = torch.complex(x_H[:2], x_H[2:])
        angles = position * torch.tensor([1.0, 100.0**-0.5], dtype=torch.float64)
        z = z * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((z.real, z.imag))

    ours = module(x_BTD, table[:, torch.arange(T)[None]], look(is_local=False))
    torch.testing.assert_close(ours, naive(module, x_BTD, turn=turn), rtol=1e-5, atol=1e-6)


def test_a_global_layer_of_a_masked_model_is_plain_causal():
    module, x_BTD = make(4, 2)
    masked, plain = (module(x_BTD, None, look(is_local=is_local)) for is_local in (True, False))
    torch.testing.assert_close(masked, plain, rtol=1e-12, atol=1e-14)


def test_a_wholly_open_local_head_is_global():
    module, x_BTD = make(4, 2, num_local_heads=4)
    opened = module(x_BTD, None, look(openness=0.0))
    module.num_local_heads = 0
    torch.testing.assert_close(opened, naive(module, x_BTD), rtol=1e-10, atol=1e-12)


def test_a_closed_gate_is_a_hard_window():
    module, x_BTD = make(4, 2, num_local_heads=4)
    with torch.no_grad():
        module.far_gate.bias.fill_(-1e4)
    soft = module(x_BTD, None, look(openness=1.0))
    module.far_gate = None
    torch.testing.assert_close(soft, module(x_BTD, None, look()), rtol=1e-10, atol=1e-12)


def make_qkv(num_heads, num_kv_heads, dtype=torch.float64, num_queries=5):
    generator = torch.Generator().manual_seed(0)
    q, k, v, bias = (
        torch.randn(B, heads, length, size, dtype=dtype, generator=generator)
        for heads, length, size in (
            (num_heads, num_queries, 4),
            (num_kv_heads, 7, 4),
            (num_kv_heads, 7, 4),
            (num_heads, num_queries, 7),
        )
    )
    bias[..., 6] = -math.inf
    return q, k, v, bias


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_attention_with_a_bias_is_torchs_own_with_its_gradients(num_heads, num_kv_heads):
    tensors = [each.requires_grad_() for each in make_qkv(num_heads, num_kv_heads)]
    q, k, v, bias = tensors
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=num_heads != num_kv_heads)
    ours = attend_with_bias(*tensors)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    towards = torch.randn_like(theirs)
    for one, other in zip(*(torch.autograd.grad((y * towards).sum(), tensors) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_attention_with_a_bias_has_the_derivatives_of_its_differences():
    q, k, v, bias = make_qkv(2, 1, num_queries=2)
    bias = bias.clamp_min(-5)
    assert torch.autograd.gradcheck(attend_with_bias, [each.requires_grad_() for each in (q, k, v, bias)])


def test_with_a_bias_in_bf16_it_is_the_exact_answer_to_bf16s_digits():
    q, k, v, bias = make_qkv(2, 2)
    exact = attend_with_bias(q, k, v, bias)
    low = attend_with_bias(*(each.bfloat16() for each in (q, k, v)), bias.float())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), exact, rtol=0.03, atol=0.03)
    # A sum that accumulated in bf16 would stop at 256 of these.
    ones = torch.ones(1, 1, 4096, 4, dtype=torch.bfloat16)
    answer = attend_with_bias(torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16), ones, ones, torch.zeros(1, 1, 1, 4096))
    assert answer.float().flatten().tolist() == pytest.approx([1.0] * 4, abs=2**-8)


@pytest.mark.parametrize("case", CASES)
def test_a_bf16_module_is_the_exact_one_to_bf16s_digits_whichever_kernel_runs(case):
    heads, options = CASES[case]
    module, x_BTD = make(*heads, **options)
    exact = naive(module, x_BTD)
    visibility = look(is_local="num_local_heads" in options)
    low, x_BTD = module.bfloat16(), x_BTD.bfloat16()
    for has_gradient in (True, False):
        with torch.set_grad_enabled(has_gradient):
            y_BTD = low(x_BTD, None, visibility)
        assert y_BTD.dtype == torch.bfloat16
        assert (y_BTD.double() - exact).norm() < 0.02 * exact.norm()
