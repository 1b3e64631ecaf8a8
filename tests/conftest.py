"""One thread per test process, set before torch is imported: two processes with two threads each starve each other."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing that a test compiles or measures is left in the home of whoever runs it.
os.environ.setdefault("DEEPSEEK_CACHE_DIR", tempfile.mkdtemp(prefix="deepseek-tests-"))
