import platform
import subprocess
import sys

from deepseek.core.allocator import give_back_freed_memory, keep_freed_memory

CODE = """
import resource, sys
from deepseek.core.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def work():
    block = b"x" * (64 << 20)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_page_faults(mode):
    answer = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
    return int(answer.stdout)


def test_a_block_that_was_freed_is_taken_again_without_asking_the_system():
    page_bytes = 4096
    if platform.libc_ver()[0] == "glibc":
        assert count_page_faults("keep") < 0.01 * 5 * (64 << 20) / page_bytes
        assert count_page_faults("keep") < 0.1 * count_page_faults("leave")
    else:
        assert not keep_freed_memory()


KEPT = """
import psutil
from deepseek.core.allocator import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
block = b"x" * (64 << 20)
del block
kept = psutil.Process().memory_info().rss
assert give_back_freed_memory()
print(kept - psutil.Process().memory_info().rss)
"""


def test_what_was_kept_can_be_given_back():
    if platform.libc_ver()[0] == "glibc":
        answer = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
        assert int(answer.stdout) > 60 << 20
    else:
        assert not give_back_freed_memory()
