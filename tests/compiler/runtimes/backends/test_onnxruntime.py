"""ONNX Runtime: kernels that it lacks, and the file that it was given."""

from __future__ import annotations

import gc

import pytest

from deepseek.compiler.runtimes.backends import BackendError
from deepseek.compiler.runtimes.backends import onnxruntime as onnxruntime_backend
from deepseek.compiler.runtimes.backends.flat_signature import flatten_model
from deepseek.compiler.runtimes.backends.interface import Job
from tests.compiler.models import small_mlp


def test_onnxruntime_says_which_kernels_it_lacks():
    onnxruntime_backend.require_kernels("FLOAT")
    with pytest.raises(BackendError, match="no kernels"):
        onnxruntime_backend.require_kernels("BFLOAT16")


def test_the_exported_file_goes_with_the_job():
    mlp = small_mlp()
    job = Job(flatten_model(mlp.model, mlp.samples))
    path = onnxruntime_backend.export_onnx(job)
    assert path.is_file()
    del job
    gc.collect()
    assert not path.parent.exists()
