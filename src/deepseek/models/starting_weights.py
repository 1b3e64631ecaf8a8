"""From `init` to the model that a training run begins with: weights that exist, with the outputs that the task needs.

    open_start("runs/model", CAUSAL_LM)                                an artifact
    open_start("folders/bert", HeadSpec("sequence_classification", 4))   a Hugging Face folder, with a new head
    open_start("resnet18", HeadSpec("image_classification", 10))         a name: random weights
    open_start("resnet18", ..., weights="resnet18.safetensors")        a name and weights, torchvision's for example

What comes out is in training mode, in float32, and may be trained in every weight. Tensors of the head that are not in
the file, or have another size there, are new: as the model initializes them, from torch's global generator, and named
in `new_tensors`. Everything else has to fit, and weights that are no numbers are refused by name.

A folder of a ResNet, ViT or MobileNetV3 whose settings ours follows becomes ours; other models of `transformers` are
opened with the class that the task needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from deepseek.artifact.format import CONFIG_NAME, TOKENIZER_NAME, digest_files
from deepseek.artifact.reading import find_model_folder, is_adapter, is_artifact, open_artifact, read_manifest
from deepseek.artifact.verifying import SAFETENSORS_SUFFIX, measure_files, refuse_pickles
from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.core.model_folder import ModelFolder
from deepseek.models import text_zoo, zoo
from deepseek.models.architectures import DECODER, TRANSFORMERS, list_architectures
from deepseek.models.decoder.keymap import FAMILIES, fit_prefix, import_config, import_tensors, tie_as_stored
from deepseek.models.decoder.model import DecoderConfig
from deepseek.models.mobilenet_v3 import keymap as mobilenet_v3_keymap
from deepseek.models.model_sources import (
    KNOWN_NAMES,
    Tensors,
    assemble,
    explain_nothing,
    find_weight_files,
    import_names,
    is_decoder,
    is_huggingface,
    read_weights,
)
from deepseek.models.resnet import keymap as resnet_keymap
from deepseek.models.transformers_models.model import Purpose, start_transformers
from deepseek.models.vit import keymap as vit_keymap
from deepseek.models.weight_loading import NUM_NAMED, fill_, is_int8, strip_wrappers


@dataclass(frozen=True)
class HeadSpec:
    """What the model of a task answers with."""

    purpose: Purpose | Literal["detection"]
    """What the answer is for."""
    num_outputs: int | None = None
    """Classes, or numbers of an answer; none where the model decides."""
    labels: tuple[str, ...] = ()
    """Names of the classes in their order, for models that keep them."""
    settings: Mapping[str, JsonValue] = field(default_factory=dict)
    """Settings of a named model that the task knows better than its defaults: {"vocab_size": 1000}."""
    entries: Mapping[str, JsonValue] = field(default_factory=dict)
    """What a `config.json` says of the task: {"problem_type": "regression", "text_pair": True}."""


CAUSAL_LM = HeadSpec("causal_lm")


@dataclass(frozen=True)
class StartSource:
    """What was asked for: enough to open the same model again."""

    name: str
    """A folder, or the name of a model."""
    head: HeadSpec
    weights: str | None = None
    settings: Mapping[str, JsonValue] = field(default_factory=dict)

    def describe(self) -> dict[str, JsonValue]:
        """Return it as JSON values, folders as whole paths."""
        name = self.name if self.name in KNOWN_NAMES else str(Path(self.name).resolve())
        weights = None if self.weights is None else str(Path(self.weights).resolve())
        described: dict[str, JsonValue] = json.loads(json.dumps(asdict(replace(self, name=name, weights=weights))))
        return described

    def at(self, place: str) -> StartSource:
        """Return the same with its weights at another place."""
        return replace(self, name=place) if self.weights is None else replace(self, weights=place)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StartSource:
        """Return what `describe` described."""
        head = dict(values["head"])
        return cls(**{**values, "head": HeadSpec(**{**head, "labels": tuple(head["labels"])})})


@dataclass(frozen=True, eq=False)
class StartingModel:
    """The model that a run begins with."""

    model: nn.Module
    summary: str
    """The model and the source of its weights, random ones above all."""
    new_tensors: tuple[str, ...] = ()
    """Tensors of the head that are new."""
    parent_digest: str | None = None
    """Digest of the artifact, folder or file that the weights came from; none for random ones."""
    folder: Path | None = None
    """The folder with its tokenizer and other files, if it came from one."""
    source: StartSource = StartSource("", CAUSAL_LM)
    """What was asked for."""


def open_start(
    source: str | Path,
    head: HeadSpec,
    *,
    weights: str | Path | None = None,
    settings: Mapping[str, JsonValue] | None = None,
    allow_int8: bool = False,
) -> StartingModel:
    """Open the model that a run begins with, answering as `head` says.

    `weights` and `settings` go with a name. With `allow_int8`, an int8 decoder is opened as it is, for adapters to be
    trained on. Raises `ConfigError` for an unknown name or a model that the task cannot train, and `ArtifactError` for
    weights that do not fit or are no numbers.
    """
    settings = dict(settings or {})
    asked = StartSource(str(source), head, None if weights is None else str(weights), settings)
    return replace(_open(source, head, weights, settings, allow_int8=allow_int8), source=asked)


def _open(
    source: str | Path,
    head: HeadSpec,
    weights: str | Path | None,
    settings: dict[str, JsonValue],
    *,
    allow_int8: bool,
) -> StartingModel:
    if str(source) in KNOWN_NAMES and isinstance(source, str):
        return _open_name(source, head, None if weights is None else Path(weights), settings)
    for setting, value in (("init_weights", weights), ("init_settings", settings)):
        if value:
            raise ConfigError(f"{source} brings its own weights and shape, and {setting} was given; leave it out")
    path = find_model_folder(source)
    refuse_pickles(path)
    if is_adapter(path):
        raise explain_nothing(source, path)
    if is_artifact(path):
        return _open_artifact(path, head, allow_int8=allow_int8)
    if is_huggingface(path):
        start = _open_huggingface(path, ModelFolder(path).config, read_weights(path), head)
        return replace(start, parent_digest=digest_weights(path), folder=path)
    if path.is_file() and path.suffix == SAFETENSORS_SUFFIX:
        raise ConfigError(
            f"{path} holds weights without a shape; give the model's name as init, and this as init_weights"
        )
    raise explain_nothing(source, path)


def find_tokenizer(source: str | None, weights: str | None) -> Path | None:
    """Return the folder whose tokenizer goes with the model that a run begins with; none where it brings none.

    Raises `ConfigError` or `ArtifactError` where there is nothing of that name, before a tokenizer is trained for it.
    """
    named = weights if source in KNOWN_NAMES else source
    if named is None:
        return None
    folder = find_model_folder(named)
    if not folder.exists():
        raise explain_nothing(named, folder)
    return folder if (folder / TOKENIZER_NAME).is_file() else None


def digest_weights(path: Path) -> str:
    """Return the digest of the model in `path`: an artifact's own, or that of the files which make the model.

    Of a Hugging Face folder these are its weights and `config.json`.
    """
    if path.is_file():
        return digest_files(measure_files(path.parent, (path.name,)))
    if is_artifact(path):
        return read_manifest(path).digest
    names = [file.name for file in find_weight_files(path)]
    return digest_files(measure_files(path, (*names, CONFIG_NAME)))


# ---- the three kinds of sources


def _open_name(name: str, head: HeadSpec, weights: Path | None, settings: dict[str, Any]) -> StartingModel:
    if name not in text_zoo.MODELS:
        _find_head(zoo.family_of(name), head, name)
    settings = dict(head.settings) | settings
    origin = "random weights" if weights is None else f"weights from {weights}"
    tensors = None if weights is None else read_weights(weights)
    if tensors is not None:
        refuse_no_numbers(tensors, weights)
    config = (text_zoo if name in text_zoo.MODELS else zoo).configure(name, **settings)
    summary = f"{name} with {origin}"
    if isinstance(config, dict):
        model, new = start_transformers(
            config,
            tensors,
            head.purpose,
            head.num_outputs,
            head.labels,
            entries=head.entries,
            source=weights or name,
        )
        start = StartingModel(model, summary, new if tensors is not None else ())
    else:
        architecture = DECODER if isinstance(config, DecoderConfig) else zoo.family_of(name)
        start = _start_ours(architecture, config.to_dict(), tensors, head, source=weights or name, summary=summary)
    if weights is None:
        return start
    folder = weights if weights.is_dir() else weights.parent
    return replace(start, parent_digest=digest_weights(weights), folder=folder)


def _open_artifact(folder: Path, head: HeadSpec, *, allow_int8: bool) -> StartingModel:
    artifact = open_artifact(folder)
    manifest, tensors = artifact.manifest, artifact.tensors()
    summary = f"{folder}, an artifact of architecture {manifest.architecture}"
    settings = manifest.architecture_config
    is_for_decoder = head.purpose == CAUSAL_LM.purpose
    if is_int8(tensors):
        if not (allow_int8 and is_for_decoder and manifest.architecture == DECODER):
            raise ConfigError(
                f"the weights of {folder} are int8, which no gradient changes; train an adapter on them "
                "(adapter.rank=8), or begin with the model they were made from"
            )
        model = assemble(DECODER, settings, tensors, source=folder).train()
        return StartingModel(model, f"{summary}, int8", (), manifest.digest, folder)
    if manifest.architecture == TRANSFORMERS or (manifest.layout == "huggingface" and not is_for_decoder):
        values = settings if manifest.architecture == TRANSFORMERS else ModelFolder(folder).config
        start = _open_huggingface(folder, values, tensors, head)
    else:
        if manifest.layout == "huggingface":
            tensors = import_tensors(tensors, FAMILIES[str(ModelFolder(folder).config["model_type"])])
        start = _start_ours(manifest.architecture, settings, tensors, head, source=folder, summary=summary)
    return replace(start, parent_digest=manifest.digest, folder=folder)


def _open_huggingface(folder: Path, values: Mapping[str, Any], tensors: Tensors, head: HeadSpec) -> StartingModel:
    tensors = strip_wrappers(tensors, (), source=folder)
    refuse_no_numbers(tensors, folder)
    if head.purpose == CAUSAL_LM.purpose and is_decoder(values):
        settings, family = import_config(values)
        summary = f"{folder}, a Hugging Face folder as our decoder"
        ours = import_tensors(fit_prefix(tensors, family), family)
        return _start_ours(DECODER, settings.to_dict(), ours, head, source=folder, summary=summary)
    model_type = str(values.get("model_type") or values.get("architecture", ""))
    if model_type in _FOLLOWED_FOLDERS and head.purpose == "image_classification":
        architecture, read_config, read_tensors = _FOLLOWED_FOLDERS[model_type]
        summary = f"{folder}, a Hugging Face folder as our {architecture}"
        config = read_config(values)
        ours = read_tensors(tensors, config)
        return _start_ours(architecture, config.to_dict(), ours, head, source=folder, summary=summary)
    model, new = start_transformers(
        values, tensors, head.purpose, head.num_outputs, head.labels, entries=head.entries, source=folder
    )
    return StartingModel(model, f"{folder}, a {type(model.model).__name__} of transformers", new)


# model_type, or timm's architecture, of a folder -> our architecture, its settings and its tensors.
_FOLLOWED_FOLDERS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any], Callable[[Tensors, Any], Tensors]]] = {
    "resnet": ("resnet", resnet_keymap.import_config, resnet_keymap.import_tensors),
    "vit": ("vit", vit_keymap.import_config, vit_keymap.import_tensors),
    **dict.fromkeys(
        mobilenet_v3_keymap.ARCHITECTURES,
        ("mobilenet_v3", mobilenet_v3_keymap.import_config, mobilenet_v3_keymap.import_tensors),
    ),
}


# ---- models of ours


@dataclass(frozen=True)
class _OurHead:
    """Where an architecture of ours has its outputs."""

    purpose: str
    find: Callable[[Any], str | None] = lambda model: None
    """The path of its module in a model; none where the outputs have one size only."""


_HEADS = {
    DECODER: _OurHead("causal_lm"),
    "resnet": _OurHead("image_classification", lambda model: "fc"),
    "vit": _OurHead("image_classification", lambda model: "heads"),
    "mobilenet_v3": _OurHead("image_classification", lambda model: "classifier.3"),
    "yolov7": _OurHead("detection", lambda model: f"model.{len(model.model) - 1}"),
}


def _find_head(architecture: str, head: HeadSpec, source: str | Path) -> _OurHead:
    """Return where the architecture has its outputs; raises `ConfigError` where they are for something else."""
    ours = _HEADS.get(architecture, _OurHead("nothing"))
    if ours.purpose != head.purpose:
        fitting = [name for name, other in _HEADS.items() if other.purpose == head.purpose] or ["transformers"]
        raise ConfigError(
            f"{source} is a model of architecture {architecture} and this task trains one for {head.purpose}; "
            f"give one of {', '.join(fitting)}"
        )
    return ours


def _start_ours(
    architecture: str,
    settings: Mapping[str, Any],
    tensors: Tensors | None,
    head: HeadSpec,
    *,
    source: str | Path,
    summary: str,
) -> StartingModel:
    """Build a model of ours with random weights, and take over what `tensors` hold."""
    ours = _find_head(architecture, head, source)
    settings = dict(settings)
    if head.num_outputs is not None and "num_classes" in settings:
        settings["num_classes"] = head.num_outputs
    if "labels" in settings and (head.labels or len(settings["labels"]) != settings["num_classes"]):
        settings["labels"] = head.labels
    if tensors is not None and architecture == DECODER:
        settings = tie_as_stored(DecoderConfig.from_dict(settings), tensors).to_dict()
    model = list_architectures()[architecture].build(settings).train()
    if tensors is None:
        return StartingModel(model, summary)
    known = set(model.state_dict())
    tensors = strip_wrappers(tensors, known, source=Path(source))
    if not set(tensors) <= known:
        tensors = import_names(model, tensors)
    refuse_no_numbers(tensors, source)
    return StartingModel(model, summary, take_over_(model, tensors, ours.find(model), source=source))


def take_over_(model: nn.Module, tensors: Tensors, head: str | None, *, source: str | Path) -> tuple[str, ...]:
    """Give `model`, in place, the values of `tensors`; return the names below `head` that stay as they are.

    Those are not in `tensors` or have another shape there. Raises `ArtifactError` where anything else does not fit.
    """
    expected = model.state_dict()
    new = tuple(
        name
        for name, tensor in expected.items()
        if head and name.startswith(f"{head}.") and (name not in tensors or tensors[name].shape != tensor.shape)
    )
    values = {name: tensor for name, tensor in tensors.items() if name not in new}
    # Copies, since the tensors lie in a file that the run may replace.
    values = {
        name: tensor.to(expected[name].dtype, copy=True) if name in expected else tensor
        for name, tensor in values.items()
    }
    fill_(model, values | {name: expected[name] for name in new}, None, source=source)
    return new


def refuse_no_numbers(tensors: Mapping[str, Tensor], source: str | Path | None) -> None:
    """Raise `ArtifactError`, naming them, where tensors hold NaN or infinity."""
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        more = f" and {len(bad) - NUM_NAMED} more" if len(bad) > NUM_NAMED else ""
        raise ArtifactError(
            f"the weights in {source} hold NaN or infinity in {', '.join(bad[:NUM_NAMED])}{more}; "
            "begin with weights that were saved before their training went wrong"
        )
