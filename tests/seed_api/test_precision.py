"""The rows "Precision", `ds.fast_sigmoid` and `@ds.checkpoint` of the specification, as a user writes them."""

import torch
from torch import nn

import deepseek as ds


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 4))


def test_grad_scaler_trains_with_the_documented_arguments():
    from deepseek.mixed_precision import GradScaler

    scaler = GradScaler(init_scale=2**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000)
    layer = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = layer.weight.detach().clone()
    scaler.scale(layer(torch.ones(1, 2)).sum()).backward()
    scaler.unscale_(optimizer)
    assert layer.weight.grad.tolist() == [[1.0, 1.0]]
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(layer.weight.detach(), before - 0.5)
    assert scaler.state_dict()["scale"] == 2**16
    again = GradScaler()
    again.load_state_dict(scaler.state_dict())
    assert again.state_dict() == scaler.state_dict()


def test_precision_manager_runs_a_model_in_16_bits():
    model, inputs = build().eval(), torch.randn(5, 8)
    manager = ds.PrecisionManager(model, precision="bf16")
    outputs = manager.forward(inputs)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), model(inputs), rtol=0.05, atol=0.05)
    with manager:
        assert torch.equal(model(inputs), outputs)
    assert [each.dtype for each in manager.fp16_params] == [torch.bfloat16] * 4
    assert [each.shape for each in manager.fp16_params] == [each.shape for each in model.parameters()]


def test_the_default_manager_takes_what_the_machine_has():
    model, inputs = build().eval(), torch.randn(5, 8)
    torch.testing.assert_close(ds.PrecisionManager(model).forward(inputs).float(), model(inputs), rtol=0.05, atol=0.05)


def test_amp_level_by_environment(monkeypatch):
    monkeypatch.setenv("DS_AMP_LEVEL", "O0")
    assert ds.PrecisionManager(build()).forward(torch.randn(5, 8)).dtype == torch.float32
    monkeypatch.setenv("DS_AMP_LEVEL", "O2")
    manager = ds.PrecisionManager(build(), precision="bf16")
    assert {each.dtype for each in manager.model.parameters()} == {torch.bfloat16}
    assert {each.dtype for each in manager.master_params} == {torch.float32}


def test_dynamic_precision_trains_and_explains_itself():
    model = build()
    dynamic = ds.mixed_precision.DynamicPrecision(model, low="bf16", every=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kinds = []
    for _ in range(20):
        x = torch.randn(16, 8)
        (model(x).float() - x[:, :4]).square().mean().backward()
        optimizer.step()
        kinds += [event.kind for event in dynamic.step()]
        optimizer.zero_grad()
    assert "precision_planned" in kinds
    assert set(dynamic.precisions) == {"0", "3"} and set(dynamic.precisions.values()) <= {"bf16", "fp32"}
    assert all(name in dynamic.explain() for name in ("layer", "because"))
    twin = build()
    again = ds.mixed_precision.DynamicPrecision(twin, low="bf16", every=5)
    again.load_state_dict(dynamic.state_dict())
    assert again.precisions == dynamic.precisions


def test_fast_sigmoid_is_near_the_sigmoid_and_keeps_a_byte():
    x = torch.linspace(-6, 6, 1001, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        y = ds.fast_sigmoid(x)
    assert (y - torch.sigmoid(x)).abs().max() <= 0.07
    assert sum(each.numel() * each.element_size() for each in kept) <= x.numel()
    y.sum().backward()
    inside = x.detach().abs() < 3
    torch.testing.assert_close(x.grad, torch.where(inside, 1 / 6, 0.0))


def test_checkpoint_on_a_blocks_forward_gives_the_same_gradients():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = build()

        def forward(self, x):
            return self.body(x).tanh()

    class Recomputed(Plain):
        @ds.checkpoint
        def forward(self, x):
            return super().forward(x)

    gradients = []
    for block in (Plain(), Recomputed()):
        torch.manual_seed(1)
        x = torch.randn(5, 8)
        torch.manual_seed(2)
        block(x).sum().backward()
        gradients.append([each.grad for each in block.parameters()])
    assert all(map(torch.equal, *gradients))
