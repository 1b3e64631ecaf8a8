"""Which machine and which libraries a number was measured with; every report and benchmark carries it.

Read from the operating system and from package metadata, so that asking costs no import of torch.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from deepseek.core.extras import DISTRIBUTION

LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "starlette", "pydantic")


def describe_machine() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    return {
        "processor": _processor_name(),
        "architecture": platform.machine(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
    }


def describe_versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str | None]:
    """Versions of Python, deepseek and `libraries`; `None` for one that is not installed."""
    return {"python": platform.python_version(), "deepseek": _version(DISTRIBUTION)} | {
        library: _version(library) for library in libraries
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    """The marketing name from /proc/cpuinfo on Linux; what Python knows elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
