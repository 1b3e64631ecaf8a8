import os
import sys
import textwrap

import pytest

from deepseek.core.errors import PermanentError
from deepseek.planning.machines.local_ranks import run_ranks


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Write a module that ranks can run by its name."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))

    def write(text):
        (tmp_path / "some_rank.py").write_text("import json, os, sys, time\n" + textwrap.dedent(text))
        return "some_rank"

    return write


def test_what_rank_0_measured_comes_back_and_all_meet_at_one_file(write_module):
    module = write_module("""
        store, argument, rank = sys.argv[1:]
        open(store + rank, "w").close()
        while not all(os.path.exists(store + str(other)) for other in range(3)):
            time.sleep(0.01)
        if rank == "0":
            print(json.dumps({"argument": argument, "threads": os.environ["OMP_NUM_THREADS"]}))
    """)
    assert run_ranks(module, ["four"], world_size=3, timeout_s=60) == {"argument": "four", "threads": "1"}


def test_a_rank_that_fails_is_quoted(write_module):
    module = write_module("""
        if sys.argv[2] == "1":
            sys.exit("no such network")
        print("[]")
    """)
    with pytest.raises(PermanentError, match=r"2 processes could not exchange messages .*no such network"):
        run_ranks(module, [], world_size=2, timeout_s=60)


def test_ranks_that_wait_for_ever_are_ended(write_module, tmp_path):
    module = write_module(f"""
        open(os.path.join({str(tmp_path)!r}, "pid" + sys.argv[2]), "w").write(str(os.getpid()))
        time.sleep(600)
    """)
    with pytest.raises(PermanentError, match=r"had not exchanged their messages after 3 s; allow local sockets"):
        run_ranks(module, [], world_size=2, timeout_s=3)
    for pid in (int(path.read_text()) for path in tmp_path.glob("pid*")):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
