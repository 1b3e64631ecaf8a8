"""What a branch gives, found out by tracing it aside, so that nothing of it outlives the question.

`PROBE(branch, key, depth, *values)` is an operator that only the tracer ever meets (its variable below is registered
with Dynamo as those of torch's own operators are). The branch is traced in a graph and a scope of its own. Whatever it
changes that was there before, a list, an attribute, a cell, an iterator, a tensor's memory through whatever view, is
noticed by the tracer and refused with its line. The graph is then thrown away: what comes back is good for reading
structures, types and shapes only. Where even that takes operators (shapes that are symbols, an export that looks at
every call), the call stays in the outer graph under its own name, and `erase_probes_` takes it out.

`HOLDER(value, name)` answers who else holds a tensor's memory or a container: an argument of the call, or a variable of
the functions that run now. Code that replaces `out[i] = v` by a copy asks it first, since nobody else would see the
copy.

`SHARED` and `WATCH` find what Python would hold as one memory and a graph holds as copies. A write into it afterwards
is refused: inside of a tensor condition when `HOLDER` is asked, outside of all when the trace ends (`check_watched`).

All read private parts of torch's tracer, which a test of theirs holds to.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import exc
from torch._dynamo.variables import ConstantVariable, LazyVariableTracker
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.higher_order_ops import (
    TorchHigherOrderOperatorVariable,
    _hop_name_to_variable_class,
    add_call_function,
    make_attr,
    move_lifted_freevars_phs_to_end,
    overwrite_tensor_vt_proxy,
)
from torch._dynamo.variables.tensor import SymNodeVariable
from torch._ops import HigherOrderOperator

from deepseek.compiler.jit.shared_names import INTERNAL
from deepseek.compiler.jit.tracing.sites import (
    CHANGES_OUTSIDE,
    CHANGES_OUTSIDE_HINT,
    ControlFlowError,
    explain_reason,
    find_refusal,
    give_up,
    last_own_frame,
    make_refusal,
)

HERE = str(Path(__file__).parent)
HANDING_ON = (HERE, str(Path(torch.__file__).parent / "_higher_order_ops"))
"""Where code only hands a function's values from one of its parts to the next."""
EFFECTS = ("HOP: Unsafe side effect", "HOP: Non-nullified side effect", "HigherOrderOperator: Mutating a variable")
OUTSIDE_OF_FUNCTION = "what is outside of the function"
ANOTHER_VARIABLE = "another variable"
PASSED_ON = (exc.RestartAnalysis, exc.SkipFrame, ControlFlowError)
IN_PLACE_OPERATORS = (
    operator.setitem,
    operator.delitem,
    *(getattr(operator, f"i{name}") for name in ("add", "sub", "mul")),
)


class Probe(HigherOrderOperator):
    """Traces a branch aside and gives what it returns, for its structure."""

    def __init__(self) -> None:
        super().__init__("deepseek_probe")  # type: ignore[no-untyped-call]

    def __call__(self, branch: Any, *values: Any) -> Any:
        """Run the branch: what a graph means in which the call was left."""
        return branch(*values)


class Holder(HigherOrderOperator):
    """Says who else holds a tensor's memory or a container; empty if nobody does."""

    def __init__(self) -> None:
        super().__init__("deepseek_holder")  # type: ignore[no-untyped-call]

    def __call__(self, value: Any, name: str) -> str:
        """Stand in for the tracer, which is the only one to call it."""
        found: str = super().__call__(value, name)  # type: ignore[no-untyped-call]
        return found


class Shared(HigherOrderOperator):
    """Says whether somebody else will hold the memory of a tensor that a branch gives: an argument, a variable that is
    not among the `names` given anew (none: the function ends, and its variables with it), or another result."""

    def __init__(self) -> None:
        super().__init__("deepseek_shared")  # type: ignore[no-untyped-call]

    def __call__(self, value: Any, results: Any, names: tuple[str, ...] | None) -> bool:
        """Stand in for the tracer, which is the only one to call it."""
        found: bool = super().__call__(value, results, names)  # type: ignore[no-untyped-call]
        return found


class MemoryWatch(HigherOrderOperator):
    """Remembers tensors that Python would hold as one memory and the graph holds as copies."""

    def __init__(self) -> None:
        super().__init__("deepseek_watch")  # type: ignore[no-untyped-call]

    def __call__(self, key: str, *values: Any) -> None:
        """Stand in for the tracer, which is the only one to call it."""
        super().__call__(key, *values)  # type: ignore[no-untyped-call]


PROBE = Probe()
HOLDER = Holder()
SHARED = Shared()
WATCH = MemoryWatch()


class ProbeVariable(TorchHigherOrderOperatorVariable):
    """`PROBE` as the tracer sees it."""

    _HOP_NAME = "deepseek.probe"

    def call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Trace the branch in a scope of its own; numbers among the values do not take part in the dispatch."""
        branch, key, depth, *values = LazyVariableTracker.realize_all(args)
        where = key.as_python_constant(), depth.as_python_constant()
        try:
            with tx.output.subtracer(self.value, None, "a branch") as tracer, _deferred_checks(tx):
                found = branch.call_function(tx, values, {})
                mutation = tracer.has_input_mutation()
                written = find_write(tracer.graph) if mutation.has_mutation else ""
                outputs = [] if mutation.has_mutation else self._close(tx, tracer, found)
        except PASSED_ON:
            raise
        except Exception as error:
            raise give_up(explain_failure(error, *where)) from error
        if mutation.has_mutation:
            raise give_up(make_refusal(*where, CHANGES_OUTSIDE, CHANGES_OUTSIDE_HINT, place=written))
        if outputs:
            self._keep_call(tx, tracer, outputs)
        return found

    def _close(self, tx: Any, tracer: Any, found: VariableTracker) -> list[Any]:
        """Return the tensors and symbols that the branch made, as outputs of its graph, where operators will ask for
        them."""
        made: list[Any] = []

        def look(variable: VariableTracker) -> None:
            is_value = variable.is_tensor() or isinstance(variable, SymNodeVariable)
            if is_value and variable.as_proxy().tracer is tracer:
                made.append(variable)

        VariableTracker.visit(look, found, side_effects=tx.output.side_effects)
        is_watched = tx.symbolic_torch_function_state.in_torch_function_mode()
        if not made or not (is_watched or any(_has_symbols(variable) for variable in made)):
            return []
        tx.output.create_node(
            "output", "output", (tracer.create_arg((tuple(variable.as_proxy() for variable in made),))), {}
        )
        move_lifted_freevars_phs_to_end(tracer.graph, tracer.lifted_freevars)
        return made

    def _keep_call(self, tx: Any, tracer: Any, outputs: list[Any]) -> None:
        """Leave the call in the outer graph, so that operators may ask what its outputs are like."""
        body = fx.GraphModule(tx.output.nn_modules, tracer.graph)
        name = tx.output.install_subgraph("probe_body", body)
        example = tuple(node.meta["example_value"] for node in tracer.graph.output_node().args[0])
        call = add_call_function(tx, self.value, (make_attr(tx, name), *tracer.lifted_freevars), {}, example)
        overwrite_tensor_vt_proxy(outputs, call)


class HolderVariable(TorchHigherOrderOperatorVariable):
    """`HOLDER` as the tracer sees it."""

    _HOP_NAME = "deepseek.holder"

    def call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Look through the frames that run now."""
        value, name = LazyVariableTracker.realize_all(args)
        target = Target(value)
        holder = find_holder(tx, target, frozenset({name.as_python_constant()}))
        return ConstantVariable.create(holder or find_watched(target))


class SharedVariable(TorchHigherOrderOperatorVariable):
    """`SHARED` as the tracer sees it."""

    _HOP_NAME = "deepseek.shared"

    def call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Compare memory with that of the other results and of whatever the frames that run now hold."""
        value, results, names = LazyVariableTracker.realize_all(args)
        target = Target(value)
        if target.storage is None:
            return ConstantVariable.create(False)
        others: list[VariableTracker] = [value for side in results.items if _count(value, side) > 1]

        def look(variable: VariableTracker) -> None:
            if variable is not value and target.storage == _storage_of(_example_of(variable)):
                others.append(variable)

        VariableTracker.visit(look, results, side_effects=tx.output.side_effects)
        replaced = names.as_python_constant()
        holder = find_holder(tx, target, None if replaced is None else frozenset(replaced)) or find_watched(target)
        return ConstantVariable.create(bool(others) or holder != "")


def _count(value: VariableTracker, held: VariableTracker) -> int:
    """Return how often a variable stands in a container."""
    if held is value:
        return 1
    items = vars(held).get("items", ())
    items = items.values() if isinstance(items, dict) else items
    return sum(_count(value, item) for item in items) if isinstance(items, Iterable) else 0


class WatchVariable(TorchHigherOrderOperatorVariable):
    """`WATCH` as the tracer sees it."""

    _HOP_NAME = "deepseek.watch"

    def call_function(self, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Note the versions that the tensors have now."""
        key, *values = LazyVariableTracker.realize_all(args)
        examples = [example for example in map(_example_of, values) if isinstance(example, Tensor)]
        noted = (Watched(key.as_python_constant(), example, example._version, tx.output) for example in examples)
        _WATCHED.extend(noted)
        return ConstantVariable.create(None)


@dataclass(frozen=True)
class Watched:
    """A tensor that Python would hold as one with another, and the version that it had when they parted."""

    key: str
    example: Tensor
    version: int
    output: Any  # the graph that is traced

    @property
    def is_cut_off(self) -> bool:
        """Return whether its graph breaks, so that what follows may write into it unseen."""
        reason = self.output.compile_subgraph_reason
        return reason is not None and bool(reason.graph_break)

    def is_of(self, shapes: Any) -> bool:
        """Return whether it belongs to the trace with these symbols of shapes, and not to one that was given up."""
        return getattr(getattr(self.example, "fake_mode", None), "shape_env", None) is shapes


_WATCHED: list[Watched] = []  # of the trace that goes on


def _watched_now() -> list[Watched]:
    context = torch._guards.TracingContext.try_get()
    shapes = None if context is None or context.fake_mode is None else context.fake_mode.shape_env
    _WATCHED[:] = [watched for watched in _WATCHED if watched.is_of(shapes)]
    return list(_WATCHED)


def find_watched(target: Target) -> str:
    """Return who holds the target's memory where a branch or a loop gave it to two variables."""
    return ANOTHER_VARIABLE if target.is_any(watched.example for watched in _watched_now()) else ""


def check_watched() -> None:
    """Refuse a graph in which a watched tensor was written afterwards: the copies would not see it."""
    found = _watched_now()
    _WATCHED.clear()
    for watched in found:
        if watched.example._version != watched.version or watched.is_cut_off:
            seen = (
                "a branch or a loop here gives a tensor that another variable holds too, or a view of one, and it is"
                " written in place afterwards, which a graph would do to one of them only"
            )
            hint = "write y = y + 1 in place of y += 1, or give a copy with .clone()"
            raise give_up(make_refusal(watched.key, None, seen, hint))


def register() -> None:
    """Make the tracer know the operators."""
    _hop_name_to_variable_class[SHARED.__name__] = SharedVariable
    _hop_name_to_variable_class[WATCH.__name__] = WatchVariable
    _hop_name_to_variable_class[PROBE.__name__] = ProbeVariable
    _hop_name_to_variable_class[HOLDER.__name__] = HolderVariable


def _deferred_checks(tx: Any) -> AbstractContextManager[None]:
    """Let a context manager set a flag in a branch that it sets back at its end, where this torch can tell."""
    defer = getattr(tx.output.side_effects, "defer_side_effect_checks", nullcontext)
    found: AbstractContextManager[None] = defer()
    return found


def erase_probes_(graph_module: fx.GraphModule) -> None:
    """Take the calls of `PROBE` out of a graph and those of its branches, with what only asks about their outputs."""
    for module in graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        derived: set[fx.Node] = set()
        symbols: dict[object, fx.Node] = {}
        for node in module.graph.nodes:
            expression = _expression_of(node)
            if node.target is PROBE or any(argument in derived for argument in node.all_input_nodes):
                derived.add(node)
                if expression in symbols:
                    node.replace_all_uses_with(symbols[expression])
            elif expression is not None:
                symbols[expression] = node
        for node in reversed(list(module.graph.nodes)):
            if node in derived and not node.users and node.op != "output":
                module.graph.erase_node(node)
        if derived:
            module.recompile()


def _expression_of(node: fx.Node) -> object:
    """Return the expression that a node's value is known to have, if it is a symbol of shapes."""
    example = node.meta.get("example_value")
    return example.node.expr if isinstance(example, torch.SymInt) else None


def explain_failure(error: Exception, key: str, depth: str) -> ControlFlowError:
    """Say in our words why a branch cannot be traced."""
    refusal = find_refusal(error)
    if refusal is not None:
        return refusal
    text = str(error).strip()
    frame = last_own_frame(getattr(error, "real_stack", None) or [])
    place = "" if frame is None else f"{frame.filename}:{frame.lineno}"
    if any(effect in text for effect in EFFECTS):
        return make_refusal(key, depth, CHANGES_OUTSIDE, CHANGES_OUTSIDE_HINT, place=place)
    reason = explain_reason(error)
    return make_refusal(
        key,
        depth,
        f"what stands inside a tensor condition cannot become a part of one graph: {reason}",
        "move it out of the condition, or write it with tensors",
        place=place,
    )


def find_write(graph: fx.Graph) -> str:
    """Return the line of the last operator in a graph that writes into memory."""
    for node in reversed(list(graph.nodes)):
        is_method = node.op == "call_method" and str(node.target).endswith("_")
        if is_method or (node.op == "call_function" and _writes(node.target)):
            lines = [line.strip() for line in (node.stack_trace or "").splitlines()]
            places = [line for line in lines if line.startswith("File") and HERE not in line and "/torch/" not in line]
            if places:
                _, file, rest = places[-1].split('"', 2)
                return f"{file}:{rest.partition('line ')[2].partition(',')[0]}"
    return ""


def _writes(target: Any) -> bool:
    return target in IN_PLACE_OPERATORS or getattr(target, "__name__", "").endswith("_")


# ---- who holds a value


def find_holder(tx: Any, target: Target, names: frozenset[str] | None) -> str:
    """Return who holds the target beside the variables `names` (all, if none) of the function that runs."""
    if target.value.source is not None or target.is_any(_inputs_of(tx)):
        return OUTSIDE_OF_FUNCTION
    is_own = True  # the frames of this function's parts come first, and its own frame after them
    frame = tx
    while frame is not None:
        if not frame.f_code.co_filename.startswith(HANDING_ON):
            for local, held in frame.symbolic_locals.items():
                is_ours = is_own and (names is None or local in names)
                if not is_ours and target.is_in(held, tx.output.side_effects):
                    return _explain_local(local)
            is_own = is_own and frame.f_code.co_name.startswith(INTERNAL)
        frame = frame.parent
    known = [held for held in tx.output.side_effects.id_to_variable.values() if held.source is not None]
    return OUTSIDE_OF_FUNCTION if target.is_in(known, tx.output.side_effects) else ""


def _explain_local(name: str) -> str:
    return "another part of the function" if name.startswith(INTERNAL) else name


def _inputs_of(tx: Any) -> Iterator[Any]:
    """The values of the whole graph's inputs: arguments, parameters, buffers, globals."""
    for node in tx.output.tracers[0].graph.nodes:
        if node.op == "placeholder":
            yield node.meta.get("example_value")


class Target:
    """A tensor's memory, or a container, that is looked for."""

    def __init__(self, value: VariableTracker) -> None:
        self.value = value
        self.storage = _storage_of(_example_of(value))

    def is_any(self, examples: Iterable[Any]) -> bool:
        """Return whether one of these tensors has the same memory."""
        return self.storage is not None and any(_storage_of(example) == self.storage for example in examples)

    def is_in(self, held: Any, side_effects: Any) -> bool:
        """Return whether it can be reached from a variable."""
        found: list[VariableTracker] = []

        def look(variable: VariableTracker) -> None:
            if variable is self.value or (
                self.storage is not None and self.storage == _storage_of(_example_of(variable))
            ):
                found.append(variable)

        VariableTracker.visit(look, held, side_effects=side_effects)
        return bool(found)


def _example_of(variable: VariableTracker) -> Any:
    if not variable.is_tensor():
        return None
    return variable.as_proxy().node.meta.get("example_value")


def _has_symbols(variable: Any) -> bool:
    example = variable.as_proxy().node.meta.get("example_value")
    if not isinstance(example, Tensor):
        return True
    return any(isinstance(number, torch.SymInt) for number in (*example.shape, *example.stride()))


def _storage_of(example: Any) -> int | None:
    if not isinstance(example, Tensor) or example.layout != torch.strided:
        return None
    address: int = example.untyped_storage()._cdata
    return address
