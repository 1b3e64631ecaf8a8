"""One thread per test process, set before torch is imported: two processes with two threads each starve each other."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
