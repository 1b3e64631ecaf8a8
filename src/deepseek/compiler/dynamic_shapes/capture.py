"""How `dynamic_graph` has torch capture and compile: the backend by name, the settings, and what decides the code.

`execution.py` compiles inside `compiling`, through the backend that `find_backend` names; `describe_code` is what the
disk cache of compiled code is keyed by.
"""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from deepseek.compiler.dynamic_shapes.codegen import compile_graph
from deepseek.compiler.dynamic_shapes.options import DynamicOptions
from deepseek.compiler.dynamic_shapes.regions import Backend, structure_of
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown


def find_backend(backend: str | Backend) -> Backend:
    """Return the backend of that name; raises `ConfigError` for an unknown one."""
    if callable(backend):
        return backend
    if backend == "inductor":
        return compile_graph
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ConfigError(explain_unknown("backend", backend, torch.compiler.list_backends(exclude_tags=())))
    found: Backend = torch._dynamo.backends.registry.lookup_backend(backend)
    return found


@contextlib.contextmanager
def compiling(options: DynamicOptions) -> Iterator[None]:
    """Compile inside the block: equal sizes are not taken for one, and torch's own bound does not come before ours."""
    patch_shapes: Any = torch.fx.experimental._config.patch  # type: ignore[attr-defined]
    limit = max(torch._dynamo.config.recompile_limit, 8 * (options.max_compilations + 1))
    with (
        patch_shapes(use_duck_shape=False),
        torch._dynamo.config.patch(recompile_limit=limit),
        warnings.catch_warnings(),
    ):
        # torch looks at this attribute of every input, and hides its own warning unless warnings are errors.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield


def describe_code(function: Callable[..., Any], owner: nn.Module | None) -> tuple[str, ...]:
    """Return what decides the compiled code: the source of a function, the structure and the classes of a module."""
    if owner is None:
        return (_code_text(function.__code__),)
    kinds = {type(module): None for module in owner.modules()}
    codes = [f"{kind.__qualname__} {_code_text(kind.forward.__code__)}" for kind in kinds if _has_code(kind)]
    return str(structure_of(owner)), *codes


def _has_code(kind: type) -> bool:
    return hasattr(getattr(kind, "forward", None), "__code__")


def _code_text(code: types.CodeType) -> str:
    """Return bytecode, names and constants, also of functions inside; no addresses and no line numbers."""
    constants = [_code_text(value) if isinstance(value, types.CodeType) else repr(value) for value in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"
