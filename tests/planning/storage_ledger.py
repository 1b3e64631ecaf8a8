"""Counting the bytes that torch holds: every storage that an operator makes, until it is freed or emptied.

A dispatch mode sees each operator's outputs. A storage counts once, with the bytes that it has at the moment (sharded
training empties storages and fills them again), until Python and autograd have let go of it. No allocator is involved,
so the count is the same on any device and any machine.
"""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.processors import HAS_AVX512

MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class StorageLedger(TorchDispatchMode):
    """Bytes now and at the peak, of all storages seen since it was made; `add` counts what was there before."""

    def __init__(self):
        super().__init__()
        self.peak_bytes = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        compute = multiply_in_fp32 if func in MATMULS and not HAS_AVX512 else _call
        result = compute(func, args, kwargs or {})
        self.add(tree_leaves(result))
        return result

    @property
    def now_bytes(self):
        # A copy, made at once: autograd's thread may let go of a storage while this one counts.
        storages = [each() for each in self._alive.copy().values()]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def add(self, tensors):
        """Count the storages of these tensors."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._add(getattr(tensor, "_local_tensor", tensor).untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _add(self, storage):
        place = storage._cdata
        if place not in self._alive:
            self._alive[place] = weakref.ref(storage, lambda _: self._alive.pop(place, None))

    def restart_peak(self):
        """Forget the peak so far."""
        self.peak_bytes = self.now_bytes


def _call(func, args, kwargs):
    return func(*args, **kwargs)


def multiply_in_fp32(func, args, kwargs):
    """The same bf16 result where a processor lacks instructions for it and would take twenty times as long.

    The wider copies are as invisible to the ledger as whatever a kernel allocates inside.
    """
    dtype = args[-1].dtype
    return func(*(each.float() for each in args), **kwargs).to(dtype)
