"""Accelerators: what each needs to be here, where tensors go, and that a recording answers as the model does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek.compiler.runtimes.backends import BACKENDS, BackendError
from deepseek.compiler.runtimes.backends.accelerators import on_device, run_recorded
from deepseek.compiler.runtimes.backends.flat_signature import flatten_model
from deepseek.compiler.runtimes.backends.interface import Job, Missing
from tests.compiler.runtimes.backends.offered import BOUNDS, relative_error
from tests.compiler.runtimes.recorder import Recorder


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
@pytest.mark.parametrize(
    ("name", "needs"), [("cuda", "CUDA build"), ("tensorrt", "CUDA build"), ("rocm", "ROCm build")]
)
def test_an_absent_accelerator_says_what_it_needs(name, needs):
    missing = BACKENDS[name].find_missing()
    assert isinstance(missing, Missing) and needs in str(missing) and torch.__version__ in str(missing)
    with pytest.raises(BackendError, match=needs):
        BACKENDS[name].compile(nn.Linear(2, 2).eval(), torch.ones(1, 2))


@pytest.mark.parametrize(("name", "library"), [("gaudi", "habana_frameworks"), ("ascend", "torch_npu")])
def test_an_absent_bridge_is_named(name, library):
    assert library in str(BACKENDS[name].find_missing())


def test_on_a_device_inputs_are_cast_and_answers_come_home():
    seen = []
    flattened = flatten_model(nn.Linear(4, 2).eval(), torch.randn(2, 4))
    run = on_device(lambda x: seen.append((x.dtype, x.device.type)) or x[:, :2], "cpu", torch.bfloat16, Job(flattened))
    (answer,) = run(torch.randn(2, 4))
    assert seen == [(torch.bfloat16, "cpu")] and answer.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("variant", ["graph", "eager", "recorded"])
def test_a_gpu_answers_like_eager(variant, pictures):
    compiled = BACKENDS["cuda"].compile(pictures.model, pictures.samples, "fp32", variant=variant)
    assert relative_error(compiled(pictures.samples), pictures.model(pictures.samples)) < 2e-3  # TF32 at most


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recording_of_a_models_kernels_answers_as_the_model_does(precision, pictures):
    recorder = Recorder()
    built = run_recorded("cpu", precision, recorder)(Job(flatten_model(pictures.model, pictures.samples)))
    answers = []
    for samples in (pictures.samples, pictures.samples * 2):
        with torch.no_grad():
            answers += built.run(samples)
        assert relative_error(answers[-1], pictures.model(samples)) < BOUNDS[precision]
    assert recorder.num_recorded == 1  # and the second answer is not in the memory of the first
    assert relative_error(answers[0], pictures.model(pictures.samples)) < BOUNDS[precision]
