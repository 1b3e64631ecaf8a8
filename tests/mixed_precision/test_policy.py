import math
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.core.errors import ConfigError
from deepseek.mixed_precision.gradient_statistics import count_exponents
from deepseek.mixed_precision.policy import (
    FORMATS,
    LOWEST_EXPONENT,
    NUM_BINS,
    Evidence,
    Histogram,
    LayerState,
    Rules,
    Verdict,
    apply_hysteresis,
    choose,
    find_culprits,
    find_format,
    judge,
    overflows,
    rounding_noise,
    underflow_share,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GOOD = Verdict(True, 0.0, 0.0, 0.0, "quiet")
BAD = Verdict(False, 0.0, 0.0, 0.0, "loud")


def histogram_of(values):
    row = count_exponents(values.float())
    largest = values[values.isfinite()].abs().max().item() if values.isfinite().any() else 0.0
    exponent = math.frexp(largest)[1] - 1 if largest else -math.inf
    return Histogram(tuple(row[:NUM_BINS].tolist()), row[-2].item(), row[-1].item(), exponent)


def at(exponent, count=1.0):
    counts = [0.0] * NUM_BINS
    counts[exponent - LOWEST_EXPONENT] = count
    return Histogram(tuple(counts), largest_exponent=exponent)


def evidence(exponent=0, gradient_exponent=0, signal=1.0, saved_s=1.0, saved_bytes=1.0):
    return Evidence(at(exponent), at(gradient_exponent), signal, 4, saved_s, saved_bytes)


@pytest.mark.parametrize("name", DTYPES)
@settings(max_examples=30, deadline=None)
@given(st.floats(-34, 12), st.floats(0, 1), st.integers(0, 10**6))
def test_noise_and_underflow_are_what_rounding_does(name, center, spread, seed):
    """Against torch's own conversion of values of any size, down to where FP16 has nothing left."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4096, generator=generator).double() * 2.0 ** (
        center + spread * torch.randn(4096, generator=generator).double()
    )
    values = values[values.abs() < 2.0**15].float()
    rounded = values.to(DTYPES[name]).double()
    wide = values.double()
    noise = ((rounded - wide).square().sum() / wide.square().sum()).item()
    estimate = rounding_noise(histogram_of(values), FORMATS[name])
    assert noise * 0.6 <= estimate + 1e-12 and estimate <= noise * 1.7 + 1e-12
    lost = ((wide.abs() < 2.0 ** FORMATS[name].tiny_exponent) & (wide != 0)).double().mean().item()
    assert underflow_share(histogram_of(values), FORMATS[name]) == pytest.approx(lost, abs=1e-9)


@pytest.mark.parametrize("name", DTYPES)
def test_the_formats_are_torchs(name):
    format, limits = FORMATS[name], torch.finfo(DTYPES[name])
    assert 2.0**format.tiny_exponent == limits.smallest_normal * limits.eps
    assert 2.0**format.min_exponent == limits.smallest_normal
    assert 2.0**-format.mantissa_bits == limits.eps
    assert 2.0**format.max_exponent <= limits.max < 2.0 ** (format.max_exponent + 1)


def test_values_beyond_the_largest_number_overflow():
    assert not overflows(histogram_of(torch.tensor([1.0, 65504.0])), FORMATS["fp16"])
    assert overflows(histogram_of(torch.tensor([1.0, 65536.0])), FORMATS["fp16"])
    assert not overflows(histogram_of(torch.tensor([1.0, 1e30])), FORMATS["bf16"])
    assert overflows(histogram_of(torch.tensor([1.0, torch.nan])), FORMATS["bf16"])


@pytest.mark.parametrize(
    ("case", "low", "options", "reason"),
    [
        (evidence(), "bf16", {}, "rounding noise is"),
        (evidence(exponent=17), "fp16", {}, r"activations reach 2\^17, fp16 ends below 2\^16"),
        (evidence(gradient_exponent=-30), "fp16", {}, "100.0% of the gradient is below the smallest fp16"),
        (Evidence(at(0), Histogram(num_zeros=9.0)), "fp16", {}, "all gradients are zero"),
        (evidence(signal=math.inf), "bf16", {}, "rounding noise is inf"),
        (evidence(signal=1e6), "bf16", {}, "rounding noise is 2.2 of the gradient noise"),
    ],
)
def test_a_verdict_says_why(case, low, options, reason):
    verdict = judge(case, FORMATS[low], Rules(), **options)
    assert verdict.is_allowed == (reason == "rounding noise is")
    assert re.search(reason, verdict.reason), verdict.reason


def test_a_loss_scale_lifts_gradients_over_underflow_but_not_over_overflow():
    tiny = evidence(gradient_exponent=-30)
    assert not judge(tiny, FORMATS["fp16"], Rules()).is_allowed
    assert judge(tiny, FORMATS["fp16"], Rules(), scale=2.0**16).is_allowed
    assert judge(tiny, FORMATS["bf16"], Rules()).is_allowed


def test_zero_gradients_tell_nothing_in_a_format_with_the_range_of_fp32():
    assert judge(Evidence(at(0), Histogram(num_zeros=9.0)), FORMATS["bf16"], Rules()).is_allowed


def test_the_bound_is_the_share_of_the_gradient_noise():
    noise = rounding_noise(at(0), FORMATS["bf16"])
    for factor, is_allowed in ((0.99, True), (1.01, False)):
        case = evidence(signal=factor * 0.05 / noise)
        assert judge(case, FORMATS["bf16"], Rules(share=0.05)).is_allowed == is_allowed


def test_the_joint_budget_goes_to_the_layers_that_save_most_for_their_noise():
    signal = 0.04 / rounding_noise(at(0), FORMATS["bf16"])
    layers = {name: evidence(signal=signal, saved_s=saved) for name, saved in (("a", 1.0), ("b", 3.0), ("c", 2.0))}
    for order in (layers, dict(reversed(layers.items()))):
        answers = choose(order, FORMATS["bf16"], Rules(share=0.05, joint_share=0.09))
        assert {name for name, (is_low, _) in answers.items() if is_low} == {"b", "c"}
        assert answers["a"][1].reason == "the joint budget of 0.09 is spent"


def test_a_layer_that_saves_nothing_stays_wide():
    layers = {"slower": evidence(saved_s=-1.0, saved_bytes=0.1), "faster": evidence(saved_s=2.0)}
    answers = choose(layers, FORMATS["bf16"], Rules())
    assert [answers[name][0] for name in layers] == [False, True]
    assert answers["slower"][1].reason == "16 bits save too little here"


def test_where_16_bits_are_slower_everywhere_everything_stays_wide():
    layers = {name: evidence(saved_s=-1.0, saved_bytes=1.0) for name in "abc"}
    assert not any(is_low for is_low, _ in choose(layers, FORMATS["bf16"], Rules()).values())


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4))
def test_going_up_takes_one_violation_and_going_down_patience(windows, patience):
    rules, state, num_good = Rules(patience=patience), LayerState("fp32"), 0
    for is_good in windows:
        state = apply_hysteresis(state, GOOD if is_good else BAD, "bf16", rules)
        num_good = num_good + 1 if is_good else 0
        assert state.precision == ("bf16" if num_good >= patience else "fp32")


def test_a_layer_that_began_low_stays_low_while_all_is_well():
    assert apply_hysteresis(LayerState("bf16"), GOOD, "bf16", Rules(patience=3)).precision == "bf16"


def test_only_layers_where_infinities_begin_are_to_blame():
    assert find_culprits([("a", True, False), ("b", False, False), ("c", True, True)]) == ("a",)


@pytest.mark.parametrize(
    "options",
    [{"share": -1.0}, {"joint_share": math.nan}, {"max_underflow": -0.1}, {"patience": 0}, {"min_samples": 1}],
)
def test_rules_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Rules(**options)


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="unknown precision 'fp8'"):
        find_format("fp8")


def test_deciding_needs_no_tensors():
    modules = "deepseek.mixed_precision.policy, deepseek.mixed_precision.amp_levels"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
