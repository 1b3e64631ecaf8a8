"""What importing costs: nothing until a name is touched, and torch only with the first one that needs it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepseek
from deepseek.artifact.format import Description
from deepseek.artifact.writing import write_artifact
from deepseek.cli import VERBS

PACKAGE = Path(deepseek.__file__).parent
HEAVY = ("torch", "numpy", "pydantic", "tokenizers", "rich", "cyclopts", "starlette", "transformers")
# Rooms, or files of rooms, that a machine without torch can use.
COLD_ROOMS = ("core", "artifact", "cli")
COLD_FILES = (
    "recipes/__init__.py",
    "data/config.py",
    "data/sources.py",
    "serve/config.py",
    "serve/scheduling.py",
    "serve/sequences.py",
    "compiler/runtimes/selection_policy.py",
    "compiler/runtimes/decisions.py",
    "compiler/runtimes/selection_report.py",
    "compiler/runtimes/fallbacks.py",
    "compiler/runtimes/timing.py",
)

# Modules that may be loaded beyond those that Python itself starts with; `benchmarks/startup.py` measures the seconds.
MOST_MODULES_OF_IMPORT = 40
MOST_MODULES_OF_HELP = 350


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loaded_after(code):
    """The heavy libraries among the modules that `code` leaves loaded."""
    return run_python(f"import sys\n{code}\nprint(*({set(HEAVY)!r} & sys.modules.keys()))").split()


def cold_modules():
    files = [PACKAGE / name for name in COLD_FILES]
    files += [path for room in COLD_ROOMS for path in (PACKAGE / room).rglob("*.py")]
    parts = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in files]
    return sorted(".".join(part).removesuffix(".__init__") for part in parts)


def modules_loaded_by(code):
    """Every module that `code` loads in a fresh process, beyond those that Python starts with."""
    start = "import atexit, sys\nbefore = {*sys.modules}\n"
    end = "atexit.register(lambda: print('\\n', *({*sys.modules} - before)))\n"
    return run_python(start + end + code).splitlines()[-1].split()


def test_importing_deepseek_loads_no_library():
    assert loaded_after("import deepseek") == []


def test_importing_deepseek_loads_one_module_of_ours_and_few_of_pythons_own():
    loaded = modules_loaded_by("import deepseek")
    assert [name for name in loaded if name.partition(".")[0] == "deepseek"] == ["deepseek"]
    assert {name.partition(".")[0] for name in loaded} <= {"deepseek", *sys.stdlib_module_names}
    assert len(loaded) <= MOST_MODULES_OF_IMPORT


@pytest.mark.parametrize("name", deepseek.__all__)
def test_every_public_name_loads(name):
    assert getattr(deepseek, name) is not None
    assert name in dir(deepseek)


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(AttributeError, match="MoERouter"):
        _ = deepseek.MoERooter


def test_cold_rooms_import_without_torch():
    modules = cold_modules()
    assert len(modules) > 20
    # A finder before all others turns an import of torch, however late in a chain, into a failure with a traceback.
    guard = """
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not to be had in a cold room")
sys.meta_path.insert(0, Refuse())
for module in sys.argv[1:]:
    importlib.import_module(module)
print(len(sys.argv) - 1)
"""
    assert int(run_python(guard, *modules)) == len(modules)


def test_the_list_of_recipes_loads_no_library():
    assert loaded_after("import deepseek.recipes; assert len(deepseek.recipes.RECIPES) >= 3") == []


def test_an_artifact_is_verified_without_torch(tmp_path):
    description = Description(architecture="decoder", architecture_config={})
    manifest = write_artifact(tmp_path / "model", {"weight": torch.zeros(2)}, description)
    code = """
import sys
from deepseek.artifact.reading import open_artifact
print(open_artifact(sys.argv[1]).manifest.digest, *({"torch", "numpy"} & sys.modules.keys()))
"""
    assert run_python(code, str(tmp_path / "model")).split() == [manifest.digest]


def test_help_loads_no_torch():
    code = """
import contextlib, sys
from deepseek.cli import main
for words in sys.argv[1:]:
    print("ASKED", words)
    with contextlib.suppress(SystemExit):
        main(words.split())
    assert "torch" not in sys.modules, words
"""
    asked = ["--version", "--help", *(f"{verb} --help" for verb in VERBS)]
    _, *answers = run_python(code, *asked).split("ASKED ")
    assert [answer.partition("\n")[0] for answer in answers] == asked
    assert all(len(answer.splitlines()) >= 4 for answer in answers[1:])


def test_the_list_of_commands_loads_no_room_but_cli_and_core_and_no_command():
    loaded = modules_loaded_by("from deepseek.cli import main\nmain(['--help'])")
    ours = {name for name in loaded if name.startswith("deepseek.")}
    assert {name.split(".")[1] for name in ours} <= {"cli", "core"}
    assert not any(name.startswith("deepseek.cli.") for name in ours)
    assert len(loaded) <= MOST_MODULES_OF_HELP
