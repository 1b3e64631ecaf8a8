"""`deepseek migrate`, also as `deepseek-migrate`: what an upgrade breaks, and a migrated copy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from deepseek.compat.migration.findings import Finding
    from deepseek.compat.migration.scanning import Survey

CLEAN, FOUND, UNREADABLE = 0, 1, 2


def migrate(
    path: Path | None = None,
    *,
    check: Path | None = None,
    source: Annotated[str | None, Parameter(name="--from")] = None,
    target: Annotated[str, Parameter(name="--to")] = "v5.0",
    apply: bool = False,
    out: Path | None = None,
    exclude: list[str] | None = None,
    json: bool = False,
) -> int:
    """Check configs, Python sources and checkpoints under PATH for what a generation breaks.

    A generation is one of the versions 1.0 to 6.0 of the engine that this product was built from, and no version of
    this product: a form of config files and of checkpoints, and the libraries of its time
    (docs/reference/generations.md).

    Exit status: 0 nothing found, 1 something found, 2 a file or an argument could not be read.

    Example: deepseek migrate old-project --apply --out new-project

    Parameters
    ----------
    path
        File or folder to check.
    check
        The same, as `--check PATH`.
    source
        The generation to start from; without it rules of all generations apply.
    target
        The generation to migrate to.
    apply
        Write a migrated copy to --out; the original is never touched.
    out
        Folder of the copy; must not exist.
    exclude
        Names or paths below PATH that are not checked, with wildcards; may be given several times.
    json
        Print the findings as one JSON object.
    """
    from deepseek.compat.migration.scanning import list_rules_left_out, survey
    from deepseek.core.errors import ConfigError

    where = check or path
    if where is None or (check and path):
        raise ConfigError("give one path to check: deepseek-migrate --check PATH")
    if apply != (out is not None):
        raise ConfigError("--apply writes a copy and --out says where; give both or none")
    files = survey(where, exclude or ())
    changed: list[str] = []
    if out is None:
        findings = _check(where, files, target, source)
    else:
        findings = _apply(where, out, target, source, changed, exclude or ())
    notes = [str(files)] if str(files) else []
    if source is not None and (left_out := list_rules_left_out(target, source)):
        notes.append(f"not looked for, since --from {source} has it behind it: {', '.join(left_out)}")
    if json:
        _print_json(findings, changed, files)
    else:
        _show(findings, changed if apply else None, notes)
    if any(finding.is_unreadable for finding in findings):
        return UNREADABLE
    return FOUND if findings else CLEAN


def _check(path: Path, files: Survey, target: str, source: str | None) -> list[Finding]:
    from deepseek.compat.migration.scanning import scan_files

    with _progress("checking") as advance:
        return scan_files(path, files.files, target, source, advance)


def _apply(
    path: Path, out: Path, target: str, source: str | None, changed: list[str], exclude: Sequence[str]
) -> list[Finding]:
    from deepseek.compat.migration.applying import migrate as run

    with _progress("migrating") as advance:
        return run(
            path,
            out,
            target,
            source,
            advance,
            on_change=lambda file, what: changed.append(f"{file}: {what}"),
            exclude=exclude,
        )


def _print_json(findings: list[Finding], changed: list[str], files: Survey) -> None:
    import json

    listed = [finding.to_dict() for finding in findings]
    document = {"findings": listed, "changed": changed, "not_looked_at": str(files).removeprefix("not looked at: ")}
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def _show(findings: list[Finding], changed: list[str] | None, notes: list[str]) -> None:
    """Print what was found; `changed` is `None` where nothing was to be changed."""
    lines = [f"changed {file}" for file in changed or ()]
    lines += [*map(str, findings), *notes, _summarize(findings, changed)]
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _summarize(findings: list[Finding], changed: list[str] | None) -> str:
    total = _count(len(findings), "finding")
    if changed is not None:
        return f"{_count(len(changed), 'file')} changed, {total} left"
    num_conditional = sum(finding.is_conditional for finding in findings)
    num_settled = sum(finding.is_fixable for finding in findings) - num_conditional
    if not findings:
        return total
    settled = f"{total}, {num_settled} of them settled by --apply --out DIR"
    if not num_conditional:
        return settled
    return f"{settled}, and {_count(num_conditional, 'pickle')} if nothing but tensors is in there"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error that receives files done and in all; silent where it is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
