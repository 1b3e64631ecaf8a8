"""`deepseek doctor`: what was measured is shown, and only what pays is recommended or made."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from deepseek.compat import doctor
from deepseek.compat.doctor import Diagnosis, Hint
from tests.cli.commands import Result

Call = Callable[..., Result]
PAYS = Hint("allocator", "keep large blocks", "memory returns late", variables={"A": "1", "B": "2"})
IN_NOISE = Hint("threads", "half the threads", "slower elsewhere", variables={"C": "3"})


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two hints as if measured, of which one pays; returns those that the command makes in its process."""
    names: list[str] = []
    measured = [
        Diagnosis(PAYS, (0.4, 0.3, 0.5), (0.2, 0.2, 0.1)),
        Diagnosis(IN_NOISE, (0.4, 0.3, 0.5), (0.2, 0.2, 0.9)),
    ]
    monkeypatch.setattr(doctor, "diagnose", lambda: measured)
    monkeypatch.setattr(doctor, "apply_hints", names.extend)
    monkeypatch.setattr(doctor, "time_network", lambda: 0.25)
    return names


def test_json_has_medians_and_says_what_pays(call: Call, applied: list[str]) -> None:
    assert json.loads(call("doctor", "--json").out) == {
        "hints": [
            {"hint": "allocator", "before_s": 0.4, "after_s": 0.2, "pays": True, "line": "export A=1 B=2"},
            {"hint": "threads", "before_s": 0.4, "after_s": 0.2, "pays": False, "line": "export C=3"},
        ],
        "applied_s": None,
    }
    assert applied == []


def test_only_the_line_that_pays_is_recommended(call: Call, applied: list[str]) -> None:
    out = call("doctor").out
    assert "export A=1 B=2\n" in out
    assert "export C=3" not in out
    assert out.count("2.00x") == 2
    assert "400 ms" in out and "200 ms" in out
    assert "in this process" not in out


def test_apply_makes_what_pays_here_and_measures_once_more(call: Call, applied: list[str]) -> None:
    out = call("doctor", "--apply").out
    assert applied == ["allocator"]
    assert "with those that pay, in this process: 250 ms" in out
    assert json.loads(call("doctor", "--apply", "--json").out)["applied_s"] == 0.25


def test_where_nothing_pays_no_line_is_recommended(
    call: Call, applied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: [Diagnosis(IN_NOISE, (1.0,), (1.0,))])
    out = call("doctor", "--apply").out
    assert applied == []
    assert "export" not in out
