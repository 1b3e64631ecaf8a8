"""What each ONNX operator is in torch: a table from its name to the function that translates it.

A function takes the graph builder, the operator with its attributes, and the inputs (`None` for one that is left out),
and returns its output or a tuple of them. Where opsets differ (axes as attribute or input, the meaning of Softmax's
axis), the function asks `op.opset`. A use of an operator that is not followed (blocked quantization, active dropout)
raises `UnsupportedOperatorError`, never an answer that is nearly right. What takes more than one call of torch is a
function of `functions.py`, so that one node stays one call in the graph.
"""

from deepseek.onnx.operators.elementwise import ELEMENTWISE
from deepseek.onnx.operators.layers import LAYERS
from deepseek.onnx.operators.node import Translator
from deepseek.onnx.operators.quantization import QUANTIZED
from deepseek.onnx.operators.reductions import REDUCTIONS
from deepseek.onnx.operators.shapes import SHAPES

OPERATORS: dict[str, Translator] = ELEMENTWISE | SHAPES | REDUCTIONS | LAYERS | QUANTIZED
