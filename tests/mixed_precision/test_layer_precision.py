import copy
import gc

import pytest
import torch
from torch import nn

from deepseek.mixed_precision import DynamicPrecision
from deepseek.mixed_precision import layer_precision as narrowing_module
from deepseek.mixed_precision.layer_precision import Compute, Narrowing, clear_compute_, set_compute_, share_inputs

BF16 = Compute("cpu", torch.bfloat16)
FP32 = Compute("cpu", None)
BIG = 128 * 128


def kept_bytes(run, weights=()):
    """Distinct bytes that autograd keeps, by torch's own hook around ours."""
    kept = {}
    inner = Narrowing(weights)
    pack = inner.pack_hook

    def note(value):
        stored = pack(value)
        tensor = stored[0] if isinstance(stored, tuple) else stored.values
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return stored

    inner.pack_hook = note
    with inner:
        result = run()
    return result, sum(kept.values())


def test_gradients_are_those_of_values_rounded_once():
    x = torch.randn(BIG, requires_grad=True)
    middle = None
    with Narrowing():
        middle = x * 3
        y = middle.sin()
    y.sum().backward()
    assert torch.equal(y.detach(), (x * 3).sin())
    expected = middle.detach().bfloat16().float().cos() * 3
    assert torch.equal(x.grad, expected)


def test_a_tensor_that_several_operators_keep_is_kept_once():
    x = torch.randn(BIG, requires_grad=True)
    _, num_bytes = kept_bytes(lambda: [(base := x * 2).sin(), base.cos(), base.square()])
    assert num_bytes == BIG * 2


def test_a_new_tensor_at_an_old_address_is_not_taken_for_the_old_one(monkeypatch):
    monkeypatch.setattr(narrowing_module, "_SMALLEST", 1024)
    narrowing, kept, addresses = Narrowing(), [], []
    for number in range(200):
        value = torch.full((4096,), float(number))
        addresses.append((value.untyped_storage()._cdata, value.data_ptr()))
        kept.append(narrowing.pack_hook(value))
        del value
    assert len({storage for storage, _ in addresses}) < 200  # the allocator did give memory out again
    assert [narrowing.unpack_hook(each)[0].item() for each in kept] == list(range(200))


def test_a_tensor_changed_in_place_is_kept_as_it_was():
    x = torch.ones(BIG, requires_grad=True)
    with Narrowing():
        middle = x * 1.0
        first = middle * middle.detach()
        middle.detach().mul_(4.0)
        second = middle.detach() * x
    (first.sum() + second.sum()).backward()
    assert x.grad[0].item() == 1.0 + 4.0


def test_weights_small_tensors_and_other_dtypes_are_left_alone():
    layer = nn.Linear(128, 128)
    x = torch.randn(128, 128, requires_grad=True)
    _, with_weights = kept_bytes(lambda: layer(x * 1.0), layer.parameters())
    assert with_weights == BIG * 4 + BIG * 2  # the weight as it is, the input narrow
    for small in (torch.randn(100, requires_grad=True), torch.randn(BIG, dtype=torch.float64, requires_grad=True)):
        _, num_bytes = kept_bytes(lambda small=small: (small * 1.0).sin())
        assert num_bytes == small.numel() * small.element_size()


def test_an_expanded_tensor_is_not_written_out():
    x = torch.randn(1, BIG, requires_grad=True)
    _, num_bytes = kept_bytes(lambda: (x * 1.0).expand(100, BIG).sin())
    assert num_bytes <= BIG * 4


def test_changing_in_place_what_is_kept_as_it_is_raises_as_it_does_in_torch():
    small = torch.ones(8, requires_grad=True) * 1.0
    with Narrowing():
        y = small.sin()
    small.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_a_wide_layer_among_narrow_ones_notices_a_change_in_place_too():
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    set_compute_(layer, FP32)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("compute", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("around", [True, False], ids=["in autocast", "outside"])
def test_a_layer_computes_as_it_is_set_whatever_surrounds_it(compute, around):
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    expected = layer(x)
    set_compute_(layer, compute)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
        y = layer(x)
    assert y.dtype == (compute.dtype or torch.float32)
    if compute is FP32:
        assert torch.equal(y, expected)
    clear_compute_(layer)
    assert torch.equal(layer(x), expected) and "forward" not in layer.__dict__


def test_a_wide_layer_takes_narrow_inputs():
    layer = nn.Linear(8, 8)
    set_compute_(layer, FP32)
    assert layer(torch.ones(2, 8, dtype=torch.float16)).dtype == torch.float32


def test_a_copy_runs_its_own_weights():
    layer = nn.Linear(4, 4)
    set_compute_(layer, BF16)
    twin = copy.deepcopy(layer)
    nn.init.zeros_(twin.weight)
    nn.init.zeros_(twin.bias)
    assert twin(torch.ones(1, 4)).abs().sum() == 0 and layer(torch.ones(1, 4)).abs().sum() > 0


def test_a_forward_that_was_already_replaced_still_runs_and_comes_back():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x + 1
    mine = layer.forward
    set_compute_(layer, BF16)
    set_compute_(layer, FP32)
    assert layer(torch.zeros(1)).item() == 1.0
    clear_compute_(layer)
    assert layer.forward is mine
    clear_compute_(layer)  # a second time changes nothing
    assert layer.forward is mine


def test_layers_that_read_one_tensor_share_its_narrow_copy():
    set_layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
    for layer in set_layers:
        set_compute_(layer, Compute("cpu", torch.bfloat16, keeps_narrow=True, is_layer=True))
    x = torch.randn(256, 64, requires_grad=True)
    kept = set()

    def note(value):
        if value.shape == (256, 64):
            kept.add(value.data_ptr())
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value), share_inputs():
        outputs = [layer(x) for layer in set_layers]
    assert len(kept) == 1
    sum(each.float().sum() for each in outputs).backward()
    expected = sum(torch.ones(256, 64) @ layer.weight.bfloat16().float() for layer in set_layers)
    torch.testing.assert_close(x.grad, expected, rtol=0.02, atol=0.02)


def test_an_input_changed_in_place_is_narrowed_again():
    layer = nn.Linear(4, 4, bias=False)
    nn.init.eye_(layer.weight)
    set_compute_(layer, Compute("cpu", torch.bfloat16, is_layer=True))
    x = torch.ones(1, 4)
    with share_inputs():
        assert layer(x)[0, 0].item() == 1.0
        x.mul_(2)
        assert layer(x)[0, 0].item() == 2.0


def tensor_bytes():
    """Bytes of all storages that a tensor known to Python's collector points to, each once."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if type(value) in (torch.Tensor, nn.Parameter) and value.layout is torch.strided:
            storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(storages.values())


class Siblings(nn.Module):
    """Two layers that read one tensor, and a third that fails where it is told to."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64)
        self.fails = False

    def forward(self, x):
        y = self.left(x + 1) + self.right(x + 1)
        if self.fails:
            raise KeyError
        return y


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("ending", ["whole", "no backward", "error"])
def test_no_activation_outlives_its_forward_pass(ending):
    model, x = Siblings(), torch.ones(512, 64)
    dynamic = DynamicPrecision(model, low="bf16", costs="assumed")
    model(x[:1]).sum().backward()  # whatever is made once is there now
    model.zero_grad(set_to_none=True)
    before = tensor_bytes()
    if ending == "error":
        model.fails = True
        with pytest.raises(KeyError):
            model(x)
    elif ending == "no backward":
        model(x)
    else:
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)
    dynamic._unwatch()  # what a sampled step has seen is the sample's
    assert tensor_bytes() <= before
    dynamic.remove()
    assert tensor_bytes() <= before


def test_passes_inside_one_another_share_each_within_itself():
    layer, x, seen = nn.Linear(64, 64, bias=False), torch.ones(256, 64), []
    set_compute_(layer, Compute("cpu", torch.bfloat16, is_layer=True))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with share_inputs():
        layer(x)
        with share_inputs():
            layer(x + 1)
        assert torch.equal(layer(x), seen[0]) and not torch.equal(seen[1], seen[0])
