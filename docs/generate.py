"""Writes `docs/reference/` from the code: every setting with its type, default and meaning, and every command's help.

    python docs/generate.py            write the pages (`make docs`)
    python docs/generate.py --check    write nothing; exit status 1 where a page is not what the code says

What a setting or an option means is said once, in the string under the field or in the docstring of the command; these
pages, `--help` and the errors all read it from there. `tests/test_docs.py` fails when a page is out of date.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AwareDatetime, JsonValue
from pydantic.fields import FieldInfo

from deepseek.artifact.format import FileRecord, Manifest
from deepseek.bench.comparison import BenchConfig
from deepseek.cli import VERBS, build_app
from deepseek.compat.generations import load_table
from deepseek.compat.migration.rules import load_rules
from deepseek.compress.quality import Comparison
from deepseek.core.config import Config
from deepseek.data.config import (
    AugmentationConfig,
    BoxAugmentationConfig,
    BoxesConfig,
    ChatConfig,
    DataConfig,
    ImagesConfig,
    SamplesConfig,
    TableConfig,
)
from deepseek.data.token_cache import CacheManifest, StoredFile
from deepseek.models.decoder.model import DecoderConfig
from deepseek.models.mobilenet_v3.model import MobileNetV3Config
from deepseek.models.model_sources import LoadConfig
from deepseek.models.resnet.model import ResNetConfig
from deepseek.models.vit.model import ViTConfig
from deepseek.models.yolov7.model import YOLOv7Config
from deepseek.models.yolov7.training_loss import DetectionLossConfig
from deepseek.nn.lora import LoRAConfig
from deepseek.nn.masks import MaskConfig
from deepseek.nn.moe import MoEConfig
from deepseek.nn.rotary import RopeScaling
from deepseek.optim.gradient_prediction import GradientPredictionConfig
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.serve.config import EngineConfig, ServeConfig
from deepseek.train.config import StoppingConfig, TrainConfig
from deepseek.train.task_settings import (
    CausalLMSettings,
    DetectionSettings,
    DistillationSettings,
    ImageClassificationSettings,
    MaskedLMSettings,
    QuestionAnsweringSettings,
    SentenceEmbeddingSettings,
    SequenceClassificationSettings,
)

# Its neighbor is found also when this file is loaded by its path, as a test does.
sys.path.insert(0, str(Path(__file__).parent))
from rendering import render_generations, render_rules

FOLDER = Path(__file__).parent / "reference"

# Heading, config, and the path that leads to its settings on a command line.
SETTINGS: tuple[tuple[str, type[Config], str], ...] = (
    ("A training run", TrainConfig, ""),
    ("The model", DecoderConfig, "model."),
    ("Its experts", MoEConfig, "model.moe."),
    ("Its attention mask", MaskConfig, "model.mask."),
    ("Its rotary angles", RopeScaling, "model.rope_scaling."),
    ("A ResNet of the zoo", ResNetConfig, ""),
    ("A MobileNetV3 of the zoo", MobileNetV3Config, ""),
    ("A vision transformer of the zoo", ViTConfig, ""),
    ("A YOLOv7 of the zoo", YOLOv7Config, ""),
    ("Its adapter", LoRAConfig, "adapter."),
    ("Its end", StoppingConfig, "stopping."),
    ("Text as data", DataConfig, "data."),
    ("Samples as data", SamplesConfig, "data."),
    ("Images as data", ImagesConfig, "data."),
    ("Their augmentation", AugmentationConfig, "data.augmentation."),
    ("Images with boxes as data", BoxesConfig, "data."),
    ("Their random changes", BoxAugmentationConfig, "data.augmentation."),
    ("Tables as data", TableConfig, "data."),
    ("Chats as data", ChatConfig, "data."),
    ("The task of language models", CausalLMSettings, "task."),
    ("The task of masked language models", MaskedLMSettings, "task."),
    ("The task of text classifiers", SequenceClassificationSettings, "task."),
    ("The task of question answering", QuestionAnsweringSettings, "task."),
    ("The task of sentence encoders", SentenceEmbeddingSettings, "task."),
    ("A task with a teacher", DistillationSettings, "task."),
    ("The task of image classifiers", ImageClassificationSettings, "task."),
    ("The task of detectors", DetectionSettings, "task."),
    ("Its loss", DetectionLossConfig, "task.loss."),
    ("The optimizer", OptimizerConfig, "optimizer."),
    ("Gradient prediction", GradientPredictionConfig, "optimizer.gradient_prediction."),
    ("Loading a model", LoadConfig, ""),
    ("A benchmark", BenchConfig, ""),
    ("The engine", EngineConfig, ""),
    ("The server", ServeConfig, ""),
)
# What deepseek writes and nobody sets.
RECORDS: tuple[tuple[str, type[Config], str], ...] = (
    ("The manifest of an artifact", Manifest, ""),
    ("A file in a manifest", FileRecord, ""),
    ("The report of `quantize`", Comparison, ""),
    ("The manifest of a token cache", CacheManifest, ""),
    ("A file in a token cache", StoredFile, ""),
)
_SHOWN = [config for _, config, _ in (*SETTINGS, *RECORDS)]
_NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    type(None): "none",
    AwareDatetime: "time with a zone",
    JsonValue: "any JSON value",
}
_BOUNDS = {
    annotated_types.Ge: ("ge", "at least"),
    annotated_types.Gt: ("gt", "above"),
    annotated_types.Le: ("le", "at most"),
    annotated_types.Lt: ("lt", "below"),
}


def main(arguments: list[str]) -> int:
    """Write or check the pages; returns the exit status."""
    pages = {
        FOLDER / "config.md": write_config_page(),
        FOLDER / "cli.md": write_cli_page(),
        FOLDER / "generations.md": render_generations(load_table()),
        FOLDER / "migration-rules.md": render_rules(load_rules()),
    }
    if "--check" not in arguments:
        for path, text in pages.items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path} is not what the code says; run `make docs`", file=sys.stderr)
    return 1 if stale else 0


def write_config_page() -> str:
    """The page of all settings."""
    lines = [
        "# Settings",
        "",
        "Generated by `make docs`. A run is one `TrainConfig`; what is nested in it is reached with dots, in a file as",
        "nested mappings, on the command line as `--set optimizer.weight_decay=0.1`. An unknown name is refused.",
        "",
    ]
    for heading, config, prefix in SETTINGS:
        lines += _section(heading, config, prefix)
    lines += ["# Records", "", "What is written beside a model or printed as JSON; nobody sets these.", ""]
    for heading, config, prefix in RECORDS:
        lines += _section(heading, config, prefix)
    return "\n".join(lines).rstrip() + "\n"


def write_cli_page() -> str:
    """The page of all commands, as cyclopts writes it from their docstrings."""
    lines = [
        "# Commands",
        "",
        "Generated by `make docs`. `deepseek-serve` is `deepseek serve` under a name of its own. Exit status: 0 done,",
        "1 failed, 2 wrong usage, 130 stopped with Ctrl-C, 143 stopped with SIGTERM (a server ends with 0).",
        "",
    ]
    for verb in VERBS:
        with _started_as("deepseek"):
            sections = build_app(asked=verb).generate_docs().split("\n## ")
        (section,) = (each for each in sections if each.startswith(f"deepseek {verb}\n"))
        lines += [f"## {section.strip()}", ""]
    return "\n".join(lines).rstrip() + "\n"


@contextmanager
def _started_as(name: str) -> Iterator[None]:
    """Let cyclopts, which writes how a process was started into usages, find `name` there."""
    arguments, sys.argv = sys.argv, [name]
    try:
        yield
    finally:
        sys.argv = arguments


def _section(heading: str, config: type[Config], prefix: str) -> list[str]:
    summary = " ".join((config.__doc__ or "").partition("\n\n")[0].split())
    parents = [parent for parent in _SHOWN if parent is not config and issubclass(config, parent)]
    inherited = {name for parent in parents for name in parent.model_fields}
    if parents:
        summary += f" Everything in `{parents[0].__name__}`, and:"
    rows = [_row(prefix + name, field) for name, field in config.model_fields.items() if name not in inherited]
    table = ["| name | type | default | meaning |", "|---|---|---|---|", *rows]
    return [f"## {heading}: `{config.__name__}`", "", summary, "", *table, ""]


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _type(field), _default(field), " ".join((field.description or "").split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(field: FieldInfo) -> str:
    bounds = [_bound(each) for each in field.metadata]
    return ", ".join([_describe(field.annotation), *(each for each in bounds if each)])


def _bound(constraint: Any) -> str:
    attribute, words = _BOUNDS.get(type(constraint), ("", ""))
    return f"{words} {getattr(constraint, attribute):g}" if attribute else ""


def _describe(annotation: Any) -> str:
    """A type in words: `int | None` is `integer or none`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(each) for each in arguments)
    if origin is tuple:
        first = _describe(arguments[0])
        return f"list of {first}" if Ellipsis in arguments else f"list of {len(arguments)} {first}s"
    if origin is dict:
        return f"mapping to {_describe(arguments[1])}"
    if origin is Annotated:
        return _describe(arguments[0])
    return _NAMES.get(annotation, f"`{getattr(annotation, '__name__', annotation)}`")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        return f"its own, see `{type(value).__name__}`"
    return "none" if value is None else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
