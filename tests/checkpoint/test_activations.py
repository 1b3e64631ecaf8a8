import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import deepseek as ds
from deepseek.checkpoint.activations import checkpoint_blocks_, flops_per_byte
from deepseek.core.errors import ConfigError

POLICIES = ("none", "selective", "block", "full")


class Block(nn.Module):
    def __init__(self, size=32):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.up = nn.Linear(size, 4 * size)
        self.down = nn.Linear(4 * size, size)
        self.drop = nn.Dropout(0.3)

    def forward(self, x, *, factor=1.0):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.drop(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1))
        return x + factor * self.drop(self.down(F.gelu(self.up(x))))


class Counting(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def build(num=3):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(num)))


def gradients(model, *, dtype=None, inputs=None):
    """Outputs and all gradients of one pass with random dropout."""
    torch.manual_seed(1)
    x = torch.randn(2, 16, 32, requires_grad=True) if inputs is None else inputs
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        y = model(x)
    (y.float() ** 2).sum().backward()
    return [y.detach(), x.grad, *(each.grad for each in model.parameters())]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_bit_equal_with_dropout_and_under_autocast(policy, dtype):
    expected = gradients(build(), dtype=dtype)
    model = build()
    for block in model:
        assert ds.checkpoint(policy=policy)(block) is block
    for mine, other in zip(gradients(model, dtype=dtype), expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("policy", POLICIES)
def test_on_the_blocks_of_a_model(policy):
    expected, model = gradients(build()), build()
    assert checkpoint_blocks_(model, policy) == 3
    for mine, other in zip(gradients(copy.deepcopy(model)), expected, strict=True):
        assert torch.equal(mine, other)


def test_the_decorator_on_a_forward_a_class_and_a_function():
    class Decorated(Block):
        @ds.checkpoint
        def forward(self, x):
            return super().forward(x)

    @ds.checkpoint(policy="selective")
    class Wholly(Block):
        pass

    torch.manual_seed(0)
    expected = gradients(nn.Sequential(Block()))
    for kind in (Decorated, Wholly):
        torch.manual_seed(0)
        for mine, other in zip(gradients(nn.Sequential(kind())), expected, strict=True):
            assert torch.equal(mine, other)
    assert Decorated.forward.__name__ == "forward"


def test_nested_checkpoints_are_bit_equal():
    expected = gradients(build())
    model = build()
    for block in model:
        ds.checkpoint(block)
        ds.checkpoint(block.up)
    ds.checkpoint(policy="selective")(model)
    for mine, other in zip(gradients(model), expected, strict=True):
        assert torch.equal(mine, other)


def test_each_policy_keeps_less_and_recomputes_what_it_says():
    kept, products, norms = {}, {}, {}
    for policy in POLICIES[:3]:
        model = build()
        checkpoint_blocks_(model, policy)
        with Counting() as counting:
            gradients(model)
        products[policy] = counting.counts["addmm"]
        norms[policy] = counting.counts["native_layer_norm"]
        x = torch.randn(2, 16, 32, requires_grad=True)
        weights = {each.untyped_storage()._cdata for each in model.parameters()}
        with Live() as live:
            y = model(x)
        kept[policy] = live.num_bytes(beside=weights)
        del y
    assert products == {"none": 9, "selective": 9, "block": 18}
    assert norms == {"none": 3, "selective": 6, "block": 6}
    assert kept["block"] < 0.3 * kept["none"] and kept["selective"] < 0.75 * kept["none"]


class Live(TorchDispatchMode):
    """Bytes of the results that are alive when it ends."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for each in results if isinstance(results, tuple | list) else (results,):
            if isinstance(each, torch.Tensor):
                self.storages[each.untyped_storage()._cdata] = (
                    torch.multiprocessing.reductions.StorageWeakRef(each.untyped_storage()),
                    each.untyped_storage().nbytes(),
                )
        return results

    def num_bytes(self, beside):
        alive = {key: size for key, (storage, size) in self.storages.items() if not storage.expired()}
        return sum(size for key, size in alive.items() if key not in beside)


def test_the_price_is_operations_per_byte_of_the_result():
    aten = torch.ops.aten
    x, weight = torch.ones(4, 8, 10, 10), torch.ones(16, 8, 3, 3)
    assert flops_per_byte(aten.convolution.default, x, weight) == 2 * 8 * 9 / 4
    assert flops_per_byte(aten.addmm.default, torch.ones(3), torch.ones(5, 64).half(), torch.ones(64, 3)) == 64.0
    assert flops_per_byte(aten.gelu.default, x) == 0.0
    assert flops_per_byte(aten._scaled_dot_product_flash_attention_for_cpu.default, x, x, x) == float("inf")


def test_a_product_with_short_sums_is_recomputed_when_it_is_below_the_price():
    model = nn.Sequential(nn.Linear(4, 512), nn.Tanh(), nn.Linear(512, 1))
    for price, num_products in ((1.0, 2), (100.0, 3)):
        wrapped = ds.checkpoint(policy="selective", min_flops_per_byte=price)(copy.deepcopy(model))
        with Counting() as counting:
            wrapped(torch.ones(2, 4)).square().sum().backward()
        assert counting.counts["addmm"] == num_products


def test_without_gradients_nothing_is_wrapped():
    calls = []
    function = ds.checkpoint(lambda x: calls.append(torch.is_grad_enabled()) or x)
    with torch.no_grad():
        function(torch.ones(1))
    assert calls == [False]


def test_keywords_tuples_and_several_outputs_pass_through():
    @ds.checkpoint
    def divide(a, b, *, names=("q", "r")):
        return {names[0]: a / b, names[1]: (a, None)}

    a = torch.ones(3, requires_grad=True)
    answer = divide(a, torch.full((3,), 2.0), names=("x", "y"))
    assert answer["y"][1] is None
    answer["x"].sum().backward()
    assert a.grad.tolist() == [0.5] * 3


def test_it_compiles():
    model, x = Block().eval(), torch.randn(2, 16, 32, requires_grad=True)
    twin = copy.deepcopy(model)
    ds.checkpoint(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    first = torch.autograd.grad(compiled(x).sum(), model.up.weight)[0]
    torch.manual_seed(0)
    second = torch.autograd.grad(twin(x).sum(), twin.up.weight)[0]
    assert first.shape == second.shape and first.isfinite().all()


def test_unknown_policies_are_refused():
    with pytest.raises(ConfigError, match="unknown checkpoint policy 'selectiv'; did you mean 'selective'"):
        ds.checkpoint(policy="selectiv")


def test_what_cannot_run_twice_is_refused():
    def generator(x):
        yield x

    async def coroutine(x):
        return x

    for function in (generator, coroutine):
        with pytest.raises(ConfigError, match=f"{function.__name__} is a generator or a coroutine"):
            ds.checkpoint(function)
    with pytest.raises(ConfigError, match="was put on 3; put it on a function"):
        ds.checkpoint(3)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="Linear has no list of repeated blocks"):
        checkpoint_blocks_(nn.Linear(2, 2))


def test_the_module_is_still_a_room_and_light():
    code = """
import sys
import deepseek as ds
from deepseek.checkpoint import layout
assert ds.checkpoint.layout is layout and callable(ds.checkpoint)
import deepseek.checkpoint as room
assert room is ds.checkpoint
print("torch" in sys.modules)
from deepseek.checkpoint.saving import save
from deepseek.checkpoint import checkpoint_blocks_
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == [
        "False"
    ]
    with pytest.raises(AttributeError, match="it offers checkpoint_blocks_"):
        _ = ds.checkpoint.no_such_name
