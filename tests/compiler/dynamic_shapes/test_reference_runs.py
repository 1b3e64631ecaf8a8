"""Runs for comparison leave the generators, the buffers and the modes of a model as they were, or refuse."""

import pytest
import torch
from torch import nn

from deepseek.compiler.dynamic_shapes.call_arguments import CallReader
from deepseek.compiler.dynamic_shapes.options import DynamicOptions
from deepseek.compiler.dynamic_shapes.padding import InputRole, PaddingRefusedError
from deepseek.compiler.dynamic_shapes.reference_runs import ReferenceRuns


class Model(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(dropout)

    def forward(self, x, mask=None):
        return self.dropout(self.linear(x))


def set_up(model):
    runs = []

    def run_plain(args, kwargs, *, is_learning=False):
        runs.append((args[0].shape, is_learning, torch.is_grad_enabled()))
        return model(*args, **kwargs)

    owner = model if isinstance(model, nn.Module) else None
    reader = CallReader(model.forward if owner is not None else model, DynamicOptions(), "model")
    return ReferenceRuns(run_plain, owner), reader, runs


def test_a_run_returns_the_outputs_and_whether_it_drew_random_numbers():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    state = torch.get_rng_state()
    for dropout, is_random in ((0.0, False), (0.5, True)):
        model = Model(dropout)
        state = torch.get_rng_state()
        reference, reader, _ = set_up(model)
        outputs, was_random = reference.run(reader.read((x,), {}))
        assert was_random is is_random
        assert torch.equal(torch.get_rng_state(), state)
        with torch.random.fork_rng(devices=[]):
            assert torch.equal(outputs[0], model(x))


def test_dropout_is_switched_off_for_a_comparison_and_on_again():
    model = Model(0.5)
    model.linear.eval()
    reference, reader, _ = set_up(model)
    x = torch.randn(2, 3, 4)
    whole, (part,) = reference.run_in_evaluation(reader.read((x,), {}), [[x[:1]]])
    assert torch.equal(whole[0], model.linear(x)) and torch.equal(part[0], model.linear(x[:1]))
    assert model.training and model.dropout.training and not model.linear.training


def test_what_is_random_in_evaluation_or_without_a_module_is_refused():
    class Noisy(Model):
        def forward(self, x, mask=None):
            return x + torch.rand_like(x)

    x = torch.randn(2, 3, 4)
    reference, reader, _ = set_up(Noisy())
    with pytest.raises(PaddingRefusedError, match="even in evaluation mode"):
        reference.run_in_evaluation(reader.read((x,), {}), [])
    reference, reader, _ = set_up(lambda x: x + torch.rand_like(x))
    with pytest.raises(PaddingRefusedError, match="nothing to compare"):
        reference.run_in_evaluation(reader.read((x,), {}), [])


def test_a_model_that_changes_its_buffers_is_refused_and_has_them_back():
    class Counting(Model):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, mask=None):
            self.calls += 1
            return x

    model = Counting()
    reference, reader, _ = set_up(model)
    with pytest.raises(PaddingRefusedError, match="changes its buffers"):
        reference.run(reader.read((torch.ones(2, 3, 4),), {}))
    assert model.calls == 0


def test_batch_statistics_are_refused_in_training_only():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    reference, _, _ = set_up(model)
    with pytest.raises(PaddingRefusedError, match="batch normalization"):
        reference.refuse_statistics()
    model.eval()
    reference.refuse_statistics()


@pytest.mark.parametrize(("rows", "length", "half"), [(6, 8, (3, 4)), (1, 8, (2, 4)), (6, 1, (3, 2))])
def test_a_probe_runs_the_batch_and_half_of_it_without_gradients(rows, length, half):
    reference, reader, runs = set_up(Model())
    x, mask = torch.randn(rows, length, 4), torch.ones(rows, length, dtype=torch.long)
    call = reader.read((x, mask), {})
    reference.probe(call, [InputRole(True, (1,)), InputRole(True, (1,))], [0.0, 0.0], mask)
    assert runs == [((rows, length, 4), True, False), ((*half, 4), True, False)]


def test_a_model_that_does_not_run_on_half_of_a_batch_is_refused():
    class Fixed(Model):
        def forward(self, x, mask=None):
            return x + torch.ones(4, 8, 4)

    reference, reader, _ = set_up(Fixed())
    x, mask = torch.randn(4, 8, 4), torch.ones(4, 8, dtype=torch.long)
    with pytest.raises(PaddingRefusedError, match="does not run on half of a batch"):
        reference.probe(reader.read((x, mask), {}), [InputRole(True, (1,))] * 2, [0.0, 0.0], mask)
