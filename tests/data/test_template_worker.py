"""The worker as the process that it is: lines in, lines out, whatever is in them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from deepseek.data import template_worker
from deepseek.data.template_worker import render


def ask(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    """Send lines to a worker and read its answers to the end."""
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    command = [sys.executable, "-P", template_worker.__file__]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_process_answers_line_by_line_and_goes_on_after_every_kind_of_failure() -> None:
    sources = [
        "{{ a }}\n",
        "{% if %}",
        "{{ a + 1 }}",
        "{{ 'x'.ljust(99999999999) }}",
        "{{ a.__class__.mro() }}",
        "é\u2028",
    ]
    answers = ask(*({"source": source, "variables": {"a": "line\nbreak"}} for source in sources))
    assert [next(iter(answer)) for answer in answers] == ["text", "broken", "refused", "refused", "refused", "text"]
    assert answers[0]["text"] == "line\nbreak"
    assert answers[1]["line"] == 1
    assert answers[3]["refused"] == "it needs more memory than a template may take"
    assert answers[5]["text"] == "é\u2028"


def test_it_starts_without_deepseek_and_without_torch() -> None:
    source = "import runpy, sys; sys.stdin = []; runpy.run_path(sys.argv[1], run_name='__main__'); "
    source += "print(sorted({'deepseek', 'torch', 'tokenizers'} & sys.modules.keys()))"
    command = [sys.executable, "-P", "-c", source, template_worker.__file__]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_name_set_inside_a_generation_block_ends_with_it_and_a_loop_goes_through_it() -> None:
    source = (
        "{% for m in messages %}{% generation %}{% set seen = m %}{% if m == 'b' %}{{ loop.index }}{% endif %}"
        "{{ seen }}"
        "{% endgeneration %}{{ seen is defined }} {% endfor %}"
    )
    assert render(source, {"messages": ["a", "b"]}) == {"text": "aFalse 2bFalse ", "generated": [[0, 1], [7, 9]]}


def test_marks_that_a_message_imitates_are_text() -> None:
    source = "{% generation %}{{ a }}{% endgeneration %}"
    assert render(source, {"a": "<0123[>é\U0001f600]>"}) == {"text": "<0123[>é\U0001f600]>", "generated": [[0, 11]]}


@pytest.mark.parametrize("source", ["{% generation %}", "{% endgeneration %}", "{% generation %}{% endfor %}"])
def test_a_generation_block_without_an_end_is_a_broken_template(source: str) -> None:
    assert set(render(source, {})) == {"broken", "line"}


def test_json_is_written_with_the_options_of_transformers_and_without_html_escapes() -> None:
    value = {"b": "<é>", "a": [1]}
    assert render("{{ v | tojson }}", {"v": value}) == {"text": '{"b": "<é>", "a": [1]}'}
    source = "{{ v | tojson(indent=1, ensure_ascii=true, separators=[',', ':'], sort_keys=true) }}"
    assert render(source, {"v": value}) == {
        "text": json.dumps(value, indent=1, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    }
