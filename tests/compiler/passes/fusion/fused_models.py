"""Models with statistics as after training, and the comparison of a fused model with float64."""

import copy

from torch import nn

from deepseek.compiler.passes.fusion.rewrite_rules import fuse

IMAGES = (2, 3, 9, 9)


def settle(model):
    """Statistics and scales as after training, so that folding them does something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.weight.normal_()
            module.bias.normal_()
    return model.eval()


def check(model, inputs, *, num_operators, fired, kernels="eager", tolerance=1e-5):
    """Fuse, compare with the model in float64, and return the report."""
    model = settle(model)
    expected = copy.deepcopy(model).double()(*(each.double() for each in inputs))
    fused = fuse(model, inputs, kernels=kernels)
    answer = fused.graph_module(*inputs)
    assert float((answer - expected).abs().max()) <= tolerance * float(expected.abs().max())
    assert [each.rule for each in fused.report.fusions] == list(fired)
    assert fused.report.num_operators_after == num_operators
    return fused.report


class Residual(nn.Module):
    def __init__(self, activation, *, in_place=False):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.activation, self.in_place = activation, in_place

    def forward(self, x):
        y = self.norm(self.convolution(x))
        if self.in_place:
            y += x
            return self.activation(y)
        return self.activation(y + x)


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU(approximate="tanh"),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}
