import sys
import tomllib
from pathlib import Path

import pytest

from deepseek.core.errors import MissingExtraError
from deepseek.core.extras import DISTRIBUTION, has_library, require


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A place on the path for libraries that are broken in their own ways."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return make


def test_an_installed_library_is_the_module_itself():
    import xml.dom

    assert require("xml.dom", extra="data") is xml.dom


def test_a_missing_one_says_what_to_install():
    with pytest.raises(MissingExtraError) as caught:
        require("no_such_library.part", extra="serve")
    assert str(caught.value) == (
        "no_such_library is needed here and is not installed: pip install 'deepseek-engine[serve]'"
    )


def test_what_an_installed_library_lacks_itself_is_its_own_error(library):
    name = library("half_installed", "import no_such_dependency")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        require(name, extra="data")
    assert not isinstance(caught.value, MissingExtraError)


def test_a_broken_library_is_not_called_missing(library):
    with pytest.raises(ZeroDivisionError):
        require(library("broken", "1 / 0"), extra="data")


def test_asking_for_a_library_does_not_import_it(library):
    assert has_library(library("costly", "raise SystemExit")) and "costly" not in sys.modules
    assert not has_library("no_such_library.part")


def test_the_distribution_is_the_one_that_pyproject_names():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION
