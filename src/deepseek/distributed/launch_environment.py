"""Who this process is among others, read from the variables of whatever launched it.

`DeepSeekComm.init` calls `read_launch_environment(os.environ)`. Known launchers, in this order:

    torchrun      RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (Kubeflow's PyTorchJob and most scripts set them, too)
    Slurm         SLURM_PROCID and SLURM_NTASKS of a step, so what `srun` started; a batch script itself is no step
    Kubernetes    JOB_COMPLETION_INDEX of an Indexed Job, and WORLD_SIZE, which the Job's manifest has to give
    none          a single process

Pure: a mapping goes in, a value comes out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deepseek.core.errors import ConfigError

Launcher = Literal["single", "torchrun", "slurm", "kubernetes"]
DEFAULT_PORT = 29500
# Jobs that share a node must not meet: ports follow the job's number.
_FIRST_SLURM_PORT, _NUM_SLURM_PORTS = 15000, 20000


@dataclass(frozen=True)
class LaunchEnvironment:
    """One process of a launched job, and where all of them meet."""

    launcher: Launcher = "single"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT

    def __post_init__(self) -> None:
        """Refuse ranks outside their world."""
        for name, rank, size in (
            ("rank", self.rank, self.world_size),
            ("local_rank", self.local_rank, self.local_world_size),
        ):
            if not 0 <= rank < size:
                raise ConfigError(f"{name}={rank} is not one of {size} ranks of {self.launcher}; give 0 to {size - 1}")


def read_launch_environment(variables: Mapping[str, str]) -> LaunchEnvironment:
    """Return the place of this process in the job that `variables` describe.

    >>> read_launch_environment({}).launcher
    'single'
    >>> read_launch_environment(
    ...     {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77",
    ...      "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    ... ).master_address
    'gpu07'
    """
    if "RANK" in variables:
        return _read_torchrun(variables)
    if "SLURM_PROCID" in variables and ("SLURM_STEP_ID" in variables or "SLURM_STEPID" in variables):
        return _read_slurm(variables)
    if "JOB_COMPLETION_INDEX" in variables:
        return _read_kubernetes(variables)
    return LaunchEnvironment()


def _read_torchrun(variables: Mapping[str, str]) -> LaunchEnvironment:
    world_size = _read_int(variables, "WORLD_SIZE", "torchrun sets it")
    rank = _read_int(variables, "RANK", "torchrun sets it")
    if world_size > 1:
        _require(variables, "MASTER_ADDR", "torchrun sets it")
    local_size = _read_int(variables, "LOCAL_WORLD_SIZE", "", world_size)
    return LaunchEnvironment(
        "torchrun",
        rank,
        world_size,
        _read_int(variables, "LOCAL_RANK", "", rank % local_size),
        local_size,
        variables.get("MASTER_ADDR", "127.0.0.1"),
        _read_int(variables, "MASTER_PORT", "", DEFAULT_PORT),
    )


def _read_slurm(variables: Mapping[str, str]) -> LaunchEnvironment:
    why = "srun sets it"
    names = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST") or ""
    nodes = expand_hosts(names) or ["127.0.0.1"]
    counts = variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_TASKS_PER_NODE") or ""
    tasks = expand_counts(counts) or [_read_int(variables, "SLURM_NTASKS", why)]
    job = _read_int(variables, "SLURM_JOB_ID", "", 0)
    return LaunchEnvironment(
        "slurm",
        _read_int(variables, "SLURM_PROCID", why),
        _read_int(variables, "SLURM_NTASKS", why),
        _read_int(variables, "SLURM_LOCALID", "", 0),
        tasks[min(_read_int(variables, "SLURM_NODEID", "", 0), len(tasks) - 1)],
        variables.get("MASTER_ADDR", nodes[0]),
        _read_int(variables, "MASTER_PORT", "", _FIRST_SLURM_PORT + job % _NUM_SLURM_PORTS),
    )


def _read_kubernetes(variables: Mapping[str, str]) -> LaunchEnvironment:
    why = "Kubernetes does not say how many completions an Indexed Job has, so set it in the manifest"
    world_size = _read_int(variables, "WORLD_SIZE", why)
    if world_size > 1:
        _require(variables, "MASTER_ADDR", "set it to the Job's first Pod, JOB-0.SERVICE, in the manifest")
    return LaunchEnvironment(
        "kubernetes",
        _read_int(variables, "JOB_COMPLETION_INDEX", why),
        world_size,
        master_address=variables.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_read_int(variables, "MASTER_PORT", "", DEFAULT_PORT),
    )


def _require(variables: Mapping[str, str], name: str, why: str) -> str:
    if not variables.get(name):
        raise ConfigError(f"the environment says that this is one of several ranks, and {name} is not set; {why}")
    return variables[name]


def _read_int(variables: Mapping[str, str], name: str, why: str, default: int | None = None) -> int:
    if default is not None and name not in variables:
        return default
    text = _require(variables, name, why)
    if not re.fullmatch(r"\d+", text.strip()):
        raise ConfigError(f"{name}={text!r} in the environment is not a whole number; unset it or give 0 or more")
    return int(text)


def expand_hosts(names: str) -> list[str]:
    """List the hosts that Slurm's short form names.

    >>> expand_hosts("gpu[01-03,07],login")
    ['gpu01', 'gpu02', 'gpu03', 'gpu07', 'login']
    """
    hosts = []
    for prefix, ranges, suffix in re.findall(r"([^,\[]+)(?:\[([^\]]*)\])?([^,\[]*)", names):
        if not ranges:
            hosts.append(prefix + suffix)
            continue
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            hosts += [f"{prefix}{number:0{len(first)}d}{suffix}" for number in numbers]
    return hosts


def expand_counts(counts: str) -> list[int]:
    """List the tasks of each node that Slurm's short form gives.

    >>> expand_counts("4(x2),3")
    [4, 4, 3]
    """
    return [
        int(count) for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(repeats or 1))
    ]
