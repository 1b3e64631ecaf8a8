"""Questions about Python's standard library, with answers that stand in its docstrings: data for `bert_answers`.

    compose_questions(Path("questions"))     questions/train.jsonl, questions/heldout.jsonl

The source files of the running Python are parsed, not imported. Each public function, method and class with a
docstring is an entry, `name(signature): prose`, and `ENTRIES_PER_PASSAGE` entries of one module that follow each other
are a passage. Rules ask what an entry does, what it returns, and which default a parameter has. The answer is a piece
of the entry, and the entries around it have such pieces, too, so the name in the question has to be found in the
passage, and the right piece behind it. People would ask otherwise: a model that learned this has learned to look things
up, and a rule that knows these rules would answer everything.

Modules are held out whole, by the hash of their names that also parts the text a model is pretrained on. Where the same
first sentence stands in both parts, as in copies of a class, the training entry is left out.
"""

from __future__ import annotations

import ast
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.core.errors import DataError
from deepseek.core.storage import new_folder
from deepseek.data.sources import STDLIB, Corpus
from deepseek.train.scores import score_mean, score_share
from deepseek.train.tasks.question_answering import normalize, overlap

HELDOUT_FRACTION = 0.1
ENTRIES_PER_PASSAGE = 3
MOST_QUESTIONS = 3
"""Questions about one entry; more would repeat the passage."""
MOST_ENTRY_WORDS = 36
MOST_ANSWER_WORDS = 16

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_RETURNS = re.compile(r"\breturns?\s+(.+)", re.IGNORECASE)
_NO_PROSE = re.compile(r">>>|^\s*[-*:.]|^\s{2,}|:\s*\Z", re.MULTILINE)  # examples, lists, and what leads to them
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class DocstringEntry:
    """One function, method or class with its documentation."""

    name: str
    signature: str
    prose: str
    defaults: tuple[tuple[str, str], ...] = ()
    """Parameters with their defaults, as the signature has them."""
    is_class: bool = False
    """Whether this is a class."""

    @property
    def text(self) -> str:
        """The entry as a passage has it."""
        return f"{self.name}({self.signature}): {self.prose}"

    @property
    def first_sentence(self) -> str:
        """What the prose begins with."""
        return _SENTENCE_END.split(self.prose)[0]


@dataclass(frozen=True)
class DocstringQuestion:
    """A question about an entry, and where in the entry's text its answer begins."""

    text: str
    answer: str
    begin: int


def compose_questions(folder: Path, *, sources: tuple[str, ...] = (STDLIB,), seed: int = 0) -> None:
    """Compose the questions as the new `folder`, with `train.jsonl` and `heldout.jsonl` in SQuAD's form.

    An older folder is replaced. `sources` may also be folders or globs of Python files of your own. The same files and
    seed give the same questions. Raises `DataError` for a file that is not Python.
    """
    train, heldout = (_read_modules(part) for part in Corpus(sources).split(HELDOUT_FRACTION))
    known = {entry.first_sentence for entries in heldout.values() for entry in entries}
    unknown = {name: [entry for entry in train[name] if entry.first_sentence not in known] for name in train}
    with new_folder(folder) as temporary:
        for part, modules in (("train", unknown), ("heldout", heldout)):
            rows = [row for name in sorted(modules) for row in compose_rows(name, modules[name], _start(seed, name))]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (temporary / f"{part}.jsonl").write_text(lines, encoding="utf-8")


def _start(seed: int, module: str) -> np.random.Generator:
    """Return the random numbers of a module, which no other module changes."""
    return np.random.Generator(np.random.PCG64([seed, zlib.crc32(module.encode())]))


def _choose(wordings: Sequence[str], random: np.random.Generator) -> str:
    return wordings[int(random.integers(len(wordings)))]


def _read_modules(corpus: Corpus) -> dict[str, list[DocstringEntry]]:
    modules = {}
    for document in corpus:
        if document.name.endswith(".py"):
            try:
                modules[document.name] = list(read_entries(document.text))
            except SyntaxError as error:
                raise DataError(
                    f"{document.name} is not Python {sys.version_info.major}: {error}; leave it out of the sources"
                ) from error
    return modules


def read_entries(source: str) -> Iterator[DocstringEntry]:
    """Yield the documented public functions, classes and methods of a module, in its order.

    >>> [entry.text for entry in read_entries('def half(x, digits=2):\\n    "Return half of x."')]
    ['half(x, digits=2): Return half of x.']
    """
    for node, name in _walk(ast.parse(source)):
        prose = _read_prose(ast.get_docstring(node) or "")
        if len(prose.split()) < 3:
            continue
        function, is_class = _find_function(node), isinstance(node, ast.ClassDef)
        parameters, defaults = ("", ()) if function is None else _read_parameters(function.args)
        yield DocstringEntry(name, parameters, prose, defaults, is_class)


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _walk(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[Definition, str]]:
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield child, prefix + child.name
            if isinstance(child, ast.ClassDef):
                yield from _walk(child, f"{prefix}{child.name}.")


def _find_function(node: Definition) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return what is called: the function itself, or the constructor of a class that has one."""
    if not isinstance(node, ast.ClassDef):
        return node
    found = [child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"]
    return found[0] if found else None


def _read_parameters(arguments: ast.arguments) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the signature without `self` and annotations, and the simple defaults in it."""
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    values = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [(name, value) for name, value in zip(positional, values, strict=True) if name not in ("self", "cls")]
    parts = [_write_parameter(name, value) for name, value in pairs]
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    keywords = list(zip((argument.arg for argument in arguments.kwonlyargs), arguments.kw_defaults, strict=True))
    parts += [_write_parameter(name, value) for name, value in keywords]
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    simple = ast.Constant | ast.Name | ast.Attribute
    defaults = tuple((name, ast.unparse(value)) for name, value in (*pairs, *keywords) if isinstance(value, simple))
    return ", ".join(parts), defaults


def _write_parameter(name: str, value: ast.expr | None) -> str:
    return name if value is None else f"{name}={ast.unparse(value)}"


def _read_prose(docstring: str) -> str:
    """Return the sentences of the paragraphs without examples and lists, up to a number of words."""
    paragraphs = [part for part in docstring.split("\n\n") if not _NO_PROSE.search(part)]
    sentences = [
        sentence for part in paragraphs for sentence in _SENTENCE_END.split(" ".join(part.split())) if sentence
    ]
    kept, num_words = [], 0
    for sentence in sentences:
        num_words += len(sentence.split())
        if num_words > MOST_ENTRY_WORDS:
            break
        kept.append(sentence)
    return " ".join(kept)


def compose_rows(
    module: str, entries: Sequence[DocstringEntry], random: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Yield rows with `question`, `context` and `answers`, of passages of entries that follow each other."""
    for start in range(0, len(entries) - ENTRIES_PER_PASSAGE + 1, ENTRIES_PER_PASSAGE):
        passage = entries[start : start + ENTRIES_PER_PASSAGE]
        if len({entry.name for entry in passage}) < len(passage):
            continue  # a property and its setter: the name would not say which
        context = "\n".join(entry.text for entry in passage)
        begins = [sum(len(before.text) + 1 for before in passage[:number]) for number in range(len(passage))]
        for begin, entry in zip(begins, passage, strict=True):
            questions = ask(entry, random)
            for number in random.permutation(len(questions))[:MOST_QUESTIONS]:
                question = questions[number]
                answers = {"text": [question.answer], "answer_start": [begin + question.begin]}
                yield {"module": module, "question": question.text, "context": context, "answers": answers}


def ask(entry: DocstringEntry, random: np.random.Generator) -> list[DocstringQuestion]:
    """Return every question that the rules find in an entry.

    >>> entry = DocstringEntry("half", "x, digits=2", "Return half of x.", (("digits", "2"),))
    >>> [question.answer for question in ask(entry, np.random.default_rng(0))]
    ['half of x', '2']
    """
    questions = [*_ask_purpose(entry, random), *_ask_defaults(entry, random)]
    return [question for question in questions if len(question.answer.split()) <= MOST_ANSWER_WORDS]


def _ask_purpose(entry: DocstringEntry, random: np.random.Generator) -> Iterator[DocstringQuestion]:
    name, prose_begin = entry.name, len(entry.text) - len(entry.prose)
    returned = _RETURNS.match(entry.first_sentence)
    if returned is None:
        opening = "What is {}?" if entry.is_class else "What does {} do?"
        text = _choose([opening, "What is {} for?", "What is the purpose of {}?"], random).format(name)
        yield DocstringQuestion(text, entry.first_sentence.rstrip(".:"), prose_begin)
    else:
        text = _choose([f"What does {name} return?", f"What is the result of {name}?"], random)
        yield DocstringQuestion(text, returned[1].rstrip(".:"), prose_begin + returned.start(1))


def _ask_defaults(entry: DocstringEntry, random: np.random.Generator) -> Iterator[DocstringQuestion]:
    for parameter, value in entry.defaults:
        text = _choose(
            [
                f"What is the default of {parameter} in {entry.name}?",
                f"Which value has {parameter} of {entry.name} without being given?",
            ],
            random,
        )
        written = re.search(rf"(?<![\w*]){re.escape(parameter)}={re.escape(value)}", entry.text)
        assert written is not None
        yield DocstringQuestion(text, value, written.end() - len(value))


def measure_baselines(folder: Path) -> dict[str, dict[str, float]]:
    """Return exact match and F1 on `heldout.jsonl` of two ways to answer without learning.

    Both answer with the first sentence of an entry: `first_entry` of the first one in the passage, `nearest_entry` of
    the one with the highest TF-IDF similarity to the question.
    """
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    entries = {row["context"]: row["context"].split("\n") for row in rows}
    find_nearest = _build_nearest([entry for passage in entries.values() for entry in passage])
    first = [entries[row["context"]][0] for row in rows]
    nearest = [find_nearest(row["question"], entries[row["context"]]) for row in rows]
    return {"first_entry": _score(rows, first), "nearest_entry": _score(rows, nearest)}


def _score(rows: Sequence[dict[str, Any]], chosen: Sequence[str]) -> dict[str, float]:
    """Return the scores of the first sentences of the entries that were chosen for the questions."""
    found = [_SENTENCE_END.split(entry.split("): ", 1)[1])[0] for entry in chosen]
    wanted = [row["answers"]["text"][0] for row in rows]
    matches = [normalize(answer) == normalize(right) for answer, right in zip(found, wanted, strict=True)]
    overlaps = np.array([overlap(answer, right) for answer, right in zip(found, wanted, strict=True)])
    return score_share("exact_match", sum(matches), len(matches)) | score_mean("f1", overlaps)


def _build_nearest(entries: Sequence[str]) -> Callable[[str, Sequence[str]], str]:
    """Return a function that finds the entry with the highest TF-IDF similarity to a question, by sets of words."""
    counts = Counter(word for entry in entries for word in _words(entry))
    weights = {word: math.log((len(entries) + 1) / (count + 1)) ** 2 for word, count in counts.items()}

    def similarity(question: set[str], entry: str) -> float:
        words = _words(entry)
        return sum(weights[word] for word in words & question) / math.sqrt(sum(weights[word] for word in words) or 1.0)

    return lambda question, among: max(among, key=lambda entry: similarity(_words(question), entry))


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
