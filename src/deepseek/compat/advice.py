"""Which generation for whom: the documents' selection rules, applied to one question.

`deepseek advise` and users of the Python function come here. The rules are rows of the table, strongest first; the
first one whose conditions hold, and whose generation no exclusion names, decides. The other rows that hold are the
runners-up. What would change the answer is found by asking again: every value at which some rule starts or stops to
hold replaces the given one, one setting at a time.

A value that is left open (`None`) meets no condition, so an open question gets the mildest answer that is true.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from deepseek.compat.generations import Claim, Conditions, SelectionRule, Table, load_table
from deepseek.core.config import Config
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.core.units import format_bytes, format_count


class Question(Config):
    """The known facts about a model and about the hardware and team that are to run it."""

    params: float | None = Field(default=None, gt=0)
    """Parameters of the model."""
    gpu_memory_bytes: float | None = Field(default=None, gt=0)
    """Memory of one device."""
    latency: Literal["realtime", "batch"] | None = None
    """Whether somebody waits for each answer."""
    scale: Literal["single", "cluster"] | None = None
    """One machine or several."""
    kubernetes: Literal["none", "basic", "expert"] | None = None
    """How well the team knows Kubernetes."""
    hardware: str | None = None
    """A device by name, such as a100 or raspberry-pi."""


class Reason(Config):
    """A generation and the rule for it or, where it is ruled out, against it."""

    generation: str
    rule: str
    because: Claim


class Change(Config):
    """One setting that would lead to another answer."""

    setting: str
    value: str
    generation: str
    because: Claim


class Advice(Config):
    """The answer, the rule that decided, and how firm it is."""

    question: Question
    generation: str
    rule: str
    because: Claim
    runners_up: tuple[Reason, ...]
    ruled_out: tuple[Reason, ...]
    changes: tuple[Change, ...]


def advise(
    *,
    params: float | None = None,
    gpu_memory_bytes: float | None = None,
    latency: str | None = None,
    scale: str | None = None,
    kubernetes: str | None = None,
    hardware: str | None = None,
) -> Advice:
    """Recommend a generation.

    `params` counts parameters, `gpu_memory_bytes` is the memory of one device, `latency` is realtime or batch, `scale`
    single or cluster, `kubernetes` none, basic or expert, `hardware` a device name of the table; `None` means unknown.
    Raises `ConfigError` for any other value.

    >>> advise(params=7e9, scale="single").generation
    '2.3'
    """
    question = Question.from_dict(
        {"params": params, "gpu_memory_bytes": gpu_memory_bytes, "latency": latency}
        | {"scale": scale, "kubernetes": kubernetes, "hardware": hardware}
    )
    table = load_table()
    decided, *others = _rank(question, table)
    return Advice(
        question=question,
        generation=decided.recommend,
        rule=decided.id,
        because=decided.because,
        runners_up=tuple(_reasons(others, besides=decided.recommend)),
        ruled_out=tuple(_excluded(question, table)),
        changes=tuple(_changes(question, table, decided.recommend)),
    )


def _rank(question: Question, table: Table) -> list[SelectionRule]:
    """List the rules that hold and are not ruled out, strongest first; the last row of the table always is one."""
    excluded = {reason.generation for reason in _excluded(question, table)}
    return [
        rule for rule in table.selection if _holds(rule.conditions, question, table) and rule.recommend not in excluded
    ]


def _excluded(question: Question, table: Table) -> Iterator[Reason]:
    for rule in table.exclusions:
        if _holds(rule.conditions, question, table):
            for name in rule.excludes:
                yield Reason(generation=name, rule=rule.id, because=rule.because)


def _reasons(rules: list[SelectionRule], *, besides: str) -> Iterator[Reason]:
    seen = {besides}
    for rule in rules:
        if rule.recommend not in seen:
            seen.add(rule.recommend)
            yield Reason(generation=rule.recommend, rule=rule.id, because=rule.because)


def _holds(conditions: Conditions, question: Question, table: Table) -> bool:
    params, memory = question.params, question.gpu_memory_bytes
    checks = [
        (conditions.params_from, params is not None and params >= (conditions.params_from or 0)),
        (conditions.params_below, params is not None and params < (conditions.params_below or 0)),
        (conditions.gpu_memory_below, memory is not None and memory < (conditions.gpu_memory_below or 0)),
        (conditions.gpu_memory_up_to, memory is not None and memory <= (conditions.gpu_memory_up_to or 0)),
        (conditions.gpu_memory_above, memory is not None and memory > (conditions.gpu_memory_above or 0)),
        (conditions.latency, question.latency == conditions.latency),
        (conditions.scale, question.scale == conditions.scale),
        (conditions.kubernetes, question.kubernetes == conditions.kubernetes),
        (conditions.hardware, _hardware_class(question.hardware, table) == conditions.hardware),
    ]
    return all(is_met for wanted, is_met in checks if wanted is not None)


def _hardware_class(name: str | None, table: Table) -> str | None:
    if name is None:
        return None
    classes = {device: kind for kind, devices in table.hardware.items() for device in devices}
    if name.lower() not in classes:
        raise ConfigError(explain_unknown("hardware", name, classes))
    return classes[name.lower()]


def _changes(question: Question, table: Table, answer: str) -> Iterator[Change]:
    """Yield, per setting, the nearest other value that leads to another generation; each generation once."""
    seen = {answer}
    for setting, value, shown in _alternatives(question, table):
        decided = _rank(question.override({setting: value}), table)[0]
        if decided.recommend not in seen:
            seen.add(decided.recommend)
            yield Change(setting=setting, value=shown, generation=decided.recommend, because=decided.because)


def _alternatives(question: Question, table: Table) -> Iterator[tuple[str, float | str, str]]:
    """Yield values on both sides of every threshold of a rule, the nearest to the given value first."""
    rules = [rule.conditions for rule in table.selection]
    params = {threshold for rule in rules for threshold in (rule.params_from, rule.params_below) if threshold}
    memory = {
        threshold
        for rule in rules
        for threshold in (rule.gpu_memory_below, rule.gpu_memory_up_to, rule.gpu_memory_above)
        if threshold
    }
    for threshold in sorted(params, key=lambda value: abs(value - (question.params or 0))):
        yield "params", threshold, f"{format_count(threshold)} or more"
        yield "params", threshold * 0.999, f"less than {format_count(threshold)}"
    for threshold in sorted(memory, key=lambda value: abs(value - (question.gpu_memory_bytes or 0))):
        yield "gpu_memory_bytes", threshold * 1.001, f"more than {format_bytes(threshold)}"
        yield "gpu_memory_bytes", threshold * 0.999, f"less than {format_bytes(threshold)}"
    for setting, values in (
        ("latency", ["realtime", "batch"]),
        ("scale", ["single", "cluster"]),
        ("kubernetes", ["none", "basic", "expert"]),
        ("hardware", [devices[0] for devices in table.hardware.values()]),
    ):
        yield from ((setting, value, value) for value in values)
