"""torch's code generator, started sooner and given less to do: what `dynamic_graph` compiles through.

Compiling a transformer block with torch alone is mostly waiting for the C++ compiler. Two thirds of that is avoidable,
and what is generated stays the same:

- The first compilation of a process asks the C++ compiler which vector instructions it may use, with six programs one
  after another (5.8 s of 10 s with an empty cache). Here the processor's own list is believed, and what must still be
  tried is tried in a thread (`start_probing`) while Python traces the model. A C++ compiler that refuses the flags is
  met by trying everything, as torch does.
- Each kernel is a program of its own, of which 0.3 s are headers and linking. Here the kernels of a graph go into few
  programs (`OneLibrary`): 12 kernels took 4.8 s one by one, and 0.9 s together.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

_TRUSTING = {"cpp.vec_isa_ok": True}
# Kernels that a library holds at least, before a second one is compiled beside it.
_KERNELS_PER_LIBRARY = 4
_ENTRY = re.compile(r'(extern "C"\s+(?:\w+\s+)?void\s+)kernel\(')


class SlowCompilerWarning(UserWarning):
    """The C++ compiler refused what was generated for it; it is given something that takes longer to compile or run."""


@functools.cache
def start_probing() -> threading.Thread:
    """Find out about vector instructions in the background; called once per process, before the first compilation.

    Modules are imported before the thread starts, since two threads that import one library at once meet it half done.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch imports what it has deprecated itself
        importlib.import_module("torch._inductor.compile_fx")
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    def probe() -> None:
        with config.patch(_TRUSTING):
            valid_vec_isa_list()

    thread = threading.Thread(target=probe, name="deepseek-probe-compiler", daemon=True)
    thread.start()
    return thread


def compile_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a captured graph as `torch.compile` does, on whichever devices its inputs are."""
    start_probing().join()
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list
    from torch._inductor.exc import CppCompileError

    compiled: Any
    try:
        with few_libraries():
            compiled = compile_fx(graph, inputs, inner_compile=_compile_inner, config_patches=_TRUSTING)
    except CppCompileError as error:
        warnings.warn(
            f"compiled again with fewer instructions: {str(error).splitlines()[0]}", SlowCompilerWarning, stacklevel=2
        )
        valid_vec_isa_list.cache_clear()
        compiled = compile_fx(graph, inputs)
    return compiled  # type: ignore[no-any-return]


def _compile_inner(*args: Any, **kwargs: Any) -> Any:
    """torch's own compilation of one graph; a backward graph may come later, from within `backward()`."""
    from torch._inductor.compile_fx import compile_fx_inner

    with few_libraries():
        return compile_fx_inner(*args, **kwargs)


@contextlib.contextmanager
def few_libraries() -> Iterator[None]:
    """Inside the block, modules that torch generates hand their kernels to an `OneLibrary`."""
    from torch._inductor import async_compile

    before = async_compile.AsyncCompile
    async_compile.AsyncCompile = _one_library()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        async_compile.AsyncCompile = before  # type: ignore[misc]


@functools.cache
def _one_library() -> type:
    """Return the class, made at the first use: its base comes with the code generator."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.exc import CppCompileError

    class OneLibrary(AsyncCompile):
        """Collects the kernels of a generated module, and compiles them together when the module waits for them."""

        def __init__(self) -> None:
            super().__init__()
            self.kernels: list[tuple[list[str], str]] = []

        def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
            if len(_ENTRY.findall(source_code)) != 1 or source_code.count('extern "C"') != 1:
                return super().cpp_pybinding(argtypes, source_code)
            self.kernels.append((argtypes, source_code))
            return _Pending(len(self.kernels) - 1)

        def wait(self, scope: dict[str, Any]) -> None:
            if self.kernels:
                loaded = self.load()
                scope.update(
                    {name: loaded[value.index] for name, value in scope.items() if isinstance(value, _Pending)}
                )
            super().wait(scope)

        def load(self) -> list[Callable[..., None]]:
            """Return all kernels as functions, compiled in one program for each core that has enough to do."""
            size = len(self.kernels)
            num_libraries = max(1, min(os.cpu_count() or 1, size // _KERNELS_PER_LIBRARY))
            parts = [range(part, size, num_libraries) for part in range(num_libraries)]
            try:
                waiting = [_start_library([self.kernels[index] for index in part], self.submit) for part in parts]
                libraries = [finish() for finish in waiting]
            except CppCompileError as error:
                first = str(error).splitlines()[0]
                warnings.warn(f"kernels are compiled one by one: {first}", SlowCompilerWarning, stacklevel=2)
                return [_load_alone(argtypes, source) for argtypes, source in self.kernels]
            return [
                functools.partial(libraries[index % num_libraries].kernel, index // num_libraries)
                for index in range(size)
            ]

    return OneLibrary


class _Pending:
    """A placeholder for a kernel in a generated module until the module waits for its kernels."""

    def __init__(self, index: int) -> None:
        self.index = index


def merge_kernels(kernels: Sequence[tuple[Sequence[str], str]]) -> tuple[str, str]:
    """One source for many kernels, and the C++ statements that call the one whose number is the first argument."""
    sources, cases = [], []
    for index, (argtypes, source) in enumerate(kernels):
        sources.append(_ENTRY.sub(rf"\g<1>kernel_{index}(", source))
        parsed = (
            f"parse_arg<{argtype.replace('const ', '')}>(args, {n})" for n, argtype in enumerate(argtypes, start=1)
        )
        count = (
            f'if(PyTuple_GET_SIZE(args) != {len(argtypes) + 1}) throw std::runtime_error("wrong number of arguments");'
        )
        cases.append(f"case {index}: {{ {count} kernel_{index}({', '.join(parsed)}); break; }}")
    cases.append('default: throw std::runtime_error("no such kernel");')
    return "\n".join(sources), "switch(parse_arg<int64_t>(args, 0)) { " + " ".join(cases) + " } Py_RETURN_NONE;"


def _start_library(kernels: Sequence[tuple[Sequence[str], str]], submit: Callable[..., Any]) -> Callable[[], Any]:
    """Begin to compile one library; calling the answer waits for it and loads it."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    source, call = merge_kernels(kernels)
    binding = CppPythonBindingsCodeCache.suffix_template.format(
        arg_len="PyTuple_GET_SIZE(args)", call_entry_func=call, entry_func="kernel", extra_parse_arg=""
    )
    waiting: Callable[[], Any] = CppPythonBindingsCodeCache.load_async(source + binding, "cpu", submit_fn=submit)
    return waiting


def _load_alone(argtypes: Sequence[str], source: str) -> Callable[..., None]:
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    kernel: Callable[..., None] = CppPythonBindingsCodeCache.load_pybinding(argtypes, source)
    return kernel
