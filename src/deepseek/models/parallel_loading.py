"""A model over several ranks for inference: `load_model(..., tensor_parallel_size=2)` ends here.

    torchrun --nproc-per-node 4 answer.py

    model = load_model("runs/model", {"model_parallel": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
                                      "device_map": {"gpu0": [0, 1], "gpu1": [2, 3]}})
    logits = model(tokens)                    every rank calls it with the same tokens and gets all logits

The plan is the one that training runs under (`parallelizing.py`): layers are cut over tensor parallel ranks, and stages
hold some of them each. Each rank reads the model, keeps its part and frees the rest. Devices of a map are those of the
ranks in their order: rank 0 has the first one. Without sizes, each group is a stage, and its devices cut its layers.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepseek.core.device_map import read_device_groups
from deepseek.core.errors import ConfigError
from deepseek.distributed.communicator import DeepSeekComm
from deepseek.distributed.launch_environment import read_launch_environment
from deepseek.distributed.parallel.inference import answer
from deepseek.distributed.parallel.legality import describe
from deepseek.distributed.plan import Plan
from deepseek.models.parallelizing import parallelize

if TYPE_CHECKING:
    from deepseek.models.model_sources import LoadConfig


def is_parallel(settings: LoadConfig) -> bool:
    """Whether a configuration asks for more than one rank, or names devices."""
    sizes = (settings.tensor_parallel_size, settings.pipeline_parallel_size)
    return settings.model_parallel is not None or settings.device_map is not None or any(size > 1 for size in sizes)


def read_inference_plan(settings: LoadConfig) -> tuple[Plan, tuple[int, ...]]:
    """Return the plan that a configuration asks for, and the devices of its ranks (none where it names none).

    Raises `ConfigError` where sizes are said twice and differ, or do not use the devices of the map.
    """
    tp, pp = _read_size("tensor_parallel_size", settings), _read_size("pipeline_parallel_size", settings)
    groups = () if settings.device_map is None else read_device_groups(settings.device_map)
    if groups and tp * pp == 1:
        lengths = sorted({len(group) for group in groups})
        if len(lengths) > 1:
            raise ConfigError(
                f"device_map has groups of {' and '.join(map(str, lengths))} devices, and each is a stage whose layers "
                "are cut over its devices; make them equally long, or say tensor_parallel_size and "
                "pipeline_parallel_size"
            )
        tp, pp = lengths[0], len(groups)
    devices = tuple(device for group in groups for device in group)
    if devices and len(devices) != tp * pp:
        raise ConfigError(
            f"device_map names {len(devices)} devices and tensor_parallel_size={tp} * pipeline_parallel_size={pp} "
            f"needs {tp * pp}; make the two equal"
        )
    return Plan(tp=tp, pp=pp), devices


def _read_size(name: str, settings: LoadConfig) -> int:
    """Return a size that is said in one of two places."""
    alone: int = getattr(settings, name)
    inside: int = 1 if settings.model_parallel is None else getattr(settings.model_parallel, name)
    if alone > 1 and inside > 1 and alone != inside:
        raise ConfigError(f"{name}={alone} and model_parallel has {name}={inside}; say it once")
    return max(alone, inside)


def spread(module: nn.Module, settings: LoadConfig) -> tuple[Callable[..., Tensor], str]:
    """Cut `module` over the ranks, in place, and return what answers for the whole, and how it lies in words.

    Raises `ConfigError` where this process has not as many neighbors as the configuration asks for, and for a model
    whose layers cannot be cut so.
    """
    plan, devices = read_inference_plan(settings)
    _meet(plan)
    device = _choose_device(devices)
    parallel = parallelize(module.to(device).eval(), plan)

    def run(*inputs: Any, **named: Any) -> Tensor:
        return answer(parallel, *(_move(value, device) for value in inputs), **named)

    return run, f"torch, over {plan.num_devices} ranks ({describe(plan)})"


def _meet(plan: Plan) -> None:
    """Join the other ranks, unless the program has done so."""
    launch = None if dist.is_initialized() else read_launch_environment(dict(os.environ))
    world_size = dist.get_world_size() if launch is None else launch.world_size
    if world_size != plan.num_devices:
        here = "this process is alone" if world_size == 1 else f"{world_size} were started"
        raise ConfigError(
            f"tensor_parallel_size={plan.tp} * pipeline_parallel_size={plan.pp} needs {plan.num_devices} ranks and "
            f"{here}; start it with torchrun --nproc-per-node {plan.num_devices}"
        )
    if launch is not None and world_size > 1:
        atexit.register(partial(_leave, DeepSeekComm.init()))


def _leave(comm: DeepSeekComm) -> None:
    if dist.is_initialized():
        comm.close()


def _choose_device(devices: tuple[int, ...]) -> torch.device:
    """Return this rank's device: that of the map, counted through the hosts, where there are GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = devices[dist.get_rank()] if devices else dist.get_rank()
    return torch.device("cuda", number % torch.cuda.device_count())


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def check_whole(name: str, source: object, settings: LoadConfig) -> None:
    """Refuse what takes whole models and was asked for together with several ranks."""
    if is_parallel(settings):
        plan, _ = read_inference_plan(settings)
        raise ConfigError(
            f"{source} was asked for {name} and over {plan.num_devices} ranks, and only plain modules of torch are "
            "spread; leave one of them out"
        )
