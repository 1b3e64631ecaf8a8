"""`deepseek migrate`, also as `deepseek-migrate`: what an upgrade breaks, and a migrated copy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from deepseek.compat.migration.findings import Finding

CLEAN, FOUND, UNREADABLE = 0, 1, 2


def migrate(
    path: Path | None = None,
    *,
    check: Path | None = None,
    source: Annotated[str | None, Parameter(name="--from")] = None,
    target: Annotated[str, Parameter(name="--to")] = "v5.0",
    apply: bool = False,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Check configs, Python sources and checkpoints under PATH for what a generation breaks.

    Exit status: 0 nothing found, 1 something found, 2 a file or an argument could not be read.

    Example: deepseek migrate old-project --apply --out new-project

    Parameters
    ----------
    path
        File or folder to check.
    check
        The same, as `--check PATH`.
    source
        The generation one comes from; without it rules of all generations apply.
    target
        The generation one goes to.
    apply
        Write a migrated copy to --out; the original is never touched.
    out
        Folder of the copy; must not exist.
    json
        Print the findings as one JSON object.
    """
    from deepseek.core.errors import ConfigError

    where = check or path
    if where is None or (check and path):
        raise ConfigError("give one path to check: deepseek-migrate --check PATH")
    if apply != (out is not None):
        raise ConfigError("--apply writes a copy and --out says where; give both or none")
    findings = _check(where, target, source) if out is None else _apply(where, out, target, source)
    _show(findings, as_json=json)
    if any(each.is_unreadable for each in findings):
        return UNREADABLE
    return FOUND if findings else CLEAN


def _check(path: Path, target: str, source: str | None) -> list[Finding]:
    from deepseek.compat.migration.scanning import list_files, prepare_scan, scan_file

    prepared, files = prepare_scan(target, source), list_files(path)
    root = path if path.is_dir() else path.parent
    findings: list[Finding] = []
    with _progress("checking") as advance:
        for done, file in enumerate(files, start=1):
            findings += scan_file(file, prepared, root, is_named=file == path)
            advance(done, len(files))
    return findings


def _apply(path: Path, out: Path, target: str, source: str | None) -> list[Finding]:
    from deepseek.compat.migration.applying import migrate as run

    with _progress("migrating") as advance:
        return run(path, out, target, source, advance)


def _show(findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        import json

        sys.stdout.write(json.dumps({"findings": [each.to_dict() for each in findings]}, indent=2) + "\n")
        return
    for finding in findings:
        sys.stdout.write(f"{finding}\n")
    num_fixable = sum(each.is_fixable for each in findings)
    sys.stdout.write(f"{len(findings)} findings, {num_fixable} of them settled by --apply --out DIR\n")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, told files done and in all; silent where nobody looks."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
