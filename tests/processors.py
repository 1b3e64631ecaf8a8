"""What the processor of this machine can do, for tests of kernels that need it."""

import pytest
import torch

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")
NO_AVX512 = "kernels in 16 and 8 bits refuse, or round otherwise, on a processor without AVX-512"
needs_avx512 = pytest.mark.skipif(not HAS_AVX512, reason=NO_AVX512)
