"""Arguments that are sometimes left out, or `None`, or of another kind: the answers are those of the plain function."""

import warnings

import pytest
import torch
from torch import nn

from deepseek.compiler.dynamic_shapes.call_arguments import CallReader
from deepseek.compiler.dynamic_shapes.dynamic_graph import dynamic_graph
from deepseek.compiler.dynamic_shapes.options import DynamicOptions
from deepseek.core.errors import ConfigError

LENGTHS = (3, 4, 5, 6, 7, 9)


def score(x, mask=None, *, scale=1.0, extra=None):
    y = x * scale
    if extra is not None:
        y = y + (extra["bias"] if isinstance(extra, dict) else extra)
    return y.sum(-1) if mask is None else (y * mask).sum(-1)


def ones(*shape):
    return torch.ones(*shape) + torch.arange(shape[-1])


CALLS = {
    "mask left out": lambda length: {} if length % 2 else {"mask": ones(2, length)},
    "mask None": lambda length: {"mask": None if length % 2 else ones(2, length)},
    "mask of one row": lambda length: {"mask": ones(length) if length % 2 else ones(2, length)},
    "another argument": lambda length: {"scale": 2.0} if length % 2 else {"mask": ones(2, length)},
    "number or tensor": lambda length: {"scale": 2.0 if length % 2 else ones(1)},
    "dict or tensor": lambda length: {"extra": {"bias": ones(length)} if length % 2 else ones(2, length)},
    "another order": lambda length: dict(
        sorted({"mask": ones(2, length), "scale": 2.0}.items(), reverse=bool(length % 2))
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_function_with_optional_arguments_is_right_at_every_length(case):
    torch._dynamo.reset()
    compiled = dynamic_graph(score, backend="eager", cache=False)
    for length in LENGTHS:
        arguments = {"x": ones(2, length), **CALLS[case](length)}
        torch.testing.assert_close(compiled(**arguments), score(**arguments))
    assert len(compiled.explain().compilations) <= 4


@pytest.mark.parametrize("case", ["mask left out", "mask None"])
def test_kinds_of_calls_in_turns_do_not_compile_again_for_each_length(case):
    torch._dynamo.reset()
    compiled = dynamic_graph(score, backend="eager", cache=False)
    for length in range(3, 33):
        arguments = {"x": ones(2, length), **CALLS[case](length)}
        torch.testing.assert_close(compiled(**arguments), score(**arguments))
    assert len(compiled.explain().compilations) == 2


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(8, 8), nn.Sequential(nn.Tanh())

    def forward(self, x, bias=None):
        y = self.act(self.linear(x))
        return y if bias is None else y + bias


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x, mask=None, bias=None):
        for index, layer in enumerate(self.layers):
            x = layer(x, bias=bias if index % 2 else None)
        return x if mask is None else x * mask[..., None]


@pytest.mark.parametrize("options", [{}, {"mask": "mask"}], ids=["symbols", "groups of rows"])
def test_a_module_whose_blocks_get_an_optional_argument(options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, compiled = Stack().eval(), Stack().eval()
    compiled.load_state_dict(plain.state_dict())
    dynamic_graph(compiled, backend="eager", cache=False, **options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, length in enumerate((4, 5, 6, 7, 9, 10, 11, 12)):
            x, mask = torch.randn(3, length, 8), (torch.arange(length) < torch.tensor([[2], [3], [length]])).long()
            arguments = {"mask": mask if number % 2 else None, "bias": torch.randn(3, 1, 8) if number % 4 > 1 else None}
            torch.testing.assert_close(compiled(x, **arguments), plain(x, **arguments))


class Summary(nn.Module):
    """Returns one value more where it is given a mask."""

    def forward(self, x, mask=None, is_long=False):
        y = x.tanh() if mask is None else x.tanh() * mask[..., None]
        return (y, y.sum(1), y.sum(-1)) if is_long else (y, y.sum(1))


def test_other_outputs_for_another_argument():
    torch._dynamo.reset()
    plain, compiled = Summary(), dynamic_graph(Summary(), mask="mask", backend="eager", cache=False)
    for number, length in enumerate((4, 5, 6, 7, 9, 10, 11, 12)):
        x, mask = torch.randn(3, length, 8), (torch.arange(length) < torch.tensor([[2], [3], [length]])).long()
        arguments = {"is_long": True} if number % 2 else {}
        for mine, theirs in zip(compiled(x, mask, **arguments), plain(x, mask, **arguments), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_kinds_are_told_apart_by_which_arguments_are_tensors_of_how_many_dims():
    reader = CallReader(score, DynamicOptions(), "score")
    calls = [{}, {"mask": None}, {"mask": ones(2, 3)}, {"mask": ones(3)}, {"scale": 2.0}, {"scale": ones(1)}]
    kinds = [reader.read((ones(2, 3),), arguments).kind for arguments in calls]
    assert len({id(kind) for kind in kinds}) == len(calls)
    assert reader.read((ones(4, 5),), {"mask": ones(4, 5)}).kind is kinds[2]
    assert kinds[2].history.varying == [(0, 1), (0, 1)] and kinds[0].history.varying == [()]


def test_dims_that_do_not_exist_are_refused():
    reader = CallReader(score, DynamicOptions(dims={"x": 2}), "score")
    call = reader.read((ones(2, 3),), {})
    with pytest.raises(ConfigError, match="dims names dim 2 of 'x', which has 2 dims"):
        reader.find_length_roles(call)


def test_one_pad_value_for_all_leaves_the_mask_with_zeros():
    reader = CallReader(score, DynamicOptions(mask="mask", pad_value=5.0), "score")
    call = reader.read((ones(2, 3),), {"mask": ones(2, 3)})
    assert dict(zip(call.names, reader.pad_values(call), strict=True)) == {"x": 5.0, "mask": 0.0}


def test_pad_values_go_to_the_leaves_they_name():
    reader = CallReader(score, DynamicOptions(pad_value={"x": 1.0, "extra['bias']": 3.0}), "score")
    call = reader.read((ones(2, 3),), {"extra": {"bias": ones(3)}})
    assert dict(zip(call.names, reader.pad_values(call), strict=True)) == {"x": 1.0, "extra['bias']": 3.0}


def test_a_mask_without_positions_leaves_nothing_out():
    @dynamic_graph(mask="mask", backend="eager", cache=False)
    def function(x, mask):
        return x.relu() * mask

    for rows, length in ((3, 6), (3, 7), (3, 0), (0, 5), (3, 8)):
        x, mask = torch.randn(rows, length), torch.ones(rows, length, dtype=torch.int64)
        assert torch.equal(function(x, mask), x.relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int64])
def test_a_mask_of_zeros_and_ones_may_have_any_type(dtype):
    torch.manual_seed(0)
    plain, compiled = Stack().eval(), dynamic_graph(Stack().eval(), mask="mask", backend="eager", cache=False)
    compiled.load_state_dict(plain.state_dict())
    for length in (5, 7, 9, 6):
        x, mask = torch.randn(3, length, 8), (torch.arange(length) < torch.tensor([[2], [3], [length]])).to(dtype)
        torch.testing.assert_close(compiled(x, mask) * mask[..., None], plain(x, mask) * mask[..., None])


@pytest.mark.parametrize("numbers", [[0.0, -torch.inf], [0.0, 0.0], [0.0, -1e9], [1.0, 0.5], [1.0, torch.nan]])
def test_a_mask_that_is_added_to_scores_is_refused(numbers):
    @dynamic_graph(mask="mask", backend="eager", cache=False)
    def function(x, mask):
        return x + mask

    with pytest.raises(ConfigError, match=r"the mask 'mask' .*float32 of numbers from .*; expected \(rows, length\)"):
        function(torch.randn(2, 2), torch.tensor([numbers, numbers]))
