"""One thread per test process, set before torch is imported: two processes with two threads each starve each other.

At the end of a run stands what the slowest files took, beside pytest's slowest tests.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from deepseek.core.openmp import SPIN_BOUNDS

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name, bound in SPIN_BOUNDS.items():
    os.environ.setdefault(name, bound)
# Nothing that a test compiles or measures is left in the home of whoever runs it.
os.environ.setdefault("DEEPSEEK_CACHE_DIR", tempfile.mkdtemp(prefix="deepseek-tests-"))

# How long an example takes says something about who else uses the machine, and nothing about the code.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


@pytest.fixture(scope="module")
def few_objects() -> Iterator[None]:
    """Keep what earlier tests left out of sight of Python's collector: a whole suite has millions of objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the slowest files beside pytest's slowest tests: hundreds of quick tests cost as much as one slow one."""
    seconds: dict[str, float] = defaultdict(float)
    for report in (each for reports in terminalreporter.stats.values() for each in reports):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    count = min(terminalreporter.config.option.durations or 0, len(seconds))
    if count < 2:
        return
    terminalreporter.section(f"slowest {count} of {len(seconds)} files, {sum(seconds.values()):.0f}s in all")
    for path in sorted(seconds, key=seconds.__getitem__, reverse=True)[:count]:
        terminalreporter.write_line(f"{seconds[path]:.2f}s {path}")
