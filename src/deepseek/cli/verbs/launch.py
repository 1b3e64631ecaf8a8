"""`deepseek launch`: `deepseek train` on several ranks, by torch's elastic launcher."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from cyclopts import Parameter

from deepseek.core.errors import ConfigError

_RANK = "deepseek.cli.launched_rank"
_LAUNCHED = ("train",)


def launch(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    ranks: Annotated[int | None, Parameter(name=["--ranks", "--nproc"])] = None,
    nodes: Annotated[int | None, Parameter(name=["--nodes", "--nnodes"])] = None,
    endpoint: str | None = None,
    job: str | None = None,
    json: bool = False,
) -> int:
    """Run a training command on several ranks that work under one plan, and wait for them.

    Each rank is a process with one thread, unless OMP_NUM_THREADS says otherwise. Rank 0 shows the run and writes its
    folder; if one rank fails or is killed, all end, and the same command goes on from the last checkpoint. Ctrl-C saves
    the run first.

    On several machines the same command is started once on each of them. Under Slurm, with one task a node, and in an
    Indexed Job of Kubernetes with WORLD_SIZE and MASTER_ADDR, they find each other; elsewhere give --nodes and
    --endpoint.

    Example: deepseek launch --ranks 2 train decoder_tiny --plan dp=2

    Parameters
    ----------
    command
        What every rank runs: train with its options, of which --plan says what each rank does.
    ranks
        Ranks on this machine; without it one for each GPU.
    nodes
        Machines; without it as many as Slurm or Kubernetes started, or this one alone.
    endpoint
        Where machines meet, as HOST:PORT with one of them as the host; without it as Slurm or Kubernetes say, and on a
        single machine any port that is free.
    job
        Name of the launch, the same on all its machines, where several launches share an endpoint.
    json
        Print events as JSON lines, as `train --json`.
    """
    words = [*command, *(["--json"] if json and "--json" not in command else [])]
    if not command or command[0] not in _LAUNCHED:
        seen = f"launch was given {command[0]!r}" if command else "launch was given nothing to run"
        raise ConfigError(
            f"{seen}, and ranks are of a training run; write for example: deepseek launch --ranks 2 train decoder_tiny "
            "--plan dp=2 (for a script of your own: torchrun)"
        )
    if _asks_for_help(words):
        from deepseek.cli import build_app, run

        return run(build_app(asked=words[0]), [words[0], "--help"])
    from deepseek.distributed.launching import LaunchStoppedError, RankFailedError, find_meeting, launch_ranks

    meeting = find_meeting(os.environ, num_nodes=nodes, endpoint=endpoint, job=job)
    try:
        launch_ranks(_RANK, words, num_ranks=_count_devices() if ranks is None else ranks, meeting=meeting)
    except LaunchStoppedError as error:
        from deepseek.cli import Stopped

        raise Stopped(error.number) from error
    except RankFailedError as error:
        sys.stderr.write(f"{error.failure.traceback}deepseek: {error}\n")
        return error.failure.status
    return 0


def _asks_for_help(words: list[str]) -> bool:
    return any(word in ("--help", "-h") for word in words)


def _count_devices() -> int:
    import torch

    if not torch.cuda.device_count():
        raise ConfigError("this machine has no GPUs to count, so say how many ranks to start: --ranks 2")
    return torch.cuda.device_count()
