"""Tables show what they are given, as it is, and spinners only where somebody looks."""

from __future__ import annotations

import pytest

from deepseek.cli.screen.tables import show_table, working


def test_text_that_looks_like_markup_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("[bold]title", ("", "value"), [("runs/[red]x[/red]", "[1]")])
    out = capsys.readouterr().out
    for text in ("[bold]title", "runs/[red]x[/red]", "[1]"):
        assert text in out


def test_numbers_stand_to_the_right_and_names_to_the_left(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("sizes", ("file", "bytes"), [("a", "1"), ("longer", "12345")])
    cells = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert cells == [[" a      ", "     1 "], [" longer ", " 12345 "]]


def test_a_table_without_names_has_no_head(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("facts", ("", ""), [("layers", "4")])
    out = capsys.readouterr().out
    assert "━" not in out.splitlines()[2]
    assert "layers" in out


def test_what_is_no_terminal_gets_no_spinner(capsys: pytest.CaptureFixture[str]) -> None:
    with working("measuring"):
        pass
    assert capsys.readouterr() == ("", "")
