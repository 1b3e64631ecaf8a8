"""The documentation is true: its code runs, its links lead somewhere, its reference says what the code says.

Every `sh` and `python` block of the README and the guide runs, page by page, in a folder that looks as it does after
`make quickstart`: a page's blocks run in order, and Python blocks share their variables. What takes minutes is made
small by `SMALLER`, openly and here; a block below `<!-- test: skip-slow -->` holds `make` commands and does not run.
"""

import importlib
import importlib.util
import inspect
import linecache
import os
import pkgutil
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

import deepseek
from deepseek.cli import VERBS, build_app
from deepseek.core.config import Config
from deepseek.data.tokenizing import train_tokenizer
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import make_int8_, save_model
from deepseek.nn.masks import MaskConfig
from deepseek.nn.moe import MoEConfig

ROOT = Path(__file__).parents[1]
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
# This page shows files as well as code; tests/compat/test_guide.py runs it, each block in the file that it names.
SHOWN_WITH_FILES = "choosing-and-upgrading.md"
PAGES = [ROOT / "README.md", *(page for page in GUIDE if page.name != SHOWN_WITH_FILES)]
ALL_PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]

# (what a page says, what runs here instead); a row that no page needs any more is an error.
SMALLER = (
    ('"num_steps": 100', '"num_steps": 3, "data.sources": ["notes"]'),
    ('"num_steps": 20, "log_every": 1}', '"num_steps": 20, "log_every": 1, "data.batch_size": 2}'),
    ('"num_steps": 50', '"num_steps": 6'),
    ("num_steps=60", "num_steps=3"),
    ("num_steps=20", "num_steps=3"),
    ("num_steps = 20", "num_steps = 3"),
    ('"time_budget_s": 90', '"time_budget_s": 5'),
    ("8080", "{port}"),
)
SKIPPED = "test: skip-slow"


@dataclass(frozen=True)
class Block:
    """A piece of code on a page."""

    line: int
    language: str
    code: str
    is_skipped: bool


def read_blocks(page):
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    previous = [None, *tokens]
    return [
        Block(token.map[0] + 1, token.info, token.content, SKIPPED in (before.content if before else ""))
        for before, token in zip(previous, tokens, strict=False)
        if token.type == "fence"
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What a reader has after `make quickstart`, and some text of their own."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "notes").mkdir()
    texts = [text for path in ALL_PAGES for text in path.read_text(encoding="utf-8").split("\n## ")]
    for number, text in enumerate(texts):
        (folder / "notes" / f"{number}.md").write_text(text, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few pages do not give all the tokens that are asked for
        tokenizer = train_tokenizer(texts, vocab_size=4096)
    torch.manual_seed(0)
    model = Decoder(
        DecoderConfig(
            vocab_size=4096,
            num_layers=1,
            hidden_size=64,
            num_heads=4,
            max_length=128,
            moe=MoEConfig(num_experts=2, ffn_size=64),
            mask=MaskConfig(),
        )
    )
    manifest = save_model(model, folder / "runs" / "quickstart" / "model", tokenizer=tokenizer, metrics={"loss": 8.3})
    int8 = folder / "runs" / "quickstart" / "model-int8"
    save_model(make_int8_(model), int8, tokenizer=tokenizer, parent_digest=manifest.digest)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, home, tmp_path, monkeypatch):
    folder = tmp_path / "home"
    shutil.copytree(home, folder)
    monkeypatch.chdir(folder)
    port = free_port()
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # a compiler looks for globals in the module
    variables = vars(module)
    blocks = [block for block in read_blocks(page) if block.language in RUNNERS and not block.is_skipped]
    assert blocks or page.name == "extending.md"
    for block in blocks:
        RUNNERS[block.language](make_small(block.code, port), f"{page.name}:{block.line}", variables)


def make_small(code, port):
    for said, instead in SMALLER:
        code = code.replace(said, instead.replace("{port}", str(port)))
    return code


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_python(code, where, variables):
    linecache.cache[where] = (len(code), None, code.splitlines(keepends=True), where)  # as in a file, for inspect
    exec(compile(code, where, "exec"), variables)


def run_shell(code, where, variables):
    commands = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{where}\n{code}\n{result.stdout}\n{result.stderr}"


RUNNERS = {"python": run_python, "sh": run_shell}


def test_only_make_commands_are_skipped():
    skipped = [block for page in PAGES for block in read_blocks(page) if block.is_skipped]
    assert skipped
    for block in skipped:
        assert all(shlex.split(line)[0] == "make" for line in block.code.splitlines()), block.code


def test_every_block_says_what_it_is():
    languages = {block.language.partition(" ")[0] for page in ALL_PAGES for block in read_blocks(page)}
    assert languages <= {"sh", "python", "text", "yaml", "console"}


def test_every_row_of_smaller_is_needed():
    code = "".join(block.code for page in PAGES for block in read_blocks(page))
    assert [said for said, _ in SMALLER if said not in code] == []


def test_the_commands_of_make_that_the_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for page in ALL_PAGES:
        named = set(re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8")))
        shell = "".join(block.code for block in read_blocks(page) if block.language == "sh")
        named |= set(re.findall(r"^make ([a-z-]+)", shell, flags=re.MULTILINE))
        assert named <= targets, page


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_of_the_guide_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in GUIDE if f"docs/guide/{page.name}" not in readme] == []


def test_the_readme_can_be_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


def test_the_paths_that_the_pages_name_exist():
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md", ROOT / "docs" / "guide" / "extending.md"):
        for path in re.findall(r"`((?:docs|tests|benchmarks)/[\w/.-]*)`", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), path


def test_the_log_has_dated_entries_by_subject_newest_first():
    page = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    subjects = [section.partition("\n")[0] for section in sections]
    assert len(set(subjects)) == len(subjects) > 5
    for subject, section in zip(subjects, sections, strict=True):
        entries = re.findall(r"^- (.*)", section, flags=re.MULTILINE)
        dates = [re.match(r"(\d{4}-\d{2}-\d{2}) \S", entry) for entry in entries]
        assert entries and all(dates), f"{subject}: each entry begins with its date"
        days = [date[1] for date in dates]
        assert days == sorted(days, reverse=True), f"{subject}: newest first"


# The reference


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_says_what_the_code_says(generate, capsys):
    assert generate.main(["--check"]) == 0, capsys.readouterr().err


def all_configs():
    """Every config but the rows of compat's tables, whose page of the reference is rendered from the data itself."""
    for each in pkgutil.walk_packages(deepseek.__path__, "deepseek."):
        if each.name != "deepseek.__main__":
            importlib.import_module(each.name)
    found, unseen = set(), [Config]
    while unseen:
        children = [each for each in unseen.pop().__subclasses__() if each.__module__.startswith("deepseek.")]
        children = [each for each in children if not each.__module__.startswith("deepseek.compat.")]
        found.update(children)
        unseen += children
    return sorted(found, key=lambda each: each.__name__)


def test_every_config_field_says_what_it_means():
    unexplained = [
        f"{config.__module__}.{config.__name__}.{name}"
        for config in all_configs()
        for name, field in config.model_fields.items()
        if not (field.description or "").strip()
    ]
    assert unexplained == []


def test_every_config_has_its_place_in_the_reference():
    page = (ROOT / "docs" / "reference" / "config.md").read_text(encoding="utf-8")
    for config in all_configs():
        assert f"`{config.__name__}`" in page or config.__subclasses__(), config
        for name in config.model_fields:
            assert re.search(rf"^\| `([\w.]+\.)?{name}` \|", page, flags=re.MULTILINE), (config, name)


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_and_every_parameter_has_help(verb):
    name = verb.replace("-", "_")
    function = getattr(importlib.import_module(f"deepseek.cli.verbs.{name}"), name)
    assert function.__doc__
    assert VERBS[verb].endswith(".")
    arguments = build_app(asked=verb)[verb].assemble_argument_collection(parse_docstring=True)
    assert len(arguments) == len(inspect.signature(function).parameters)
    for argument in arguments:
        assert argument.parameter.help, argument.name


def test_help_lists_every_command(capsys):
    build_app()(["--help"], result_action="return_value")
    shown = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"│ {verb} +\S", shown)


def test_the_readme_tells_every_command_and_every_recipe():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"`deepseek {verb}" in readme
    for recipe in deepseek.recipes.RECIPES:
        assert f"`{recipe}`" in readme


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.search(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)[1]
    assert project["version"] == deepseek.__version__ == released
    assert project["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
