"""Ranks of one program on this machine, started and watched by torch's elastic launcher; none outlives the others.

    deepseek launch --ranks 2 train ...  ->  launch_ranks(words, meeting)  ->  rank 0, rank 1: a process each

Where one of several machines meets the others is read from the variables of whatever started the launcher there, one
process a machine (`srun --ntasks-per-node 1`, a Pod of an Indexed Job). On a single machine the port is one that is
free. A rank writes what ended it to the file that the launcher names (`TORCHELASTIC_ERROR_FILE`, torch's own), and the
first one that others did not cause is what the launch says: ranks that are left alone fail as well.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from deepseek.core.errors import CommunicationError, ConfigError, DeepSeekError, PermanentError, first_line
from deepseek.distributed.launch_environment import LaunchEnvironment, read_launch_environment

HERE = "localhost"
_RENDEZVOUS_TIMEOUT_S = 900
"""Machines of a job may be started this far apart."""
_SHUTDOWN_S = 120
"""Seconds for ranks that are stopped to save the run, before they are killed."""
_THREADS = "OMP_NUM_THREADS"
_LAST_LINES = 5
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = {128 + number: number for number in _STOPPING}


@dataclass(frozen=True)
class Meeting:
    """The machines of a launch, and where they meet."""

    num_nodes: int = 1
    endpoint: str = f"{HERE}:0"
    """HOST:PORT; port 0 is any that is free."""
    job: str = ""
    """What the machines of one launch have in common and those of another have not; made up for a single one."""


@dataclass(frozen=True)
class RankFailure:
    """The end of a rank that failed."""

    rank: int
    status: int
    """Exit status as a shell has it: 128 and the signal's number where one ended it."""
    sentence: str
    traceback: str = ""
    """Where the error was nobody's on purpose."""
    is_consequence: bool = False
    """Whether it failed since another one was gone."""


class RankFailedError(PermanentError):
    """A rank failed, and all others were ended."""

    def __init__(self, failure: RankFailure) -> None:
        super().__init__(failure.sentence)
        self.failure = failure


class LaunchStoppedError(PermanentError):
    """A signal ended all ranks."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name}")
        self.number = number


def find_meeting(
    variables: Mapping[str, str], *, num_nodes: int | None = None, endpoint: str | None = None, job: str | None = None
) -> Meeting:
    """Find out where the machines of a launch meet: from what was given, else from the launcher's `variables`.

    Raises `ConfigError` inside a rank that is started already, and where several machines do not know where to meet.

    >>> find_meeting({"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "run-0.run"}).endpoint
    'run-0.run:29500'
    """
    if "LOCAL_RANK" in variables and "RANK" in variables:
        raise ConfigError(
            f"this process is already rank {variables['RANK']} of a launch; run `deepseek train` in it, or launch from "
            "outside"
        )
    found = read_launch_environment(variables) if _is_several(variables) else LaunchEnvironment()
    count = num_nodes or found.world_size
    if count == 1:
        return Meeting(1, endpoint or f"{HERE}:0", job or uuid.uuid4().hex)
    if endpoint is None and found.world_size != count:
        raise ConfigError(
            f"{count} machines have to meet somewhere, and no endpoint is given; name a machine among them and a free "
            "port, the same on all: --endpoint HOST:PORT"
        )
    return Meeting(count, endpoint or f"{found.master_address}:{found.master_port}", job or "deepseek")


def _is_several(variables: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process as one of several; a Job of Kubernetes need not say of how many."""
    return "JOB_COMPLETION_INDEX" not in variables or "WORLD_SIZE" in variables


def launch_ranks(module: str, words: Sequence[str], *, num_ranks: int, meeting: Meeting) -> None:
    """Run `python -m module words...` on `num_ranks` ranks here and as many on each other machine, until all are done.

    Rank 0 of this machine writes to the terminal, the others to files that go with the launch. Raises `ConfigError` for
    no ranks, `RankFailedError` where a rank fails, `LaunchStoppedError` after Ctrl-C, SIGTERM or SIGHUP, which every
    rank gets, and `CommunicationError` where machines do not find each other; no rank is left in any case.
    """
    if num_ranks < 1:
        raise ConfigError(f"{num_ranks} ranks do nothing; start at least 1")
    with (
        tempfile.TemporaryDirectory(prefix="deepseek-launch-") as folder,
        _quiet_launcher(),
        _own_signals() as handled,
        _one_thread(num_ranks),
    ):
        config = LaunchConfig(
            min_nodes=meeting.num_nodes,
            max_nodes=meeting.num_nodes,
            nproc_per_node=num_ranks,
            run_id=meeting.job,
            rdzv_backend="c10d",
            rdzv_endpoint=meeting.endpoint,
            rdzv_configs={"timeout": _RENDEZVOUS_TIMEOUT_S},
            local_addr=HERE if meeting.num_nodes == 1 else None,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(folder, redirects=dict.fromkeys(range(1, num_ranks), Std.ALL)),
            signals_to_handle=",".join(number.name for number in handled),
            shutdown_timeout=_SHUTDOWN_S,
        )
        if (error := _run(config, module, words, Path(folder))) is not None:
            raise error  # here, where nothing holds torch's frames any more, and with them a port


def _run(config: LaunchConfig, module: str, words: Sequence[str], folder: Path) -> DeepSeekError | None:
    """Run the ranks to their end; return what went wrong."""
    try:
        elastic_launch(config, sys.executable)("-m", module, *words)
    except SignalException as error:
        return LaunchStoppedError(signal.Signals(error.sigval))
    except ChildFailedError as error:
        ordered = sorted(error.failures.items(), key=lambda pair: pair[1].timestamp)
        failure = choose_cause([_read_failure(rank, failed, folder) for rank, failed in ordered])
        if failure.status in _INTERRUPTED:
            return LaunchStoppedError(_INTERRUPTED[failure.status])
        return RankFailedError(failure)
    except (RendezvousError, TimeoutError) as error:
        return CommunicationError(
            f"the machines of this launch did not meet at {config.rdzv_endpoint} ({first_line(error)}); start it on "
            f"all {config.max_nodes}, with one endpoint that each can reach"
        )
    return None


def choose_cause(failures: Sequence[RankFailure]) -> RankFailure:
    """Choose the failure that caused the others, from those of a launch in the order of time.

    >>> alone = RankFailure(0, 1, "the others are gone", is_consequence=True)
    >>> choose_cause([alone, RankFailure(1, 137, "killed")]).rank
    1
    """
    return next((failure for failure in failures if not failure.is_consequence), failures[0])


def _read_failure(rank: int, failure: ProcessFailure, folder: Path) -> RankFailure:
    if failure.exitcode < 0:
        number = -failure.exitcode
        last = _read_last_lines(folder, failure.local_rank)
        sentence = (
            f"rank {rank} was ended by {failure.signal_name()}{f' after {last!r}' if last else ''}, and the others "
            "with it; look for a lack of memory or somebody's kill, and run the same command again to go on from the "
            "last checkpoint"
        )
        return RankFailure(rank, 128 + number, sentence, is_consequence=number == signal.SIGTERM)
    recorded = failure.error_file_data.get("message")
    if not isinstance(recorded, dict):
        last = _read_last_lines(folder, failure.local_rank)
        is_stopped = failure.exitcode in _INTERRUPTED
        sentence = f"rank {rank} ended with status {failure.exitcode}{f': {last}' if last else ''}"
        return RankFailure(rank, failure.exitcode, sentence, is_consequence=is_stopped)
    kind, _, text = str(recorded["message"]).partition(": ")
    if kind in (PermanentError.__name__, CommunicationError.__name__):
        return RankFailure(rank, failure.exitcode, text, is_consequence=kind == CommunicationError.__name__)
    sentence = f"rank {rank} failed ({kind}: {text}); its traceback is above"
    return RankFailure(rank, failure.exitcode, sentence, str(recorded["extraInfo"]["py_callstack"]))


def _read_last_lines(folder: Path, local_rank: int) -> str:
    """Return the last of what a rank that does not write to the terminal wrote to its standard error."""
    lines = [
        line.strip()
        for path in sorted(folder.glob(f"*/attempt_*/{local_rank}/stderr.log"))
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    return " / ".join(lines[-_LAST_LINES:])


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Keep torch's launcher from logging what this file says in a sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _own_signals() -> Iterator[list[signal.Signals]]:
    """List the signals that stop the ranks, without ignored ones (`nohup`), and take torch's handlers back."""
    before = {number: signal.getsignal(number) for number in _STOPPING}
    try:
        yield [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def _one_thread(num_ranks: int) -> Iterator[None]:
    """Let ranks compute with one thread each, since they share the cores, unless the user has said how many."""
    if num_ranks == 1 or _THREADS in os.environ:
        yield
        return
    os.environ[_THREADS] = "1"
    try:
        yield
    finally:
        del os.environ[_THREADS]
