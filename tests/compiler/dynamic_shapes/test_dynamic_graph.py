"""What may be made dynamic, and what a decorated function, method, class or module still is."""

import copy
import io
import pickle
import random

import pytest
import torch
from torch import nn

from deepseek.compiler.dynamic_shapes.dynamic_graph import dynamic_graph
from deepseek.core.errors import ConfigError
from tests.compiler.dynamic_shapes.encoders import SIZE, Encoder, build_pair, make_batch


def test_a_class_of_modules_is_decorated():
    @dynamic_graph(mask="mask", backend="eager", cache=False)
    class Decorated(Encoder):
        """What it was."""

    class Larger(Decorated):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(SIZE, 2)

        def forward(self, tokens, mask):
            return self.head(super().forward(tokens, mask))

    tokens, mask = make_batch(random.Random(9))
    for kind, size in ((Decorated, SIZE), (Larger, 2)):
        model = kind().eval()
        assert isinstance(model, Encoder)
        assert model(tokens, mask).shape == (*mask.shape, size)
        assert model.explain().num_calls == 1
    assert Decorated.__doc__ == "What it was."


def test_a_module_keeps_its_parameters_and_its_class():
    plain = Encoder()
    names = list(plain.state_dict())
    model = dynamic_graph(plain, backend="eager", cache=False)
    assert model is plain
    assert type(model) is Encoder
    model(*make_batch(random.Random(0)))
    assert list(model.state_dict()) == names


def test_a_method_is_decorated():
    class Scorer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        @dynamic_graph(backend="eager", cache=False)
        def forward(self, x):
            return self.linear(x).sum()

    scorer = Scorer()
    for length in (3, 5, 8):
        x = torch.randn(length, 4)
        torch.testing.assert_close(scorer(x), scorer.linear(x).sum())
    assert scorer.forward.explain().num_calls == 3


def test_a_copy_is_a_model_of_its_own():
    model, plain = build_pair(Encoder().eval(), mask="mask")
    tokens, mask = make_batch(random.Random(10))
    model(tokens, mask)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(tokens, mask)[mask], plain(tokens, mask)[mask])
    assert other.explain().num_calls == 1
    assert all(block.forward.block is block for block in other.blocks)


def test_a_model_can_be_pickled():
    model, plain = build_pair(Encoder().eval(), mask="mask")
    tokens, mask = make_batch(random.Random(11))
    model(tokens, mask)
    restored = pickle.load(io.BytesIO(pickle.dumps(model)))
    torch.testing.assert_close(restored(tokens, mask)[mask], plain(tokens, mask)[mask])


async def coroutine(x):
    return x


def generator_function(x):
    yield x


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (3, "was given a int"),
        (coroutine, "coroutine"),
        (generator_function, "generator"),
        (len, "no Python code"),
        (torch.relu, "no Python code"),
        (dict, "no nn.Module"),
    ],
)
def test_what_cannot_be_compiled_is_refused(target, message):
    with pytest.raises(ConfigError, match=message):
        dynamic_graph(target)


def test_a_module_is_made_dynamic_once():
    model, _ = build_pair(Encoder())
    with pytest.raises(ConfigError, match="already"):
        dynamic_graph(model)
