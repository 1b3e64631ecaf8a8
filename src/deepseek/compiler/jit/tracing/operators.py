"""What rewritten code calls: each operator decides, when it is reached, whether it is Python or a part of the graph.

A condition that is a Python value stays Python: the taken branch runs, the other is not even looked at. A condition
that is a tensor outside of any trace is Python, too (`bool` of it). Only a tensor condition inside a trace becomes
`torch.cond` or `while_loop`. To know what both branches give, each is traced aside first ("probing").

Rewritten code receives an `Operators` value and hands a deeper one to the branches: `depth` says how many tensor
conditions surround the code, so that a change of something outside of a branch is noticed, and `is_probing` keeps
nested probes from building graphs of their own. The parts stand in files of their own: conditions, branches, loops,
values, calls.
"""

from __future__ import annotations

from deepseek.compiler.jit.tracing.calls import Calls, Maker
from deepseek.compiler.jit.tracing.conditions import DEPTHS
from deepseek.compiler.jit.tracing.loops import Loops
from deepseek.compiler.jit.tracing.values import Values


class Operators(Calls, Loops, Values):
    """The operators at one depth of tensor conditions, for real or only to look."""

    def __init__(self, depth: str, make_counterpart: Maker, *, is_probing: bool) -> None:
        super().__init__(depth, is_probing=is_probing)
        self.make_counterpart = make_counterpart
        self.inner = self


def make_operators(make_counterpart: Maker) -> Operators:
    """Return the operators of the function that the user calls, with those of the functions it calls and all deeper
    ones."""
    probing, building = None, None
    for depth in reversed(DEPTHS):
        pair = [Operators(depth, make_counterpart, is_probing=is_probing) for is_probing in (True, False)]
        for operators in pair:
            operators.probing, operators.building = probing, building
        probing, building = pair
    assert building is not None
    entry = Operators(building.depth, make_counterpart, is_probing=False)
    entry.probing, entry.building, entry.inner, entry.is_entry = building.probing, building.building, building, True
    return entry
