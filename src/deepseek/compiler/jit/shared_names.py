"""Names that the rewriting and the operators share: prefixes of generated variables, and Python's operators by node.

The rewriting writes these names into generated code, the operators look them up when the code runs. Neither room
imports the other's files for them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

INTERNAL = "_ds_"  # variables that the rewriting itself made; they may be empty in one branch
SITES_NAME = f"{INTERNAL}sites"
UNDEFINED_NAME = f"{INTERNAL}undefined"
ITEM_NAME = f"{INTERNAL}item"
RESULT_NAME = f"{INTERNAL}result"  # what a return inside of a loop gives

Operation = Callable[[Any, Any], Any]  # Python's operators take and give anything

COMPARISONS: dict[str, Operation] = {
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Eq": operator.eq,
    "NotEq": operator.ne,
}
BINARY: dict[str, tuple[Operation, Operation]] = {
    "Add": (operator.add, operator.iadd),
    "Sub": (operator.sub, operator.isub),
    "Mult": (operator.mul, operator.imul),
    "Div": (operator.truediv, operator.itruediv),
    "FloorDiv": (operator.floordiv, operator.ifloordiv),
    "Mod": (operator.mod, operator.imod),
    "Pow": (operator.pow, operator.ipow),
    "MatMult": (operator.matmul, operator.imatmul),
    "BitAnd": (operator.and_, operator.iand),
    "BitOr": (operator.or_, operator.ior),
    "BitXor": (operator.xor, operator.ixor),
    "LShift": (operator.lshift, operator.ilshift),
    "RShift": (operator.rshift, operator.irshift),
}
CHANGING_METHODS = frozenset(
    (
        *("append", "appendleft", "extend", "extendleft", "insert", "pop", "popleft", "popitem", "remove", "clear"),
        *("sort", "reverse", "update", "setdefault", "add", "discard", "rotate"),
    )
)
"""Methods of Python's containers that change them; a tensor's end in an underscore."""
