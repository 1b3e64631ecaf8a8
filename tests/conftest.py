"""One thread per test process, set before torch is imported: two processes with two threads each starve each other."""

from __future__ import annotations

import os
import tempfile

from deepseek.core.openmp import bound_spins

os.environ.setdefault("OMP_NUM_THREADS", "1")
bound_spins()
# Nothing that a test compiles or measures is left in the home of whoever runs it.
os.environ.setdefault("DEEPSEEK_CACHE_DIR", tempfile.mkdtemp(prefix="deepseek-tests-"))
