"""One thread per test process, set before torch is imported: two processes with two threads each starve each other."""

from __future__ import annotations

import os
import tempfile

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
