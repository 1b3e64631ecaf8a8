"""The most memory that this process has held, since it was told to forget: what benchmarks report beside time.

    forget_peak()
    work()
    peak_bytes()

Linux keeps the peak in `/proc` and lets it start anew. Elsewhere there is only the peak of a process's life.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forget_peak() -> None:
    """Let the peak start from what is held now, where the system can."""
    if _FORGET.exists():
        _FORGET.write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Return the most bytes that this process has held.

    >>> peak_bytes() > 1_000_000
    True
    """
    if _STATUS.exists():
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kibibytes
