"""The runtimes that can run a model, one file each, by name.

    BACKENDS["openvino"].compile(model, sample_inputs, "int8")(x)

A backend is a row of a table (`interface.Backend`); a new one is a file that ends in `BACKEND = Backend(...)` and a
line here. `dynamo.py` offers some of them to `torch.compile`.
"""

from __future__ import annotations

from deepseek.compiler.runtimes.backends import accelerators, eager, inductor, onnxruntime, openvino, tvm
from deepseek.compiler.runtimes.backends.interface import Backend, BackendError, Compiled, Missing, Variant
from deepseek.core.registry import Registry

__all__ = ["BACKENDS", "Backend", "BackendError", "Compiled", "Missing", "Variant"]

BACKENDS: Registry[Backend] = Registry("backend")
for _each in (
    eager.BACKEND,
    inductor.BACKEND,
    onnxruntime.BACKEND,
    openvino.BACKEND,
    tvm.BACKEND,
    accelerators.TENSORRT,
    accelerators.CUDA,
    accelerators.ROCM,
    accelerators.GAUDI,
    accelerators.ASCEND,
):
    BACKENDS.add(_each.name, _each)
