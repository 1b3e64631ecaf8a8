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

# What /proc/cpuinfo calls the generation of a processor: x86 has the first four, Arm the others.
_GENERATION = ("vendor_id", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU revision")
LIBRARIES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "starlette", "pydantic")


def describe_machine() -> dict[str, Any]:
    """Processor, cores and memory of this machine.

    Virtual machines give processors of several generations one name, so `processor_generation` says which it is.
    """
    facts = _read_cpuinfo()
    return {
        "processor": facts.get("model name") or platform.processor() or platform.machine(),
        "processor_generation": ", ".join(f"{name} {facts[name]}" for name in _GENERATION if name in facts),
        "architecture": platform.machine(),
        "num_cores": count_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
    }


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_free_bytes() -> int:
    """Memory that a process can still take without anybody being killed: the machine's, or its container's.

    Where the system does not tell what is free (macOS), all that there is.

    >>> 0 < measure_free_bytes() <= describe_machine()["memory_bytes"]
    True
    """
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)
    if (meminfo := Path("/proc/meminfo")).exists():  # it counts caches that are given up on demand as free
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (text := limit.read_text(encoding="utf-8").strip()) != "max":
        free = min(free, int(text) - int(used.read_text(encoding="utf-8")))
    return max(free, 0)


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


def list_processor_flags() -> tuple[str, ...]:
    """Names of what the processor can do (instruction sets above all), sorted; none where the system does not tell."""
    facts = _read_cpuinfo()
    return tuple(sorted((facts.get("flags") or facts.get("Features", "")).split()))


def _read_cpuinfo() -> dict[str, str]:
    """Return the facts that Linux reports about the first processor; none elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return {}
    first = cpuinfo.read_text(encoding="utf-8").partition("\n\n")[0]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
