"""A bound on how long OpenMP's threads spin for a partner, so that work keeps its pace on a machine that others use.

At the end of each parallel loop every thread waits for the slowest, and GNU's runtime spins 300,000 times before it
sleeps. Where something else holds the partner's core, that is time in which nobody works: on two cores, a small
training loop that takes 75 to 95 steps a second alone took 21 to 27 beside one busy process and 2 beside four, and with
the bound 39 to 47 and 22 to 28. Alone it costs nothing that can be measured (`python -m benchmarks.under_load`).

The runtimes read these variables once, when torch is loaded, so this must come before; the command line does it, the
library never does: for programs of your own, `deepseek doctor` prints the line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

# GNU's runtime counts spins, LLVM's and Intel's (macOS, MKL) count milliseconds.
SPIN_BOUNDS = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
# The standard's word on waiting: whoever sets it has said how.
_WAIT_POLICY = "OMP_WAIT_POLICY"


def bound_spins(environment: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """Set what the user has not set, for this process and its children; return what was set.

    Nothing is set once torch is loaded, since nothing would read it.

    >>> bound_spins({"GOMP_SPINCOUNT": "0", "PATH": "/bin"}), bound_spins({"OMP_WAIT_POLICY": "ACTIVE"})
    ({'KMP_BLOCKTIME': '1'}, {})
    """
    if environment is None:
        if "torch" in sys.modules:
            return {}
        environment = os.environ
    if _WAIT_POLICY in environment:
        return {}
    added = {name: bound for name, bound in SPIN_BOUNDS.items() if name not in environment}
    environment.update(added)
    return added
