"""Taking the probes out of a captured graph: what was run only to look does not run in the graph.

Dynamo writes into each node which Python lines it came from. Nodes that came from `probing.run_probe` or `settle`
answer no question any more once the trace is over, and nothing that stays reads them. They are erased here before a
backend sees the graph, random operators included, which ordinary dead code elimination must keep.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from deepseek.compiler.jit.tracing import probing

PROBES = ("in run_probe\n", "in settle\n")


def erase_probes_(graph_module: fx.GraphModule) -> int:
    """Erase every probe in `graph_module` and in the graphs of its branches; says how many nodes that were."""
    count = 0
    for module in graphs_of(graph_module):
        kept: set[fx.Node] = set()
        for node in reversed(module.graph.nodes):
            if is_probe(node) and not any(user in kept for user in node.users):
                module.graph.erase_node(node)
                count += 1
            else:
                kept.add(node)
        module.recompile()
    return count


def is_probe(node: fx.Node) -> bool:
    """Whether a node stands in the graph only because a branch was looked at."""
    if node.op in ("placeholder", "output"):
        return False
    trace = node.meta.get("stack_trace") or ""
    return probing.__file__ in trace and any(name in trace for name in PROBES)


def graphs_of(graph_module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and those of all its branches and loops."""
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield module
