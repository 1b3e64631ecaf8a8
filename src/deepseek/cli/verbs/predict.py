"""`deepseek predict`: what a model finds in images or texts, as a table, as JSON, or as boxes drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from deepseek.models.loaded_model import LoadedModel
    from deepseek.models.predictions import Objects

_NUM_SHOWN = 6  # numbers of a vector on the screen; --json has all


def predict(
    model: str,
    /,
    *inputs: str,
    weights: Path | None = None,
    backend: str | None = None,
    pair: list[str] | None = None,
    context: Path | None = None,
    out: Path | None = None,
    min_score: float = 0.25,
    max_overlap: float = 0.45,
    json: bool = False,
) -> None:
    """Say what MODEL finds in each INPUT: the classes of an image or a text, the boxes of a detector, a text's vector.

    A model for question answering takes questions, and finds their answers in the text of --context.

    Texts are given in quotes; without INPUT each line of standard input is one. A model that was trained on pairs takes
    the second text of each INPUT as --pair, or behind a tab in its line. `deepseek generate` continues texts.

    Example: deepseek predict yolov7 street.jpg --weights yolov7.safetensors --out boxes

    Parameters
    ----------
    model
        Name of the zoo (yolov7, resnet50), or the folder of an artifact or a Hugging Face model.
    inputs
        Image files for a model of images, texts for a model of texts; lines of standard input where none is given.
    weights
        Trained weights for a model that is given by name: a safetensors file or a model folder.
    backend
        Who runs it: auto measures what is fastest here; none is torch.
    pair
        Second text of an INPUT, for a model of pairs; given once for each INPUT, in their order.
    context
        Text file in which the answers to questions are.
    out
        Folder for a copy of each image with its boxes drawn.
    min_score
        Boxes count from this score on, between 0 and 1.
    max_overlap
        Of boxes of one class that overlap by more than this share, the best one counts.
    json
        Print a JSON object for each input, one in a line.
    """
    from deepseek.core.errors import ConfigError
    from deepseek.models.loading import load_model
    from deepseek.models.predictions import find_task, takes_pairs

    loaded = load_model(model, {"backend": backend, "weights": weights})
    given = list(inputs)
    if not given and not sys.stdin.isatty():
        given = [line.rstrip("\r\n") for line in sys.stdin]
        if takes_pairs(loaded.module) and pair is None:
            given, pair = _split_pairs(given)
    if not given:
        raise ConfigError("nothing was given to look at; name image files, or texts in quotes, after the model")
    task = find_task(loaded.module)
    if out is not None and task != "detect":
        raise ConfigError(f"--out is for boxes, and {model} finds none; leave it out")
    if (task == "answer") != (context is not None):
        needed = "needs --context FILE, the text it" if task == "answer" else "takes no --context, since it never"
        raise ConfigError(f"{model} {needed} finds answers in")
    if pair is not None and task not in ("classify", "estimate"):
        raise ConfigError(f"{model} takes no --pair, since it compares no texts; leave it out")
    names = given if pair is None else [f"{one} | {two}" for one, two in zip(given, pair, strict=False)]
    if task == "detect":
        found = loaded.detect(given, min_score=min_score, max_overlap=max_overlap)
        _show_objects(given, found, as_json=json)
        if out is not None:
            _draw(given, found, out)
    elif task == "embed":
        _show_vectors(given, loaded.embed(given), as_json=json)
    elif context is not None:
        _show_answers(given, loaded, context, as_json=json)
    elif task == "estimate":
        _show_numbers(names, loaded.estimate(given, pair), as_json=json)
    else:
        _show_classes(names, loaded.classify(given, pair), as_json=json)


def _split_pairs(lines: list[str]) -> tuple[list[str], list[str]]:
    """Split lines at their tab; raises `ConfigError` for a line without one, or with more."""
    from deepseek.core.errors import ConfigError

    for number, line in enumerate(lines, start=1):
        if line.count("\t") != 1:
            raise ConfigError(
                f"line {number} has {line.count(chr(9))} tabs, and the model takes pairs; put one tab between two texts"
            )
    pairs = [line.split("\t") for line in lines]
    return [one for one, _ in pairs], [two for _, two in pairs]


def _show_objects(inputs: list[str], found: list[Objects], *, as_json: bool) -> None:
    rows: list[tuple[str, ...]] = []
    for name, objects in zip(inputs, found, strict=True):
        boxes = [[round(number, 1) for number in box] for box in objects.boxes_N4.tolist()]
        seen = list(zip(objects.labels, objects.scores_N.tolist(), boxes, strict=True))
        if as_json:
            _print({"input": name, "objects": [{"label": one, "score": two, "box": box} for one, two, box in seen]})
        rows += [(name, label, f"{score:.2f}", " ".join(f"{x:.0f}" for x in box)) for label, score, box in seen]
        rows += [] if seen else [(name, "nothing", "", "")]
    if not as_json:
        _show_table("Objects", ("input", "object", "score", "left top right bottom"), rows)


def _show_classes(inputs: list[str], found: list[list[tuple[str, float]]], *, as_json: bool) -> None:
    rows: list[tuple[str, ...]] = []
    for name, classes in zip(inputs, found, strict=True):
        if as_json:
            _print({"input": name, "classes": [{"label": label, "probability": share} for label, share in classes]})
        rows += [(name, label, f"{share:.1%}") for label, share in classes]
    if not as_json:
        _show_table("Classes", ("input", "class", "probability"), rows)


def _show_answers(inputs: list[str], loaded: LoadedModel, context: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from deepseek.core.storage import explained_storage

    with explained_storage(context):
        text = context.read_text(encoding="utf-8", errors="replace")
    rows: list[tuple[str, ...]] = []
    for question in inputs:
        found = loaded.answer(question, text)
        if as_json:
            _print({"input": question, "answer": asdict(found)})
        rows.append((question, found.text, f"{found.score:.2f}"))
    if not as_json:
        _show_table("Answers", ("question", "answer", "above no answer by"), rows)


def _show_numbers(inputs: list[str], numbers: list[float], *, as_json: bool) -> None:
    if as_json:
        for name, number in zip(inputs, numbers, strict=True):
            _print({"input": name, "number": number})
    else:
        rows: list[tuple[str, ...]] = [(name, f"{number:.4g}") for name, number in zip(inputs, numbers, strict=True)]
        _show_table("Numbers", ("input", "number"), rows)


def _show_vectors(inputs: list[str], vectors_ND: Tensor, *, as_json: bool) -> None:
    rows: list[tuple[str, ...]] = []
    for name, vector in zip(inputs, vectors_ND.tolist(), strict=True):
        if as_json:
            _print({"input": name, "embedding": vector})
        rows.append((name, str(len(vector)), " ".join(f"{number:.3f}" for number in vector[:_NUM_SHOWN]) + " ..."))
    if not as_json:
        _show_table("Vectors", ("input", "numbers", "the first of them"), rows)


def _draw(inputs: list[str], found: list[Objects], folder: Path) -> None:
    from deepseek.core.errors import ConfigError
    from deepseek.core.storage import explained_storage
    from deepseek.data.images import read_image, save_with_boxes

    paths = [folder / f"{Path(name).stem}-boxes.png" for name in inputs]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"two of the images have one name, which {folder} can hold only once; rename one of them")
    with explained_storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, objects, path in zip(inputs, found, paths, strict=True):
        scores = objects.scores_N.tolist()
        captions = [f"{label} {score:.2f}" for label, score in zip(objects.labels, scores, strict=True)]
        save_with_boxes(read_image(name), objects.boxes_N4, captions, path, kinds=objects.classes_N.tolist())
        sys.stderr.write(f"{path}\n")


def _print(values: dict[str, Any]) -> None:
    from json import dumps

    sys.stdout.write(dumps(values) + "\n")


def _show_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from deepseek.cli.screen.tables import show_table

    show_table(title, header, rows)
