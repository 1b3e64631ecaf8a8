"""What was decided about a model, kept on disk so that the next process need not measure again.

One JSON file per key in `DEEPSEEK_CACHE_DIR/decisions` (default `~/.cache/deepseek/decisions`). The key is everything
that a decision depends on: the model's digest, shapes, precision, bounds, machine, threads, library versions; its
SHA-256 names the file. Files are written whole or not at all, so two processes may fill the folder at once; one that
cannot be read is ignored with a warning and measured again, and a folder that cannot be written costs a warning.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepseek.compiler.runtimes.selection_policy import Candidate, Decision, Measurement, Numbers, Rejection
from deepseek.core.errors import ConfigError, StorageError
from deepseek.core.machine import describe_machine, describe_versions
from deepseek.core.storage import find_cache_folder, write_file

VERSION = 2
LIBRARIES = ("torch", "torchao", "onnxruntime", "onnx", "onnxscript", "openvino", "nncf", "apache-tvm", "tensorrt")


def find_folder() -> Path:
    """Return where decisions are kept."""
    return find_cache_folder() / "decisions"


def describe_surroundings(num_threads: int) -> dict[str, Any]:
    """Machine, threads and library versions: what may change a decision without the model changing."""
    return {"machine": describe_machine(), "num_threads": num_threads, "versions": describe_versions(LIBRARIES)}


def digest_key(key: Mapping[str, Any]) -> str:
    """Return the name of a key, the same in every process.

    >>> digest_key({"a": 1, "b": 2}) == digest_key({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def remember(decision: Decision, name: str) -> Path | None:
    """Keep `decision` under its key; `name` is what people call the model. A folder that refuses it costs a warning."""
    path = find_folder() / f"{digest_key(decision.key)}.json"
    content = {"version": VERSION, "name": name, "decision": to_dict(decision)}
    try:
        write_file(path, json.dumps(content, indent=1).encode())
    except StorageError as error:
        warnings.warn(f"the decision is not remembered and will be measured again: {error}", stacklevel=3)
        return None
    return path


def recall(key: Mapping[str, Any]) -> Decision | None:
    """Return the decision under `key`, or `None`; an entry that cannot be read is ignored with a warning."""
    path = find_folder() / f"{digest_key(key)}.json"
    if not path.is_file():
        return None
    entry = _read(path)
    if entry is None or digest_key(entry[1].key) != digest_key(key):
        return None
    return entry[1]


def list_decisions() -> list[tuple[str, Decision]]:
    """Return every readable decision with the name of its model, in the order of names."""
    entries = [_read(path) for path in sorted(find_folder().glob("*.json"))]
    return sorted((entry for entry in entries if entry is not None), key=lambda entry: (entry[0], str(entry[1].key)))


def find_decisions(model: str) -> list[Decision]:
    """Return the decisions about the model that people call `model`, or whose digest begins with it.

    Raises `ConfigError` with the names that are known where there is none.
    """
    entries = list_decisions()
    found = [decision for name, decision in entries if model and (name == model or _digest(decision).startswith(model))]
    if not found:
        names = sorted({name for name, _ in entries})
        known = f"known are {', '.join(names)}" if names else "none is remembered"
        raise ConfigError(
            f"nothing was decided about {model!r} in {find_folder()}; {known}: load it with backend auto first"
        )
    return found


def _digest(decision: Decision) -> str:
    return str(decision.key.get("model", ""))


def to_dict(decision: Decision) -> dict[str, Any]:
    """Plain values; `from_dict` gives the same decision back."""
    return asdict(decision)


def from_dict(values: Mapping[str, Any]) -> Decision:
    """Return a decision from what `to_dict` gave. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
    decision = Decision(
        chosen=Candidate(**values["chosen"]),
        baseline_ms=float(values["baseline_ms"]),
        measurements=tuple(_measurement(measurement) for measurement in values["measurements"]),
        rejections=tuple(Rejection(**rejection) for rejection in values["rejections"]),
        spent_s=float(values["spent_s"]),
        key=dict(values["key"]),
        is_remembered=True,
        reference=str(values["reference"]),
    )
    if all(measurement.candidate != decision.chosen for measurement in decision.measurements):
        raise ValueError("the chosen candidate was never measured")
    return decision


def _measurement(values: Mapping[str, Any]) -> Measurement:
    times_ms = tuple(float(time_ms) for time_ms in values["times_ms"])
    if not times_ms:
        raise ValueError("a measurement has no times")
    return Measurement(
        candidate=Candidate(**values["candidate"]),
        numbers=Numbers(**values["numbers"]),
        times_ms=times_ms,
        build_s=float(values["build_s"]),
        findings=tuple(values["findings"]),
        notes=tuple(values["notes"]),
    )


def _read(path: Path) -> tuple[str, Decision] | None:
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != VERSION:
            return None
        return str(content["name"]), from_dict(content["decision"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"the remembered decision {path} cannot be read ({type(error).__name__}) and is measured again",
            stacklevel=4,
        )
        return None
