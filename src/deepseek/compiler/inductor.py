"""torch's code generator for the CPU and CUDA, started sooner and asked for less.

`dynamic_graph` compiles through `compile_graph`. The first compilation of a process asks the C++ compiler which vector
instructions it may use, one program after another: six of them, 5.8 of the 10 seconds that one encoder block took with
an empty cache. Here the processor's own list is believed, and what must still be tried is tried in a thread
(`start_probing`) while Python traces the model. A C++ compiler that refuses the flags is met by trying everything, as
torch does.
"""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

_TRUSTING = {"cpp.vec_isa_ok": True}


class SlowCompilerWarning(UserWarning):
    """The C++ compiler refused flags that the processor has; everything is compiled with fewer of them."""


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
    """What `torch.compile` would make of a captured graph, on whichever devices its inputs are."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list
    from torch._inductor.exc import CppCompileError

    start_probing().join()
    compiled: Any
    try:
        compiled = compile_fx(graph, inputs, config_patches=_TRUSTING)
    except CppCompileError as error:
        warnings.warn(
            f"compiled again with fewer instructions: {str(error).splitlines()[0]}", SlowCompilerWarning, stacklevel=2
        )
        valid_vec_isa_list.cache_clear()
        compiled = compile_fx(graph, inputs)
    return compiled  # type: ignore[no-any-return]
