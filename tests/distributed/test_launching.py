"""Ranks started by torch's launcher: who they are, how they end, and what is said of it; no rank is left."""

import gc
import json
import os
import socket
from pathlib import Path

import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.launching import (
    Meeting,
    RankFailedError,
    RankFailure,
    choose_cause,
    find_meeting,
    launch_ranks,
)

# torch's launcher leaves the files of ranks to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
SLURM |= {"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


def start(what: str, folder: Path) -> None:
    root = Path(__file__).parents[2]
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), before])
    try:
        launch_ranks("tests.distributed.launched", [what, str(folder)], num_ranks=2, meeting=find_meeting({}))
    finally:
        os.environ["PYTHONPATH"] = before
        gc.collect()


def read(folder: Path) -> list[dict[str, str]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def assert_nothing_is_left(folder: Path) -> None:
    for seen in read(folder):
        with pytest.raises(ProcessLookupError):
            os.kill(int(seen["pid"]), 0)
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", int(seen["MASTER_PORT"])))


def test_ranks_know_who_they_are_and_the_first_one_alone_speaks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    start("end", tmp_path)
    seen = read(tmp_path)
    assert [(one["RANK"], one["WORLD_SIZE"], one["OMP_NUM_THREADS"]) for one in seen] == [
        ("0", "2", "1"),
        ("1", "2", "1"),
    ]
    assert "OMP_NUM_THREADS" not in os.environ
    out, err = capfd.readouterr()
    assert out == "rank 0 speaks\n"
    assert err == ""
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("what", "status", "sentence", "traceback"),
    [
        ("die", 137, "rank 1 was ended by SIGKILL, and the others with it", ""),
        ("exit", 3, "rank 1 ended with status 3: no such thing", ""),
        ("PermanentError", 2, "the reason", ""),
        ("ZeroDivisionError", 2, "rank 1 failed (ZeroDivisionError: the reason); its traceback is above", "lines\n"),
    ],
)
def test_one_rank_that_fails_ends_all_and_is_named(
    what: str, status: int, sentence: str, traceback: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RankFailedError) as raised:
        start(what, tmp_path)
    assert raised.value.failure.status == status
    assert str(raised.value).startswith(sentence)
    assert raised.value.failure.traceback == traceback
    assert capfd.readouterr().err == ""
    assert_nothing_is_left(tmp_path)


def test_the_cause_is_the_first_failure_that_no_other_one_caused() -> None:
    alone = RankFailure(0, 1, "another rank is gone", is_consequence=True)
    cause, later = RankFailure(2, 137, "killed"), RankFailure(1, 1, "late")
    assert choose_cause([alone, cause, later]) is cause
    assert choose_cause([alone]) is alone


def test_machines_meet_where_the_launcher_says_or_the_user() -> None:
    assert find_meeting({}).endpoint == "localhost:0"
    assert find_meeting({}).num_nodes == 1
    assert find_meeting({}).job != find_meeting({}).job
    assert find_meeting(SLURM) == Meeting(2, "gpu07:15007", "deepseek")
    kubernetes = {"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "a-0.a"}
    assert find_meeting(kubernetes) == Meeting(3, "a-0.a:29500", "deepseek")
    assert find_meeting({"JOB_COMPLETION_INDEX": "1"}).num_nodes == 1
    assert find_meeting({}, num_nodes=2, endpoint="a:1", job="mine") == Meeting(2, "a:1", "mine")


def test_a_launch_that_cannot_begin_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"2 machines have to meet somewhere.*--endpoint HOST:PORT"):
        find_meeting({}, num_nodes=2)
    with pytest.raises(ConfigError, match="already rank 1 of a launch"):
        find_meeting({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="0 ranks do nothing"):
        launch_ranks("x", [], num_ranks=0, meeting=Meeting())
