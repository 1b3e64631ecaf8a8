"""Everything under a path that a target generation breaks: configs, Python sources, notebooks and checkpoints.

    for scanned in scan(Path("project"), target="v5.0"):
        scanned.findings

Files are read one by one, up to a limit, and none is imported, unpickled or loaded; pipes and devices are not opened. A
source whose bytes mention no name of any rule cannot hold a finding. It is still parsed, since a project that is no
Python of today is not a clean one; in projects of a thousand files and more only where it looks like Python 2, which is
what makes ten thousand files a matter of seconds. Links are followed to files, and to folders only once, so that a loop
ends. `survey` also says what is not looked at.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

from deepseek.compat.generations import FrameworkGeneration, find_generation
from deepseek.compat.headers import INDEX_NAME
from deepseek.compat.migration.checkpoints import check_pickle, check_weights
from deepseek.compat.migration.config_files import check_config
from deepseek.compat.migration.findings import Finding, unreadable
from deepseek.compat.migration.mentions import mentions_any
from deepseek.compat.migration.notebooks import SUFFIX as NOTEBOOK_SUFFIX
from deepseek.compat.migration.notebooks import check_notebook, is_for_python_2
from deepseek.compat.migration.pickles import SUFFIXES as PICKLE_SUFFIXES
from deepseek.compat.migration.python_files import check_python, is_decodable, is_like_python_2
from deepseek.compat.migration.rules import MigrationRules, load_rules
from deepseek.compat.migration.settings import SUFFIXES as CONFIG_SUFFIXES
from deepseek.compat.migration.settings import decode_settings
from deepseek.core.errors import ConfigError

_SKIPPED_FOLDERS = {".git", ".hg", ".venv", "venv", "node_modules", "__pycache__", ".mypy_cache", ".ruff_cache", ".tox"}
_MAX_TEXT_BYTES = 5_000_000
_MAX_INDEX_BYTES = 100_000_000
_NUM_SHOWN_SUFFIXES = 6
# Starting a process costs some tenths of a second, a file with findings some milliseconds.
_MIN_PARALLEL_FILES, _CHUNK_FILES, _MAX_WORKERS = 1000, 64, 16
_TEXT_SUFFIXES = (".py", ".ipynb", ".yaml", ".yml", ".json", ".toml", ".sh", ".cfg", ".ini", ".txt", ".md")
_KNOWN = (".py", NOTEBOOK_SUFFIX, ".safetensors", *CONFIG_SUFFIXES, *PICKLE_SUFFIXES)


@dataclass(frozen=True)
class Scanned:
    """One file, or one folder of shards, and what was found in it."""

    path: Path
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Scan:
    """The rules and words to look for; made once for all files."""

    rules: MigrationRules
    target: FrameworkGeneration
    config_words: re.Pattern[bytes]
    keys_in_code: Mapping[str, str] = field(default_factory=dict)
    """Settings that some source reads by their old name, and where: a config must not change without its reader."""
    pickles_in_text: Mapping[str, str] = field(default_factory=dict)
    """Names of pickles that some text has, and where: they cannot go away under another suffix."""
    parses_all: bool = True
    """Whether sources that name no rule are parsed, too."""


@dataclass(frozen=True)
class Survey:
    """The files to check below a path, and those passed over."""

    files: tuple[Path, ...]
    """Files by their suffix, and folders with an index of shards."""
    unseen: tuple[tuple[str, int], ...] = ()
    """Suffixes that no check knows, with the number of files."""
    skipped_folders: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = []
        if self.unseen:
            shown = [f"{suffix} {count}" for suffix, count in self.unseen[:_NUM_SHOWN_SUFFIXES]]
            shown += ["..."] if len(self.unseen) > _NUM_SHOWN_SUFFIXES else []
            parts.append(f"{sum(count for _, count in self.unseen)} files ({', '.join(shown)})")
        parts += [f"folders {', '.join(self.skipped_folders)}"] if self.skipped_folders else []
        if len(self.files) >= _MIN_PARALLEL_FILES:
            parts.append("the syntax of sources that name no rule and do not look like Python 2")
        return f"not looked at: {'; '.join(parts)}" if parts else ""


def prepare_scan(target: str, source: str | None = None, files: Sequence[Path] = (), root: Path | None = None) -> Scan:
    """Choose the rules on the way to generation `target`, from `source` or from any.

    `files` are those of the project in the folder `root`. Raises `ConfigError` for unknown names, and for a target
    below the source.
    """
    goal, start = find_generation(target), None if source is None else find_generation(source)
    if start is not None and start.version > goal.version:
        raise ConfigError(
            f"generation {start.name} is newer than {goal.name}; a migration goes up, choose a newer --to"
        )
    rules = load_rules().between(start, goal)
    keys = [rule.key.rpartition(".")[2] for rule in rules.config if rule.rename_to or rule.set_value]
    words = _any_word([rule.key.rpartition(".")[2] for rule in rules.config])
    pickles = {file.name for file in files if file.suffix in PICKLE_SUFFIXES}
    named = _find_names_in_text(pickles, root) if pickles and root else {}
    return Scan(rules, goal, words, _find_keys_in_code(keys, files), named, len(files) < _MIN_PARALLEL_FILES)


def list_rules_left_out(target: str, source: str) -> list[str]:
    """List the rules up to generation `target` that do not apply to a project of generation `source`."""
    goal, start = find_generation(target), find_generation(source)
    applied = load_rules().between(start, goal)
    kept = {rule.id for rule in (*applied.config, *applied.python, *applied.checkpoint)}
    possible = load_rules().between(None, goal)
    return [rule.id for rule in (*possible.config, *possible.python, *possible.checkpoint) if rule.id not in kept]


def scan(path: Path, target: str, source: str | None = None) -> Iterator[Scanned]:
    """Check a file, or everything below a folder, in sorted order; a missing path raises `ConfigError`."""
    files = list_files(path)
    root = path if path.is_dir() else path.parent
    prepared = prepare_scan(target, source, files, root)
    for file in files:
        yield Scanned(file, tuple(scan_file(file, prepared, root, is_named=file == path)))


def scan_files(
    path: Path,
    files: Sequence[Path],
    target: str,
    source: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """Check the files of a survey of `path`, on several processors where there are many.

    `on_progress` receives files done and in all.
    """
    root = path if path.is_dir() else path.parent
    prepared = prepare_scan(target, source, files, root)
    check = functools.partial(_scan_listed, prepared=prepared, root=root, named=None if path.is_dir() else path)
    findings: list[Finding] = []
    num_processes = min(os.cpu_count() or 1, _MAX_WORKERS)
    is_parallel = len(files) >= _MIN_PARALLEL_FILES and num_processes > 1
    results = check_in_processes(check, files, root, num_processes) if is_parallel else map(check, files)
    for done, found in enumerate(results, start=1):
        findings += found
        on_progress(done, len(files))
    return findings


def check_in_processes(
    check: Callable[[Path], list[Finding]], files: Sequence[Path], root: Path, num_processes: int
) -> Iterator[list[Finding]]:
    """Yield what `check` finds in each of `files`, in their order; a file that ends a process is a finding itself."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads
    done = 0
    try:
        with ProcessPoolExecutor(num_processes, context) as pool:
            for found in pool.map(check, files, chunksize=_CHUNK_FILES):
                yield found
                done += 1
    except BrokenProcessPool:  # which of the files under way it was shows when each is alone
        unchecked = list(files[done:])
        while unchecked:
            with contextlib.suppress(BrokenProcessPool), ProcessPoolExecutor(1, context) as pool:
                while unchecked:
                    yield pool.submit(check, unchecked[0]).result()
                    del unchecked[0]
            if unchecked:
                file = unchecked.pop(0)
                yield [unreadable(show(file, root), "the process that checked it ended", "exclude it with --exclude")]


def _scan_listed(file: Path, prepared: Scan, root: Path, named: Path | None) -> list[Finding]:
    return scan_file(file, prepared, root, is_named=file == named)


def list_files(path: Path, exclude: Sequence[str] = ()) -> list[Path]:
    """List what there is to check: files by their suffix, and a folder with an index of shards as one."""
    return list(survey(path, exclude).files)


def survey(path: Path, exclude: Sequence[str] = ()) -> Survey:
    """Find what there is to check below `path`; `exclude` are patterns of names or of paths below it."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist; name a file or a folder to check")
    if not path.is_dir():
        return Survey((path,))
    found: list[Path] = []
    unseen: Counter[str] = Counter()
    skipped: set[str] = set()
    seen: set[tuple[int, int]] = set()
    for here, folders, names in os.walk(path, followlinks=True):
        state = Path(here).stat()
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        below = os.path.relpath(here, path)
        skipped |= {name for name in folders if name in _SKIPPED_FOLDERS}
        folders[:] = sorted(
            name for name in folders if name not in _SKIPPED_FOLDERS and not is_excluded(below, name, exclude)
        )
        kept = [name for name in sorted(names) if not is_excluded(below, name, exclude)]
        shards = _list_shards(Path(here)) if INDEX_NAME in kept else set()
        found += [Path(here)] if INDEX_NAME in kept else []
        found += [Path(here, name) for name in kept if name.endswith(_KNOWN) and name not in shards]
        unseen.update(Path(name).suffix or "no suffix" for name in kept if not name.endswith(_KNOWN))
    return Survey(tuple(found), tuple(unseen.most_common()), tuple(sorted(skipped)))


def is_excluded(below: str, name: str, exclude: Sequence[str]) -> bool:
    """Whether a pattern names the file, or its path below the folder that is checked."""
    path = str(Path(below) / name)
    return any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(path, pattern.rstrip("/")) for pattern in exclude)


def _list_shards(folder: Path) -> set[str]:
    """Return the index and the files it lists; other weights beside them are checkpoints of their own."""
    index = folder / INDEX_NAME
    try:
        if not index.is_file() or index.stat().st_size > _MAX_INDEX_BYTES:
            return {INDEX_NAME}
        return {INDEX_NAME, *map(str, json.loads(index.read_bytes())["weight_map"].values())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # The check of the folder says what is wrong with its index.
        return {INDEX_NAME}


def scan_file(path: Path, prepared: Scan, root: Path, *, is_named: bool = False) -> list[Finding]:
    """Return the findings in one file or folder of shards; paths are shown relative to `root`."""
    found = _scan_file(path, prepared, root, is_named=is_named)
    if not is_named and found and _leads_out(path, root):
        reason = "it is a link, which a copy keeps as it is"
        return [
            finding.for_person(reason, "change what it leads to") if finding.is_fixable else finding
            for finding in found
        ]
    return found


def _leads_out(path: Path, root: Path) -> bool:
    """Whether a path goes through a link to anything but a neighbor, which would not be migrated with it."""
    inside = [part for part in (path, *path.parents) if part != root and part.is_relative_to(root)]
    links = [part for part in inside if part.is_symlink()]
    is_absolute = any(link.readlink().is_absolute() for link in links)
    return bool(links) and (is_absolute or not path.resolve().is_relative_to(root.resolve()))


def _scan_file(path: Path, prepared: Scan, root: Path, *, is_named: bool) -> list[Finding]:
    shown = show(path, root)
    try:
        if path.is_dir():
            return check_weights(path, shown, prepared.rules, prepared.target)
        if not path.is_file():
            return [unreadable(shown, "not a file, or a link to nothing", "remove or exclude it")]
        if path.suffix == ".safetensors":
            return check_weights(path, shown, prepared.rules, prepared.target)
        if path.suffix in PICKLE_SUFFIXES:
            return [_guard_pickle(found, path, prepared) for found in check_pickle(path, shown, prepared.rules)]
        return _check_text(path, shown, prepared, is_named=is_named)
    except Exception as error:  # noqa: BLE001 - becomes a finding that names the file, so that the others are still checked
        return [unreadable(shown, f"cannot be checked: {type(error).__name__} {error}", "exclude it with --exclude")]


def show(path: Path, root: Path) -> str:
    """Return a path as findings name it."""
    shown = str(path.relative_to(root)) if path != root and path.is_relative_to(root) else str(path)
    # A name may hold a line end, which would look like another finding.
    return shown if shown.isprintable() else ascii(shown)[1:-1]


def _check_text(path: Path, shown: str, prepared: Scan, *, is_named: bool) -> list[Finding]:
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            return _too_large(path, shown, prepared)
        content = path.read_bytes()
    except OSError as error:
        return [unreadable(shown, f"cannot be read: {error.strerror}", "check its permissions")]
    if path.suffix in (".py", NOTEBOOK_SUFFIX):
        rules = prepared.rules.python
        if not mentions_any(content, rules) and is_decodable(content):
            rules = ()
            is_old = is_like_python_2(content) if path.suffix == ".py" else is_for_python_2(content)
            if not is_old and not (path.suffix == ".py" and prepared.parses_all):
                return []
        return check_python(content, shown, rules) if path.suffix == ".py" else check_notebook(content, shown, rules)
    is_wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # UTF-16, whose bytes hold no words
    if not is_wide and not prepared.config_words.search(content):
        return []
    return _check_config(content, shown, path.suffix, prepared, is_named=is_named)


def _too_large(path: Path, shown: str, prepared: Scan) -> list[Finding]:
    """Judge a text by its beginning: a large file that mentions no setting there is data."""
    with path.open("rb") as file:
        content = file.read(_MAX_TEXT_BYTES)
    has_mention = mentions_any(content, prepared.rules.python) if path.suffix == ".py" else False
    if not has_mention and not (path.suffix != ".py" and prepared.config_words.search(content)):
        return []
    size = path.stat().st_size
    return [unreadable(shown, f"holds {size} bytes, more than source or config do", "exclude it with --exclude")]


def _check_config(content: bytes, shown: str, suffix: str, prepared: Scan, *, is_named: bool) -> list[Finding]:
    if suffix not in CONFIG_SUFFIXES:
        return [unreadable(shown, f"ends in {suffix!r}, which no check knows", "name a config, source or checkpoint")]
    try:
        text = decode_settings(content).text
    except UnicodeDecodeError as error:
        return [unreadable(shown, f"not UTF-8: {error.reason} at byte {error.start}", "save it as UTF-8")]
    findings = check_config(text, shown, suffix, prepared.rules, prepared.target.name, is_named=is_named)
    return [_guard_reader(found, prepared) for found in findings]


def _guard_reader(found: Finding, prepared: Scan) -> Finding:
    """Leave a setting to a person where a source reads it by its old name."""
    rules = {rule.id: rule for rule in prepared.rules.config}
    rule = rules.get(found.rule)
    reader = prepared.keys_in_code.get(rule.key.rpartition(".")[2]) if rule and found.edits else None
    return found if reader is None else found.for_person(f"{reader} reads it by this name, so change both together")


def _guard_pickle(found: Finding, path: Path, prepared: Scan) -> Finding:
    """Leave a pickle to a person where it cannot become a safetensors file of its name."""
    if not found.is_fixable:
        return found
    if path.name in prepared.pickles_in_text:
        where = prepared.pickles_in_text[path.name]
        return found.for_person(f"{where} names it", "write it as safetensors and change the name there, both together")
    if path.with_suffix(".safetensors").exists():
        return found.for_person("a .safetensors of its name stands beside it", "keep one of the two")
    return found


def _find_names_in_text(names: set[str], root: Path) -> dict[str, str]:
    """Return those of the file names that some text below `root` has, with the first place of each."""
    words = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w.-])(?:{words})(?![\w-])".encode())
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix in _TEXT_SUFFIXES and path.is_file() and path.stat().st_size <= _MAX_TEXT_BYTES:
            content = path.read_bytes()
            for match in pattern.finditer(content):
                line = content.count(b"\n", 0, match.start()) + 1
                found.setdefault(match[0].decode(), f"{show(path, root)}:{line}")
    return found


def _find_keys_in_code(keys: Sequence[str], files: Iterable[Path]) -> dict[str, str]:
    """Return the settings that sources read, as `x["key"]`, `x.get("key")` or `x.key`, with the first place of each."""
    if not keys:
        return {}
    names = "|".join(map(re.escape, sorted(set(keys))))
    # Everything has a version, so that only a key of that name can be the setting.
    attributes = "|".join(map(re.escape, sorted(set(keys) - {"version"})))
    item = rf"(?:\[\s*|\.(?:get|pop|setdefault)\(\s*)['\"](?P<item>{names})['\"]"
    pattern = re.compile(rf"{item}|\w\.(?P<attribute>{attributes})\b(?!\()".encode())
    words = [key.encode() for key in sorted(set(keys))]
    found: dict[str, str] = {}
    for path in files:
        if path.suffix in (".py", NOTEBOOK_SUFFIX) and path.is_file() and path.stat().st_size <= _MAX_TEXT_BYTES:
            content = path.read_bytes()
            # Looking for words is fifty times as fast as looking for their uses.
            if not any(word in content for word in words):
                continue
            for match in pattern.finditer(content):
                key = (match["item"] or match["attribute"]).decode()
                line = content.count(b"\n", 0, match.start()) + 1
                found.setdefault(key, f"{path.name}:{line}")
    return found


def _any_word(words: list[str]) -> re.Pattern[bytes]:
    # No word at all must find nothing, where an empty alternative would find everything.
    return re.compile(("|".join(map(re.escape, sorted(set(words)))) or r"(?!)").encode())
