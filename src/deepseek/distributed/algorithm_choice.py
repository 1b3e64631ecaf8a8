"""Which algorithm `algorithm="auto"` runs: the fastest of those measured on this group for a buffer of about this size.

The first time that a group sees a size (rounded up to a power of two), all its ranks run every candidate on a scratch
buffer, in turns, agree on the seconds of the slowest rank, and keep the answer: what `torch.backends.cudnn.benchmark`
does for convolutions. torch's own algorithm stays unless another is faster by more than the noise: in the median, and
in each of the rounds, which a single disturbed one does not bring about. A table can be saved and given to the next
run, which then measures nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deepseek.core.errors import ConfigError

NUM_ROUNDS = 3
HOPELESS = 2.5  # who takes that many times the fastest in the first round is not run again
LONG_ROUND_S = 1.0  # one more round has to do where each takes longer
WORTH_LEAVING = 1.05  # how much faster than torch's own another has to be


@dataclass
class AlgorithmTable:
    """Operation, and the power of two that its bytes stay below -> algorithm; `seconds` is what was measured.

    >>> table = AlgorithmTable()
    >>> table.learn("all_reduce", 4096, "flat", {"flat": [1.0, 1.1], "ring": [0.4, 0.6]})
    'ring'
    >>> table.find("all_reduce", 5000), table.find("all_reduce", 1 << 20)
    ('ring', None)
    """

    choices: dict[tuple[str, int], str] = field(default_factory=dict)
    seconds: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)

    def find(self, operation: str, num_bytes: int) -> str | None:
        """Return the algorithm for a buffer, or `None` where none of this size was measured."""
        return self.choices.get((operation, num_bytes.bit_length()))

    def learn(self, operation: str, num_bytes: int, standard: str, times_s: Mapping[str, Sequence[float]]) -> str:
        """Keep the algorithm with the lowest median, or `standard` where that is hardly slower, or was not always."""
        medians = {name: statistics.median(times) for name, times in times_s.items()}
        fastest = min(medians, key=lambda name: medians[name])
        if standard in medians:
            has_won = all(own < other for own, other in zip(times_s[fastest], times_s[standard], strict=True))
            if medians[standard] <= medians[fastest] * WORTH_LEAVING or not has_won:
                fastest = standard
        key = operation, num_bytes.bit_length()
        self.choices[key], self.seconds[key] = fastest, medians
        return fastest

    def to_dict(self) -> dict[str, str]:
        """Return the choices as JSON takes them.

        >>> AlgorithmTable({("all_reduce", 13): "ring"}).to_dict()
        {'all_reduce/13': 'ring'}
        """
        return {f"{operation}/{bits}": name for (operation, bits), name in self.choices.items()}

    @classmethod
    def from_dict(cls, choices: Mapping[str, str]) -> AlgorithmTable:
        """Return the table that `to_dict` wrote."""
        table = cls()
        for key, name in choices.items():
            operation, _, bits = key.partition("/")
            if not bits.isdecimal():
                raise ConfigError(
                    f"{key!r} is no row of a table of algorithms; expected OPERATION/BITS, as to_dict writes it"
                )
            table.choices[operation, int(bits)] = name
        return table
