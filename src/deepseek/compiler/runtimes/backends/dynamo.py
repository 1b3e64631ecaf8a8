"""Backends for `torch.compile` and `ds.jit`: ONNX Runtime, OpenVINO and TVM, where torch's own are gone or broken.

    fast = ds.jit(model.eval(), backend="openvino")
    fast = torch.compile(model.eval(), backend=deepseek.compiler.runtimes.backends.dynamo.openvino, dynamic=False)
    with torch.no_grad():
        fast(x)

Weights become constants of the compiled program, as with freezing, so these are for inference: gradients are refused,
and a weight that changes later is not seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.compiler.runtimes.backends import BACKENDS
from deepseek.compiler.runtimes.backends.interface import BackendError, Compiled
from deepseek.core.errors import ConfigError


class Specialized(nn.Module):
    """A captured graph whose weights, which torch hands over as inputs, are filled in."""

    def __init__(self, graph: nn.Module, weights: dict[int, Tensor]) -> None:
        super().__init__()
        self.graph, self.weights = graph, weights

    def forward(self, *inputs: Tensor) -> Any:
        remaining = iter(inputs)
        num_inputs = len(inputs) + len(self.weights)
        filled = (self.weights[index] if index in self.weights else next(remaining) for index in range(num_inputs))
        return self.graph(*filled)


def onnxruntime(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Return a `torch.compile` backend that runs on ONNX Runtime in FP32."""
    return _compile("onnxruntime", graph, inputs)


def openvino(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Return a `torch.compile` backend that runs on OpenVINO in FP32."""
    return _compile("openvino", graph, inputs)


def tvm(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Return a `torch.compile` backend that runs on TVM in FP32."""
    return _compile("tvm", graph, inputs)


COMPILERS: dict[str, Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "tvm": tvm,
}


def find_compiler(backend: str | Callable[..., Any]) -> str | Callable[..., Any]:
    """Return what `torch.compile` takes as a backend: the function of a name in `COMPILERS`, anything else as it is."""
    return COMPILERS.get(backend, backend) if isinstance(backend, str) else backend


def _compile(name: str, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    BACKENDS[name].require_available()
    _require_inference(name)
    _require_tensors(name, inputs)
    weights = {index: tensor.detach() for index, tensor in enumerate(inputs) if _is_weight(graph, index, tensor)}
    if len(weights) == len(inputs):
        raise BackendError(f"a graph without inputs is nothing for {name} to run; give the model at least one tensor")
    return Late(name, Specialized(graph, weights).eval())


class Late:
    """A program that is built in its first call: while torch still captures, nothing else can be exported."""

    def __init__(self, name: str, model: Specialized) -> None:
        self.name, self.model = name, model
        self.lock = threading.Lock()
        self.compiled: Compiled | None = None

    def __call__(self, *given: Any) -> Any:
        _require_inference(self.name)
        tensors = [tensor.detach() for index, tensor in enumerate(given) if index not in self.model.weights]
        with self.lock:
            if self.compiled is None:
                self.compiled = BACKENDS[self.name].compile(self.model, tensors)
        return self.compiled(*tensors)


def _require_inference(name: str) -> None:
    if torch.is_grad_enabled():
        raise ConfigError(f"{name} records no gradients; call the compiled model under torch.no_grad()")


def _require_tensors(name: str, inputs: Sequence[Any]) -> None:
    if not all(isinstance(value, Tensor) for value in inputs):
        raise ConfigError(f"{name} takes fixed shapes; compile with torch.compile(..., dynamic=False)")


def _is_weight(graph: torch.fx.GraphModule, index: int, value: Any) -> bool:
    """Return whether an input of a captured graph is a parameter or a buffer of the model."""
    if isinstance(value, nn.Parameter):
        return True
    placeholder = [node for node in graph.graph.nodes if node.op == "placeholder"][index]
    return "_dynamo_static_input_type" in (placeholder.meta.get("tensor_dict") or {})
