"""Where control flow stands: places, lines, notes of a trace, refusals, and recursion that no graph can hold."""

import inspect
import traceback

import pytest

from deepseek.compiler.jit.tracing import sites
from deepseek.compiler.jit.tracing.sites import (
    MAX_NESTED,
    ControlFlowError,
    Site,
    Trace,
    count_writes,
    enter,
    find_refusal,
    has_written,
    last_own_frame,
    line_at,
    make_refusal,
    note,
    note_write,
    recording,
    refuse,
)


@pytest.fixture(autouse=True)
def nothing_entered(monkeypatch):
    monkeypatch.setattr(sites, "_AROUND", {})
    monkeypatch.setattr(sites, "_WRITES", [])


def here():
    """A site at the line that calls this."""
    return Site(__file__, inspect.currentframe().f_back.f_lineno, "if", "f")


def test_a_site_knows_its_line_and_its_text():
    site = here()  # this text
    assert site.text == "site = here()  # this text"
    assert site.place == f"{__file__}:{site.line}"
    assert line_at(f"{__file__}:1") == inspect.getsource(inspect.getmodule(here)).splitlines()[0]
    assert line_at(f"{__file__}:1000000") == ""


def test_each_site_has_a_key_of_its_own():
    one, other = Site("file.py", 1, "if"), Site("file.py", 1, "if")
    assert one.key != other.key
    assert one != other


def test_a_trace_notes_each_site_once_while_it_records():
    site, later = here(), here()
    with recording(Trace()) as outer:
        note(site.key)
        with recording(Trace()) as inner:
            note(site.key)
            note(later.key)
    note(here().key)
    assert outer.rewritten == [site, later]
    assert inner.rewritten == [site, later]


def test_a_trace_that_fails_records_no_more():
    site, trace = here(), Trace()
    with pytest.raises(ZeroDivisionError), recording(trace):
        _ = 1 / 0
    note(site.key)
    assert trace.rewritten == []


def test_a_refusal_has_place_reason_hint_function_and_line():
    site = here()  # refused
    with pytest.raises(ControlFlowError) as refused:
        refuse(site.key, None, "seen", "hint")
    assert str(refused.value) == f"{__file__}:{site.line}: seen; hint (in f: `site = here()  # refused`)"
    assert refused.value.sites == (site,)
    assert refused.value.place == site.place


def test_a_refusal_elsewhere_shows_the_line_there():
    error = make_refusal(here().key, None, "seen", "hint", f"{__file__}:1")
    assert error.place == f"{__file__}:1"
    assert line_at(error.place) in str(error)


def test_a_refusal_names_the_conditions_around_it_from_the_outermost():
    outer, inner, beside, site = here(), here(), here(), here()
    enter(outer.key, "B")
    enter(beside.key, "C")
    enter(inner.key, "C")  # the one before was left
    assert make_refusal(site.key, "C", "seen", "hint").sites == (outer, inner, site)
    assert make_refusal(site.key, "B", "seen", "hint").sites == (outer, site)
    assert make_refusal(inner.key, None, "seen", "hint").sites == (outer, inner, inner)


def test_a_condition_inside_itself_too_often_is_a_recursion():
    site, other = here(), here()
    for depth in "BCDEFGH"[:MAX_NESTED]:
        enter(site.key, depth)
    enter(other.key, "I")
    with pytest.raises(ControlFlowError, match="calls itself inside its own tensor condition"):
        enter(site.key, "J")


def test_writes_are_those_since_a_count():
    note_write("early")
    since = count_writes()
    assert not has_written(("early", "x"), since)
    note_write("x")
    assert has_written(("y", "x"), since)
    assert not has_written(("y",), since)
    assert has_written(("early",), "0")


def test_a_refusal_is_found_inside_what_a_tracer_raised():
    refusal = make_refusal(here().key, None, "seen", "hint")
    caused, context = RuntimeError("outer"), ValueError("middle")
    caused.__cause__, context.__context__ = context, refusal
    assert find_refusal(caused) is refusal
    assert find_refusal(ValueError()) is None
    assert find_refusal(None) is None
    one, other = ValueError(), ValueError()
    one.__cause__, other.__cause__ = other, one  # a circle
    assert find_refusal(one) is None


def test_the_last_own_frame_is_neither_of_torch_nor_of_the_compiler():
    own = traceback.FrameSummary(__file__, 1, "f")
    others = [
        traceback.FrameSummary("/site-packages/torch/nn/modules/module.py", 2, "forward"),
        traceback.FrameSummary(sites.__file__, 3, "note"),
    ]
    assert last_own_frame([traceback.FrameSummary(__file__, 9, "main"), own, *others]) is own
    assert last_own_frame(others) is None
