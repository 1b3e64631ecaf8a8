"""`@deepseek.dynamic_graph` on a function, a module and a class, bare and with options, for many lengths."""

import pytest
import torch

import deepseek

LENGTHS = (5, 12, 7, 31, 12, 64)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def test_a_bare_function_is_compiled_once_for_all_lengths():
    @deepseek.dynamic_graph
    def total(x):
        return (3 * x + 1).sum(dim=1)

    for length in LENGTHS:
        torch.testing.assert_close(total(torch.full((2, length), 2.0)), torch.full((2,), 7.0 * length))
    assert len(total.explain().compilations) == 1


def test_a_module_trains_on_sequences_of_many_lengths():
    torch.manual_seed(0)
    layers = (torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(4))
    plain = torch.nn.Sequential(*layers)
    model = torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(4)))
    model.load_state_dict(plain.state_dict())
    model = deepseek.dynamic_graph(model, backend="eager")
    for length in LENGTHS:
        x = torch.randn(3, length, 16, requires_grad=True)  # as from an embedding
        for each in (plain, model):
            each.zero_grad()
            each(x).square().mean().backward()
        for expected, parameter in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad)
    assert len(model.explain().compilations) == 1
    assert model.explain().blocks == ("TransformerEncoderLayer, 4 times",)


def test_a_class_with_options_ignores_padding():
    @deepseek.dynamic_graph(mask="mask", max_compilations=4, backend="eager")
    class Mean(torch.nn.Module):
        def forward(self, x, mask):
            return (x * mask).sum(dim=1) / mask.sum(dim=1)

    mean = Mean()
    for longest in LENGTHS:
        lengths = torch.tensor([longest, 2, 3, longest // 2])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        x = torch.rand(4, longest)
        expected = [x[row, :length].mean() for row, length in enumerate(lengths)]
        torch.testing.assert_close(mean(x, mask), torch.stack(expected))
    assert len(mean.explain().compilations) <= 4
