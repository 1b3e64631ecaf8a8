"""What the tests of backends share: who is here, and what a precision may cost."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from deepseek.compiler.runtimes.backends import BACKENDS

# What each precision may cost on these models: rounding of 24, 8 and 8 bits through six layers.
BOUNDS = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.01, "int8": 0.08}
HERE = [name for name in ("eager", "inductor", "onnxruntime", "openvino") if BACKENDS[name].is_available()]


def relative_error(answer, reference):
    answer, reference = answer.detach().double(), reference.detach().double()
    return float((answer - reference).norm() / reference.norm())


@contextmanager
def threads(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tagger_inputs(is_scaled=False):
    return {"tokens": torch.arange(6).reshape(2, 3), "mask": torch.ones(2, 3), "is_scaled": is_scaled}
