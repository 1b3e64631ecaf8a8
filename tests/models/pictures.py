"""What the tests of vision models share: weights that are nowhere trivial, and what every one of them must allow."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import Dim, export


def randomize(model, seed=0):
    """Every parameter and every running statistic away from its default, in float64 and evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
            elif getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.2, generator=generator)
    return model


def arrays(model):
    """The state dict in NumPy."""
    return {name: each.detach().double().numpy() for name, each in model.state_dict().items()}


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_export_with_any_batch(model, pictures):
    """One exported program answers as the model does, for batches of several sizes."""
    batch = Dim("batch", min=1, max=64)
    program = export(model, (pictures,), dynamic_shapes=({0: batch},), strict=False).module()
    for size in (1, 2, 5):
        more = noise(size, *pictures.shape[1:], seed=size).to(pictures.dtype)
        torch.testing.assert_close(program(more), model(more))


def check_one_graph_in_training(model, pictures):
    """The training forward is one graph, with the gradients of the plain one."""
    model.train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for each in (model, compiled):
        model.zero_grad()
        torch.manual_seed(0)
        each(pictures).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def check_channels_last(model, pictures):
    """Laid out with channels last, the model answers the same."""
    expected = model(pictures)
    last = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(pictures.to(memory_format=torch.channels_last)), expected)


def find_modules_called_twice(model, pictures):
    """Names of the leaves that one forward pass calls more than once; graph quantizers refuse them."""
    calls = dict.fromkeys((name for name, each in model.named_modules() if not list(each.children())), 0)

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    handles = [model.get_submodule(name).register_forward_hook(count(name)) for name in calls]
    model(pictures)
    for handle in handles:
        handle.remove()
    return [name for name, number in calls.items() if number > 1]
