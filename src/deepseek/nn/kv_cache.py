"""Keep keys and values of the tokens already read, so that each new token costs one step instead of a whole pass.

A `KVCache` has a number of slots, one sequence each. A forward pass sees it through a `CacheView`: some neighbouring
slots, and how many key positions they need. Views alias the cache, so writing through one is writing the cache. Slots
are neighbours so that a view never gathers; the scheduler keeps running sequences together with `copy_slot`.

Shapes: S slots, K kv heads, L key positions, H head size. Memory: 2 * layers * S * K * L * H elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.core.errors import ConfigError


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values, cut to the slots and positions of a forward pass."""

    keys_SKLH: Tensor
    values_SKLH: Tensor
    slots_S1: Tensor
    """0, 1, ...: the rows that the tokens of a pass are written to."""

    def write(self, keys_BTKH: Tensor, values_BTKH: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens at their positions and return all keys and values, (S, K, L, H) each."""
        self.keys_SKLH.transpose(1, 2)[self.slots_S1, positions_BT] = keys_BTKH.to(self.keys_SKLH.dtype)
        self.values_SKLH.transpose(1, 2)[self.slots_S1, positions_BT] = values_BTKH.to(self.values_SKLH.dtype)
        return self.keys_SKLH, self.values_SKLH


@dataclass(frozen=True)
class CacheView:
    """The part of the cache that one forward pass uses: a `LayerCache` per layer and the number of key positions."""

    layers: tuple[LayerCache, ...]
    length: int


class KVCache:
    """Room for `num_slots` sequences of up to `max_length` tokens."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        max_length: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        shape = (num_layers, 2, num_slots, num_kv_heads, max_length, head_size)
        self._storage = torch.zeros(shape, dtype=dtype, device=device)
        self.num_slots = num_slots
        self.max_length = max_length

    def view(self, first_slot: int, num_slots: int, length: int) -> CacheView:
        """Slots `first_slot` and following, key positions 0 to `length`."""
        if first_slot < 0 or first_slot + num_slots > self.num_slots or length > self.max_length:
            raise ConfigError(
                f"slots {first_slot} to {first_slot + num_slots - 1} of length {length} were asked of a KV cache with "
                f"{self.num_slots} slots of length {self.max_length}; make a larger cache"
            )
        part = self._storage[:, :, first_slot : first_slot + num_slots, :, :length]
        slots_S1 = torch.arange(num_slots, device=part.device)[:, None]
        return CacheView(tuple(LayerCache(keys, values, slots_S1) for keys, values in part.unbind(0)), length)

    def copy_slot(self, source: int, target: int) -> None:
        """Make slot `target` equal to slot `source`."""
        self._storage[:, :, target] = self._storage[:, :, source]

    def clear_slot(self, slot: int) -> None:
        """Make slot `slot` zeros, for one that holds what is no number: a mask hides large values, and not those."""
        self._storage[:, :, slot] = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes that the cache holds, used or not."""
        return self._storage.numel() * self._storage.element_size()
