"""The examples in the docstrings run and say what they say: every module of the package, and every example in it."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import deepseek

# Importing this one runs the command line; that it has no example is checked below like everywhere else.
_COMMAND = "deepseek.__main__"
MODULES = ["deepseek", *(each.name for each in pkgutil.walk_packages(deepseek.__path__, "deepseek."))]


def test_every_file_of_the_package_is_a_module_that_is_looked_at():
    root = Path(deepseek.__file__).parent
    parts = [each.relative_to(root).with_suffix("").parts for each in root.rglob("*.py")]
    names = {".".join(("deepseek", *part)).removesuffix(".__init__") for part in parts}
    assert names == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    spec = importlib.util.find_spec(name)
    num_written = len(re.findall(r"^\s*>>> ", Path(spec.origin).read_text(encoding="utf-8"), flags=re.MULTILINE))
    if name == _COMMAND:
        assert num_written == 0
        return
    result = doctest.testmod(importlib.import_module(name), report=False)
    assert result.failed == 0
    assert result.attempted == num_written  # one that stands where doctest does not look would never run
