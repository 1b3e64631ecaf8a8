"""Some processes of this machine that measure messages between each other.

Each rank is `python -m MODULE STORE ARGUMENTS... RANK`: it meets the others at the file STORE, and rank 0 writes what
was measured to its standard output as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from deepseek.core.errors import PermanentError


def run_ranks(module: str, arguments: Sequence[str], world_size: int, timeout_s: float) -> Any:
    """Start `world_size` ranks of `module`, wait for all, and return what rank 0 measured; none outlives the call.

    Raises `PermanentError` where one fails or all take longer than `timeout_s`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", module, f"{folder}/store", *arguments, str(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(world_size)
        ]
        try:
            answers = [process.communicate(timeout=timeout_s) for process in ranks]
        except subprocess.TimeoutExpired as error:
            raise PermanentError(
                f"{world_size} processes had not exchanged their messages after {timeout_s:g} s; allow local sockets, "
                "or ask for fewer processes"
            ) from error
        finally:
            for process in ranks:
                process.kill()
                process.communicate()
    if any(process.returncode for process in ranks):
        last = [errors.strip().splitlines()[-1:] for _, errors in answers]
        raise PermanentError(
            f"{world_size} processes could not exchange messages ({last}); allow local sockets and try again"
        )
    return json.loads(answers[0][0])
