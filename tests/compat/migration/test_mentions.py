"""A file that holds a finding always mentions its words."""

from __future__ import annotations

import pytest

from deepseek.compat.migration.mentions import mentions_any
from deepseek.compat.migration.rules import PythonRule
from tests.compat.migration.checks import RULES


@pytest.mark.parametrize("rule", RULES.python, ids=lambda rule: rule.id)
def test_every_rule_is_mentioned_by_its_example(rule: PythonRule) -> None:
    assert mentions_any(rule.before.encode(), (rule,))


def test_a_file_without_the_words_needs_no_parsing() -> None:
    assert not mentions_any(b"import torch\nx = torch.ones(1)\n", RULES.python[:3])
    assert not mentions_any(b"autocast()", RULES.python)


def test_spellings_of_an_import_do_not_matter() -> None:
    assert mentions_any(b"from torch.cuda.amp import (  # (old)\n  GradScaler)\n", RULES.python)
    assert mentions_any(b"from torch.cuda.amp import *\nGradScaler()\n", RULES.python)
