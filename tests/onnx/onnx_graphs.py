"""ONNX graphs written by hand and run by ONNX's own reference evaluator, in float64: a second opinion on layers.

Norms and clipped activations are written out in elementary operators, since attributes of ONNX are float32 and would
leave an error of 1e-8 where the tests ask for 1e-10. Weights are taken from a dict by their names in the state dict, so
that a graph says which name belongs where.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

OPSET = 18


class Graph:
    """Nodes in order; every method adds some and returns the name of the last one's value."""

    def __init__(self, weights):
        self.weights = {name: np.asarray(each, dtype=np.float64) for name, each in weights.items()}
        self.nodes, self.constants = [], []

    def add(self, operator, *inputs, **attributes):
        name = f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value, dtype=np.float64):
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def weight(self, name):
        return self.constant(self.weights[name])

    def conv(self, x, name, *, stride=1, groups=1):
        weight = self.weights[f"{name}.weight"]
        padding = weight.shape[-1] // 2
        bias = [self.weight(f"{name}.bias")] if f"{name}.bias" in self.weights else []
        places = {"strides": [stride] * 2, "pads": [padding] * 4, "kernel_shape": weight.shape[2:]}
        return self.add("Conv", x, self.constant(weight), *bias, group=groups, **places)

    def norm(self, x, name, eps):
        shape = (1, -1, 1, 1)
        mean, variance, factor, offset = (
            self.weights[f"{name}.{each}"].reshape(shape) for each in ("running_mean", "running_var", "weight", "bias")
        )
        centred = self.add("Sub", x, self.constant(mean))
        deviation = self.add("Sqrt", self.add("Add", self.constant(variance), self.constant(eps)))
        scaled = self.add("Mul", self.add("Div", centred, deviation), self.constant(factor))
        return self.add("Add", scaled, self.constant(offset))

    def silu(self, x):
        return self.add("Mul", x, self.add("Sigmoid", x))

    def hard_sigmoid(self, x):
        raised = self.add("Add", x, self.constant(3.0))
        clipped = self.add("Min", self.add("Max", raised, self.constant(0.0)), self.constant(6.0))
        return self.add("Div", clipped, self.constant(6.0))

    def hardswish(self, x):
        return self.add("Mul", x, self.hard_sigmoid(x))

    def max_pool(self, x, kernel, stride, padding):
        return self.add("MaxPool", x, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[padding] * 4)

    def double_size(self, x):
        scales = self.constant([1, 1, 2, 2], dtype=np.float32)
        rules = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
        return self.add("Resize", x, "", scales, **rules)

    def linear(self, x, name):
        return self.add("Gemm", x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"), transB=1)

    def run(self, outputs, **inputs):
        """Values of the named outputs for torch tensors by name."""
        values = {name: each.detach().double().numpy() for name, each in inputs.items()}
        described = [
            helper.make_tensor_value_info(name, TensorProto.DOUBLE, each.shape) for name, each in values.items()
        ]
        results = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "by_hand", described, results, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        return ReferenceEvaluator(model).run(None, values)
