"""The device map of configurations: groups of devices by name, as users write them for parallel models.

{"gpu0": [0, 1], "gpu1": [2, 3]}        two groups of two devices; the names say nothing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek.core.errors import ConfigError

_FORM = '{"gpu0": [0, 1], "gpu1": [2, 3]}'


def read_device_groups(device_map: Any) -> tuple[tuple[int, ...], ...]:
    """Read the groups of a device map, in their order; raise `ConfigError` unless each device is there once.

    >>> read_device_groups({"gpu0": [0, 1], "gpu1": [2, 3]})
    ((0, 1), (2, 3))
    """
    if not isinstance(device_map, Mapping) or not device_map:
        raise ConfigError(f"device_map={device_map!r} is no table of devices; write for example {_FORM}")
    for name, group in device_map.items():
        if not isinstance(group, Sequence) or isinstance(group, str) or not group:
            raise ConfigError(f"device_map[{name!r}]={group!r} is no list of devices; write for example {_FORM}")
    groups = tuple(tuple(group) for group in device_map.values())
    devices = [device for group in groups for device in group]
    wrong = [device for device in devices if not isinstance(device, int) or isinstance(device, bool) or device < 0]
    if wrong or len(set(devices)) != len(devices):
        raise ConfigError(f"device_map names {devices}; give every device once, as a number from 0")
    return groups
