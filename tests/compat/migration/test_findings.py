"""Findings, the edits that settle them, and where a character stands."""

import re

from hypothesis import given
from hypothesis import strategies as st

from deepseek.compat.migration.findings import Edit, Finding, Lines, apply_edits, find, unreadable
from deepseek.compat.migration.rules import Rule

RULE = Rule(id="old-name", since="2.0", severity="error", why="it was renamed", fix="write new", source="docs")


def finding(*edits, rule="old-name"):
    return Finding("a.py", 3, 5, rule, "error", "it was renamed", "write new", edits)


@given(st.lists(st.tuples(st.text("ab\n", min_size=1, max_size=3), st.none() | st.text("XY", max_size=3)), max_size=8))
def test_edits_of_pieces_give_the_text_with_its_pieces_changed(pieces):
    """A text of pieces, some with a replacement; expected is what joining them anew gives."""
    start, findings = 0, []
    for old, new in pieces:
        if new is not None:
            findings.append(finding(Edit(start, start + len(old), new)))
        start += len(old)
    text = "".join(old for old, _ in pieces)
    expected = "".join(old if new is None else new for old, new in pieces)
    assert apply_edits(text, findings) == apply_edits(text, reversed(findings)) == expected


def test_a_finding_that_touches_an_edit_of_another_is_left_out_as_a_whole():
    first = finding(Edit(0, 3, "one"))
    second = finding(Edit(2, 5, "TWO"), Edit(8, 9, "!"))
    assert apply_edits("abcdefghi", [first, second]) == "onedefghi"
    assert apply_edits("abcdefghi", [second, first]) == "abTWOfgh!"


def test_an_edit_that_two_findings_share_is_made_once():
    shared = Edit(0, 0, "import new\n")
    findings = [finding(shared, Edit(0, 3, "new")), finding(shared, Edit(4, 7, "new"))]
    assert apply_edits("old old", findings) == "import new\nnew new"


def test_a_rule_is_found_with_what_was_seen():
    found = find(RULE, "a.py", 3, 5, [Edit(0, 3, "new")], detail="as ds.old")
    assert str(found) == "a.py:3:5: error old-name: it was renamed (as ds.old); write new"
    assert found.to_dict() == {
        "path": "a.py",
        "line": 3,
        "column": 5,
        "rule": "old-name",
        "severity": "error",
        "why": "it was renamed (as ds.old)",
        "fix": "write new",
        "is_fixable": True,
    }
    assert find(RULE, "a.py", 3, 5).why == "it was renamed"


def test_what_is_left_to_a_person_has_no_edits_and_the_reason():
    left = finding(Edit(0, 3, "new")).for_person("two meanings")
    assert (left.edits, left.is_fixable, left.is_for_person) == ((), False, True)
    assert left.why == "it was renamed (two meanings)"
    moved = finding(Edit(0, 3, "new")).moved(9, "in a cell")
    assert (moved.line, moved.column, moved.is_fixable, moved.why) == (9, 5, False, "it was renamed (in a cell)")
    assert finding().with_edits([Edit(1, 2, "")]).edits == (Edit(1, 2, ""),)


def test_files_that_are_converted_are_fixable_without_edits_unless_a_person_has_to():
    for rule in ("checkpoint-layout", "checkpoint-pickle"):
        assert finding(rule=rule).is_fixable
        assert not finding(rule=rule).for_person("unknown family").is_fixable
    assert not finding().is_fixable


def test_a_file_that_cannot_be_read_says_so():
    found = unreadable("a.py", "it is no text", "save it as UTF-8")
    assert found.is_unreadable
    assert not finding().is_unreadable
    assert str(found) == "a.py:1:1: error unreadable: it is no text; save it as UTF-8"


@given(st.text("ab\r\n", max_size=30), st.data())
def test_lines_and_columns_lead_to_the_character_and_back(text, data):
    lines = Lines(text)
    offset = data.draw(st.integers(0, len(text)))
    line, column = lines.line_and_column(offset)
    assert lines.offset(line, column - 1) == offset
    before = text[:offset]
    if text[offset - 1 : offset + 1] != "\r\n":  # between the two no line has ended
        rows = re.split(r"\r\n|\r|\n", before)
        assert (line, column) == (len(rows), len(rows[-1]) + 1)
