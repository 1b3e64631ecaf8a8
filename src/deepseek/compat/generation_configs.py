"""Config files of every generation, read as the settings of today's trainer.

    reading = read_generation_config({"generation": "v2.0", "fp16": False, "gradient_clip": 1.0})
    reading.settings   {"ds_amp_level": "O0", "optimizer": {"grad_clip": 1.0}}
    str(reading)       read as generation 2.0: fp16=False is ds_amp_level=O0, ...

`deepseek train --config` comes here with the values of a file, so that what `deepseek migrate` writes can be trained
from, and what it has not seen yet can be, too. A table has a row for each key that any generation knows: the setting
it has become, or why a run of the trainer does not need it. What would change the result and cannot be followed (four
devices, TensorFlow, weights in int8) is refused. All other keys are the trainer's own and are passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deepseek.compat.generations import FrameworkGeneration, find_generation, load_table
from deepseek.core.config import show_value
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown

# Keys that the trainer has under the same name; by themselves they show no generation.
_SHARED = {"precision", "accum_steps", "ds_amp_level", "ds_activation_checkpoint", "ds_memory_profiler"}
_RESOURCE = ("apiVersion", "kind", "spec")
_PRECISIONS = {"fp16": "bf16", "tf32": "fp32"}
_SIZES = tuple(f"{axis}_parallel{end}" for end in ("_size", "") for axis in ("tensor", "pipeline", "data"))
_STRATEGIES = ("hash", "round_robin", "contiguous")
_ONE_DEVICE = "a run trains on one device"


@dataclass(frozen=True)
class ConfigReading:
    """Settings of the trainer, and what became of each key of a generation."""

    generation: str
    settings: Mapping[str, Any]
    translated: tuple[str, ...]
    """`fp16=False is ds_amp_level=O0`, for each key that became a setting."""
    unused: tuple[str, ...]
    """Keys that decide nothing in training, with the reason."""

    def __str__(self) -> str:
        parts = [*self.translated, *self.unused]
        return f"read as generation {self.generation}" + (f": {'; '.join(parts)}" if parts else "")


@dataclass(frozen=True)
class _Setting:
    """The setting of the trainer that a key has become, with its dots."""

    name: str
    value: Any


@dataclass(frozen=True)
class _Unused:
    """Why a key decides nothing in training."""

    why: str


_Outcome = _Setting | _Unused


def read_generation_config(values: Mapping[str, Any]) -> ConfigReading | None:
    """Read the values of a config file of any generation; `None` for a file of the trainer's own settings.

    A generation is named by `generation` or, in older files, `version`; without either the keys tell.

    Raises `ConfigError` for an unknown generation, for two keys that set one setting, and for what the trainer cannot
    follow.
    """
    old = {key: value for key, value in values.items() if key in _ROWS}
    named = next((key for key in ("generation", "version") if key in values), None)
    if named is None and not old.keys() - _SHARED:
        return None
    generation = find_generation(str(values[named])) if named else _guess_generation(old)
    settings = {key: value for key, value in values.items() if key not in old and key != named}
    owners: dict[str, str] = {}
    translated, unused = [], []
    for key, value in old.items():
        outcome = _ROWS[key](key, value)
        if isinstance(outcome, _Unused):
            unused.append(f"{key} is not used: {outcome.why}")
            continue
        if outcome.name in owners:
            raise ConfigError(f"{owners[outcome.name]} and {key} both set {outcome.name}; keep one of them")
        owners[outcome.name] = key
        _assign(settings, outcome, key)
        if (key, value) != (outcome.name, outcome.value):
            translated.append(f"{key}={show_value(value)} is {outcome.name}={show_value(outcome.value)}")
    return ConfigReading(generation.name, settings, tuple(translated), tuple(unused))


def _guess_generation(old: Mapping[str, Any]) -> FrameworkGeneration:
    """Return the oldest generation that has all of the keys, else the newest."""
    rows = [row for row in load_table().generations if row.status == "released"]
    telling = old.keys() - set(_SCALER_ARGUMENTS)
    return next((row for row in rows if telling and telling <= set(row.config_keys)), rows[-1])


def _assign(settings: dict[str, Any], outcome: _Setting, key: str) -> None:
    section, _, name = outcome.name.rpartition(".")
    if not section:
        settings[name] = outcome.value
        return
    inner = settings.get(section) or {}
    if not isinstance(inner, Mapping) or name in inner:
        raise ConfigError(f"{key} and {outcome.name} both set {outcome.name}; keep one of them")
    settings[section] = {**inner, name: outcome.value}


# --- One key ---


def _becomes(name: str) -> Callable[[str, Any], _Outcome]:
    return lambda key, value: _Setting(name, value)


def _not_used(why: str) -> Callable[[str, Any], _Outcome]:
    return lambda key, value: _Unused(why)


def _read_engine(key: str, value: Any) -> _Outcome:
    if str(value).lower() != "pytorch":
        raise ConfigError(
            f"{key} is {show_value(value)}; models train on PyTorch, so export the weights and leave {key} out"
        )
    return _Unused("PyTorch is the only engine")


def _read_precision(key: str, value: Any) -> _Outcome:
    if value in ("int8", "int4"):
        raise ConfigError(
            f"{key} is {show_value(value)}, which nothing trains in; train in bf16 and run `deepseek quantize` after"
        )
    return _Setting("precision", _PRECISIONS.get(value, value) if isinstance(value, str) else value)


def _read_switch(on: Any, off: Any, name: str) -> Callable[[str, Any], _Outcome]:
    """Read true or false as one of two values; other values are passed on where the setting has the same name."""

    def read(key: str, value: Any) -> _Outcome:
        if not isinstance(value, bool):
            if key == name:
                return _Setting(name, value)
            raise ConfigError(f"{key} is {show_value(value)}; expected true or false, or {name} in its place")
        return _Setting(name, on if value else off)

    return read


def _read_parallel(key: str, value: Any) -> _Outcome:
    for name, size in _mapping(key, value, _SIZES).items():
        if size != 1 or isinstance(size, bool):
            raise ConfigError(
                f"{key}.{name} is {show_value(size)}, and {_ONE_DEVICE}; set it to 1, or ask `deepseek plan` for more"
            )
    return _Unused(f"its sizes are 1, and {_ONE_DEVICE}")


def _read_device_map(key: str, value: Any) -> _Outcome:
    devices = list(_mapping(key, value, None))
    if len(devices) > 1:
        raise ConfigError(
            f"{key} names {', '.join(map(str, devices))}, and {_ONE_DEVICE}; leave it out and set `device`"
        )
    return _Unused(f"{_ONE_DEVICE}, which `device` names")


def _read_data_loader(key: str, value: Any) -> _Outcome:
    strategy = _mapping(key, value, ("shard_strategy", "buffer_size")).get("shard_strategy", _STRATEGIES[0])
    if strategy not in _STRATEGIES:
        raise ConfigError(explain_unknown(f"{key}.shard_strategy", str(strategy), _STRATEGIES))
    return _Unused("one process reads every shard; order and rows are the settings of `data`")


def _refuse_resource(key: str, value: Any) -> _Outcome:
    raise ConfigError(
        f"{key}: {show_value(value)} makes this a Kubernetes resource; put the settings of a run in their own file"
    )


def _mapping(key: str, value: Any, known: tuple[str, ...] | None) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {show_value(value)}; expected a section")
    for name in value:
        if known is not None and name not in known:
            raise ConfigError(explain_unknown("setting", f"{key}.{name}", [f"{key}.{other}" for other in known]))
    return value


_QUANTIZING = "weights are made small after training, with `deepseek quantize`"
_SCALING = "it scales the loss for float16, and runs train in bf16 or fp32"
# Other names under which the scaler's settings stand in files, those of torch.amp.GradScaler among them.
_SCALER_ARGUMENTS = ("loss_scale", "dynamic_loss_scale", "backoff_factor", "growth_interval", "min_loss_scale")
_SERVING = "it is a setting of serving on a cluster"
_ROWS: dict[str, Callable[[str, Any], _Outcome]] = {
    "engine": _read_engine,
    "backend": _not_used("it is chosen when a model is loaded for inference"),
    "precision": _read_precision,
    "batch_size": _becomes("data.batch_size"),
    "quantize": _not_used(_QUANTIZING),
    "quantized": _not_used(_QUANTIZING),
    "fp16": _read_switch("O1", "O0", "ds_amp_level"),
    "gradient_clip": _becomes("optimizer.grad_clip"),
    "gradient_accumulation": _becomes("accum_steps"),
    "distributed": _read_parallel,
    "model_parallel": _read_parallel,
    "device_map": _read_device_map,
    "data_loader": _read_data_loader,
    "ds_grad_clip": _becomes("optimizer.grad_clip"),
    "ds_amp_level": _becomes("ds_amp_level"),
    "ds_comm_backend": _not_used(_ONE_DEVICE),
    "ds_memory_profiler": _becomes("ds_memory_profiler"),
    "ds_activation_checkpoint": _read_switch("full", "none", "ds_activation_checkpoint"),
    "accum_steps": _becomes("accum_steps"),
    **dict.fromkeys(("init_scale", "growth_factor", *_SCALER_ARGUMENTS), _not_used(_SCALING)),
    "autoscaler": _not_used(_SERVING),
    "coldStartTimeout": _not_used(_SERVING),
    "initContainers": _not_used(_SERVING),
    **dict.fromkeys(_RESOURCE, _refuse_resource),
}
