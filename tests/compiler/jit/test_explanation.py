"""Explanations as text and as plain values."""

import json
import operator

import torch
from torch import fx, nn

from deepseek.compiler.jit.backend import Captured
from deepseek.compiler.jit.explanation import Explanation, Rewritten, count_operators, explain_captured
from deepseek.compiler.jit.jit_options import JitOptions
from deepseek.compiler.jit.tracing.sites import Site, Trace


class Branch(nn.Module):
    def forward(self, x):
        return x.sin() + 1


def make_graph():
    """A graph of two operators, one of which calls a graph of two."""
    root = nn.Module()
    root.branch = fx.symbolic_trace(Branch())
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(operator.mul, (graph.call_module("branch", (x,)), 2)))
    return fx.GraphModule(root, graph)


def test_operators_are_counted_with_those_of_branches():
    assert count_operators(make_graph()) == 4


def test_sites_are_told_in_the_order_of_their_lines_and_a_break_once():
    early, late = Site(__file__, 3, "if", "f"), Site(__file__, 20, "while", "f")
    trace = Trace(rewritten=[late, early])
    earlier = Trace(breaks=[(late, "first reason"), (late, "last reason")])
    captured = Captured([(make_graph(), [torch.ones(2)], False)])
    found = explain_captured(make_graph, captured, trace, earlier, JitOptions(optimize=False))
    assert [statement.line for statement in found.rewritten] == [3, 20]
    assert [statement.reason for statement in found.breaks] == ["last reason"]
    assert (found.num_graphs, found.num_operators) == (1, 4)
    assert found.peak_bytes_before is None


def test_a_graph_that_the_passes_cannot_read_is_explained_with_a_note():
    captured = Captured([(make_graph(), [], False)])  # no inputs: it cannot be traced again
    found = explain_captured(make_graph, captured, Trace(), Trace(), JitOptions())
    assert len(found.notes) == 1
    assert found.notes[0].startswith("fusions and memory of this graph are not known: ")


def test_text_has_a_line_for_each_finding_and_to_dict_is_json():
    statement = Rewritten("/home/user/model.py", 7, "while", "while x.sum() > 1:")
    broken = Rewritten("/home/user/model.py", 9, "if", "if x > 0:", reason="it prints")
    told = Explanation(
        "f", 1, 2, (statement,), (broken,), ("batch norm at conv",), 2048, 1024, ("a note",), ("all cpu",)
    )
    lines = str(told).splitlines()
    assert lines[0] == "f: 1 graph, 2 operators"
    assert any("model.py:7" in line and "while x.sum() > 1:" in line for line in lines)
    assert "it prints" in str(told)
    assert "devices: all cpu" in lines
    assert lines[-1] == "a note"
    assert json.loads(json.dumps(told.to_dict()))["breaks"][0]["line"] == 9


def test_a_section_without_rows_says_none():
    assert "graph breaks: none" in str(Explanation("f", 2, 1, (), (), (), None, None))
