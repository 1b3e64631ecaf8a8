"""torch itself: dynamic int8, the kernels that oneDNN chose, and precisions that the processor has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek.compiler.runtimes.backends.eager import DynamicInt8Linear, lacks_fp16, listen_to_onednn
from deepseek.compiler.runtimes.fallbacks import read_onednn_kernels
from deepseek.compiler.runtimes.selection_policy import Traits
from tests.compiler.runtimes.backends.offered import relative_error


def test_int8_by_fbgemm_is_the_product_of_rounded_numbers():
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 8), torch.randn(4, 32)
    scales = linear.weight.abs().amax(1, keepdim=True) / 127
    weight = (linear.weight / scales).round() * scales
    error = relative_error(DynamicInt8Linear(linear)(x), (x @ weight.T + linear.bias).detach())
    # Only the inputs' rounding is left: a step of 1/255 of their range, uniformly distributed.
    step = float(x.max() - x.min()) / 255
    assert error < 3 * step / 12**0.5 / float(x.std())


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 instructions here")
def test_the_kernels_of_onednn_are_heard_and_the_output_is_as_before(capfd):
    linear, x = nn.Linear(64, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    kernels = read_onednn_kernels(listen_to_onednn(lambda: linear(x)))
    assert any("bf16" in name for name in kernels)
    print("and then", flush=True)
    assert capfd.readouterr().out == "and then\n"


def test_fp16_is_tried_only_where_the_processor_has_it():
    is_there = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert (lacks_fp16(Traits()) is None) == is_there
