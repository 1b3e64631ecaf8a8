"""A model's own calling convention around flat tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek.compiler.runtimes.backends import BACKENDS
from deepseek.compiler.runtimes.backends.flat_signature import flatten_model, split_samples, trace_outputs
from deepseek.core.errors import ConfigError
from tests.compiler.models import Tagger
from tests.compiler.runtimes.backends.offered import tagger_inputs


def test_only_what_is_computed_is_asked_of_a_runtime():
    x, y = torch.ones(1), torch.ones(1)
    assert trace_outputs([y, x, y], [x]) == ((0,), (("answer", 0), ("input", 0), ("answer", 0)))
    assert trace_outputs([x], [x]) == ((0,), (("answer", 0),))


def test_a_call_unlike_the_samples_is_refused():
    compiled = BACKENDS["eager"].compile(Tagger().eval(), tagger_inputs())
    with pytest.raises(ConfigError, match="is True and was False"):
        compiled(**tagger_inputs(is_scaled=True))
    with pytest.raises(ConfigError, match="call it like them"):
        compiled(torch.arange(6).reshape(2, 3))
    with pytest.raises(ConfigError, match=r"float32\[2, 4\]"):
        BACKENDS["eager"].compile(nn.Linear(4, 2).eval(), torch.ones(1, 4))(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("samples", "said"),
    [(None, "missing"), (7, "are 7"), ("text", "'text'"), ((), "no tensor"), ({"x": 3}, "no tensor")],
)
def test_samples_that_are_none_are_refused(samples, said):
    with pytest.raises(ConfigError, match=said):
        flatten_model(nn.Linear(4, 2).eval(), samples)


def test_a_model_that_is_none_or_trains_is_refused():
    with pytest.raises(ConfigError, match=r"give a torch\.nn\.Module"):
        flatten_model(lambda x: x, torch.ones(1))
    with pytest.raises(ConfigError, match=r"model\.eval"):
        flatten_model(nn.Sequential(nn.Linear(4, 2).eval(), nn.Dropout()), torch.ones(1, 4))


def test_samples_are_positional_or_named():
    assert split_samples((1, 2)) == ((1, 2), {})
    assert split_samples({"a": 1}) == ((), {"a": 1})
