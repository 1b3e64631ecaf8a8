"""An exponential moving average of the weights, which often generalizes better than the weights themselves.

After each step every average moves towards its weight by 1 - decay (Polyak and Juditsky 1992; Tarvainen and Valpola
2017). The decay is lower at first, (1 + steps) / (10 + steps), so that the random weights of the beginning are soon
forgotten. `swapped` puts the averages in place of the weights for an evaluation or for saving; buffers, such as the
statistics of batch normalization, are averages already and stay. Costs one copy of the trained weights in memory.
Under a plan each rank keeps the averages of its pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class HasParameters(Protocol):
    """A module, or the part of one that a rank holds."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return the parameters by name."""


class WeightAverage:
    """The averages of the trained weights of one model, or of a rank's pieces of them, which `as_local` lays open.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> average = WeightAverage(layer, decay=0.9)
    >>> _ = nn.init.ones_(layer.weight)
    >>> average.update()
    >>> with average.swapped():
    ...     round(layer.weight.item(), 2), average.num_updates
    (0.82, 1)
    """

    def __init__(
        self, model: HasParameters, decay: float, *, as_local: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> None:
        self.decay = decay
        self._as_local = as_local
        self.num_updates = 0
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights, once after each step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = [self._as_local(average) for average in self._averages.values()]
        torch._foreach_lerp_(averages, [self._as_local(weight) for weight in self._weights.values()], 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the averages as its weights while the block runs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            kept = weight.detach().clone()
            weight.copy_(self._averages[name])
            self._averages[name].copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the number of updates."""
        return {"num_updates": self.num_updates, "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        averages: Mapping[str, Tensor] = state["averages"]
        for name, average in self._averages.items():
            average.copy_(averages[name])
        self.num_updates = int(state["num_updates"])
