"""What calibrating takes is counted on tensors without data, and refused where memory does not hold it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from deepseek.compiler.runtimes.backends import BACKENDS, BackendError, calibration_memory
from deepseek.compiler.runtimes.backends.flat_signature import flatten_model
from deepseek.compiler.runtimes.backends.interface import Job, build
from tests.compiler.runtimes.backends.offered import HERE


def test_activations_are_counted_without_computing_them():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Unflatten(1, (2, 8)), nn.Flatten(), nn.Linear(16, 4)).eval()
    flattened = flatten_model(model, torch.randn(5, 8))
    assert calibration_memory.count_activation_bytes(flattened) == 4 * 5 * (16 + 16 + 4)
    many = replace(flattened, inputs=(torch.empty(1).expand(10**12, 8),))  # no machine holds what follows from these
    assert calibration_memory.count_activation_bytes(many) == 4 * 10**12 * (16 + 16 + 4)


@pytest.mark.parametrize("name", [each for each in ("onnxruntime", "openvino") if each in HERE])
def test_calibrating_what_memory_does_not_hold_is_refused_before_it_kills_the_process(name, pictures, monkeypatch):
    fresh = Job(flatten_model(pictures.model, pictures.samples))
    num_bytes = calibration_memory.count_activation_bytes(fresh.flattened)
    monkeypatch.setattr(calibration_memory, "measure_free_bytes", lambda: num_bytes // 3)
    variant = BACKENDS[name].find_variant("int8", "static" if name == "onnxruntime" else "latency")
    with pytest.raises(BackendError, match="GB are free; give samples of fewer rows"):
        build(variant, fresh)
