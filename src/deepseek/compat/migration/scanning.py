"""Everything under a path that a target generation breaks: configs, Python sources and checkpoints.

    for scanned in scan(Path("project"), target="v5.0"):
        scanned.findings

Files are read one by one and none is imported, unpickled or loaded. A file whose bytes mention no name of any rule
cannot hold a finding and is not parsed (so a syntax error in it goes unreported), which is what makes ten thousand
files a matter of seconds. Links are followed
to files, and to folders only once, so that a loop ends.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepseek.compat.generations import Generation, find_generation
from deepseek.compat.headers import INDEX_NAME
from deepseek.compat.migration.checkpoints import check_pickle, check_weights
from deepseek.compat.migration.config_files import check_config
from deepseek.compat.migration.findings import Finding, unreadable
from deepseek.compat.migration.mentions import mentions_any
from deepseek.compat.migration.pickles import SUFFIXES as PICKLE_SUFFIXES
from deepseek.compat.migration.python_files import check_python, is_decodable
from deepseek.compat.migration.rules import Rules, load_rules
from deepseek.compat.migration.settings import SUFFIXES as CONFIG_SUFFIXES
from deepseek.core.errors import ConfigError

_SKIPPED_FOLDERS = {".git", ".hg", ".venv", "venv", "node_modules", "__pycache__", ".mypy_cache", ".ruff_cache", ".tox"}
_MAX_TEXT_BYTES = 5_000_000


@dataclass(frozen=True)
class Scanned:
    """One file, or one folder of shards, and what was found in it."""

    path: Path
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Scan:
    """What is looked for; made once for all files."""

    rules: Rules
    target: Generation
    config_words: re.Pattern[bytes]


def prepare_scan(target: str, source: str | None = None) -> Scan:
    """The rules on the way to generation `target`, from `source` or from any; unknown names raise `ConfigError`."""
    goal, start = find_generation(target), None if source is None else find_generation(source)
    if start is not None and start.version > goal.version:
        raise ConfigError(
            f"generation {start.name} is newer than {goal.name}; a migration goes up, choose a newer --to"
        )
    rules = load_rules().between(start, goal)
    return Scan(
        rules,
        goal,
        _any_word([rule.key.rpartition(".")[2] for rule in rules.config]),
    )


def scan(path: Path, target: str, source: str | None = None) -> Iterator[Scanned]:
    """Check a file, or everything below a folder, in sorted order; a missing path raises `ConfigError`."""
    prepared = prepare_scan(target, source)
    files = list_files(path)
    root = path if path.is_dir() else path.parent
    for file in files:
        yield Scanned(file, tuple(scan_file(file, prepared, root, is_named=file == path)))


def list_files(path: Path) -> list[Path]:
    """What there is to check: files by their suffix, and a folder with an index of shards as one."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist; name a file or a folder to check")
    if not path.is_dir():
        return [path]
    known = (".py", ".safetensors", *CONFIG_SUFFIXES, *PICKLE_SUFFIXES)
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for here, folders, names in os.walk(path, followlinks=True):
        state = Path(here).stat()
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(each for each in folders if each not in _SKIPPED_FOLDERS)
        is_sharded = INDEX_NAME in names
        found += [Path(here)] if is_sharded else []
        found += [
            Path(here, name)
            for name in sorted(names)
            if name.endswith(known) and not (is_sharded and (name.endswith(".safetensors") or name == INDEX_NAME))
        ]
    return found


def scan_file(path: Path, prepared: Scan, root: Path, *, is_named: bool = False) -> list[Finding]:
    """The findings in one file or folder of shards; paths are told relative to `root`."""
    shown = str(path.relative_to(root)) if path != root and path.is_relative_to(root) else str(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return check_weights(path, shown, prepared.rules, prepared.target)
    if not path.is_file():
        return [unreadable(shown, "not a file, or a link to nothing", "remove or exclude it")]
    if path.suffix in PICKLE_SUFFIXES:
        return check_pickle(path, shown, prepared.rules)
    return _check_text(path, shown, prepared, is_named=is_named)


def _check_text(path: Path, shown: str, prepared: Scan, *, is_named: bool) -> list[Finding]:
    try:
        content = path.read_bytes()
    except OSError as error:
        return [unreadable(shown, f"cannot be read: {error.strerror}", "check its permissions")]
    if path.suffix == ".py":
        has_mention = mentions_any(content, prepared.rules.python) or not is_decodable(content)
    else:
        has_mention = bool(prepared.config_words.search(content))
    if not has_mention:
        return []
    if len(content) > _MAX_TEXT_BYTES:
        return [unreadable(shown, f"holds {len(content)} bytes, more than source or config do", "exclude it")]
    if path.suffix == ".py":
        return check_python(content, shown, prepared.rules.python)
    return _check_config(content, shown, path.suffix, prepared, is_named=is_named)


def _check_config(content: bytes, shown: str, suffix: str, prepared: Scan, *, is_named: bool) -> list[Finding]:
    if suffix not in CONFIG_SUFFIXES:
        return [unreadable(shown, f"ends in {suffix!r}, which no check knows", "name a config, source or checkpoint")]
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        return [unreadable(shown, f"not UTF-8: {error.reason} at byte {error.start}", "save it as UTF-8")]
    return check_config(text, shown, suffix, prepared.rules, prepared.target.name, is_named=is_named)


def _any_word(words: list[str]) -> re.Pattern[bytes]:
    # No word at all must find nothing, where an empty alternative would find everything.
    return re.compile(("|".join(map(re.escape, sorted(set(words)))) or r"(?!)").encode())
