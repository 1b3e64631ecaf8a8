"""Blocks of one structure are one group, and the bound on compilations holds."""

import random

import pytest
import torch
from torch import nn

from deepseek.compiler.dynamic_shapes.dynamic_graph import dynamic_graph
from deepseek.compiler.dynamic_shapes.regions import DynamicGraphWarning, find_repeated
from tests.compiler.dynamic_shapes.encoders import Block, Encoder, build_pair, count_graphs, make_batch


def test_a_model_of_24_blocks_is_compiled_as_one():
    backend, graphs = count_graphs()
    model, plain = build_pair(Encoder(num_layers=24), mask="mask", backend=backend)
    generator = random.Random(0)
    for _ in range(4):
        tokens, mask = make_batch(generator, num_rows=8)
        mask[0], mask[1] = mask[1].clone(), mask[1]  # never one row alone, which is a graph of its own
        torch.testing.assert_close(model(tokens, mask)[mask], plain(tokens, mask)[mask])
    assert len({len(graph.graph.nodes) for graph in graphs}) == len(graphs) <= 2
    assert all(each.target == "Block" for each in model.explain().compilations)
    assert model.explain().blocks == ("Block, 24 times",)


def test_blocks_of_different_structure_are_different_groups():
    model = nn.Sequential(Block(), Block(), Block(dropout=0.5), nn.Sequential(Block(), nn.ReLU()), Block(dropout=0.5))
    groups = find_repeated(model)
    assert [len(group) for group in groups] == [2, 2]
    assert groups[1][0].dropout == 0.5


def test_a_frozen_block_is_not_of_the_structure_of_a_trained_one():
    model = nn.ModuleList([Block(), Block()])
    model[0].requires_grad_(requires_grad=False)
    assert find_repeated(model) == []


def test_the_bound_holds_and_the_failing_guard_is_named():
    backend, graphs = count_graphs()

    @dynamic_graph(backend=backend, cache=False, max_compilations=3)
    def shifted(x, number):
        return x * 2 if number == 99 else x + number

    with pytest.warns(DynamicGraphWarning, match=r"3 compilations.*number") as caught:
        for number in range(9):
            assert shifted(torch.zeros(3), number).tolist() == [number] * 3
        num_captured = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert shifted(torch.zeros(3), 20).tolist() == [20] * 3
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_captured  # nothing is traced any more
    assert len(graphs) == 3
    assert len(shifted.explain().compilations) == 3
    assert len(caught) == 1


def test_a_dim_that_the_function_fixes_is_softened_with_a_warning():
    @dynamic_graph(backend="eager", cache=False)
    def fixed(x):
        return x.reshape(-1, 6) if x.shape[0] == 12 else x.sum()

    with pytest.warns(DynamicGraphWarning, match="fixes a dim"):
        for length in (6, 12, 6, 12):
            assert fixed(torch.ones(length)).sum() == length
