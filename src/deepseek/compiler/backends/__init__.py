"""The runtimes that can run a model, one file each, by name.

    BACKENDS["openvino"].compile(model, sample_inputs, "int8")(x)

A backend is a row of a table (`interface.Backend`); a new one is a file that ends in `BACKEND = Backend(...)` and a line
here.
"""

from __future__ import annotations

from deepseek.compiler.backends import eager, inductor, onnxruntime, openvino
from deepseek.compiler.backends.interface import Backend, BackendError, Compiled, Missing, Variant
from deepseek.core.registry import Registry

__all__ = ["BACKENDS", "Backend", "BackendError", "Compiled", "Missing", "Variant"]

BACKENDS: Registry[Backend] = Registry("backend")
for _each in (eager, inductor, onnxruntime, openvino):
    BACKENDS.add(_each.BACKEND.name, _each.BACKEND)
