"""What `load_model` can be given, and the model that is there: a name, a folder, a file.

    "resnet50", "bert-base"     a shape from the zoo (`zoo.py`) or of a text model (`text_zoo.py`), with random weights
    a folder                    an artifact of ours, a Hugging Face folder, or a TensorFlow SavedModel
    a file                      .onnx, or .pb and .tflite of TensorFlow

`open_source` decides which it is by looking, once, and gives an `Opened`: a module, or for what only a runtime can run
a `Program`; sample inputs; and a sentence that says what it is, random weights above all. A name is a name: a folder
called `gpt2` is given as `./gpt2`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import Field, JsonValue, field_validator
from torch import Tensor, nn

from deepseek.artifact.format import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    is_plain_name,
)
from deepseek.artifact.reading import (
    find_model_folder,
    is_adapter,
    is_artifact,
    open_artifact,
    read_manifest,
    read_tensor_file,
    read_tensors,
)
from deepseek.artifact.verifying import SAFETENSORS_SUFFIX, refuse_pickles
from deepseek.core.caller_warnings import warn_caller
from deepseek.core.config import Config
from deepseek.core.errors import ArtifactError, ConfigError, CorruptArtifactError, first_line
from deepseek.core.model_folder import ModelFolder, check_sizes, read_settings
from deepseek.core.names import explain_unknown
from deepseek.models import text_zoo, zoo
from deepseek.models.architectures import DECODER, OWN, TRANSFORMERS, list_architectures
from deepseek.models.decoder.keymap import (
    FAMILIES,
    find_family,
    fit_prefix,
    import_config,
    import_tensors,
    tie_as_stored,
)
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loaded_model import plain_module
from deepseek.models.mobilenet_v3 import keymap as mobilenet_v3_keymap
from deepseek.models.mobilenet_v3.model import MobileNetV3
from deepseek.models.programs import SAVED_MODEL_NAME, Program, find_tensorflow, run_tensorflow
from deepseek.models.resnet import keymap as resnet_keymap
from deepseek.models.resnet.model import ResNet
from deepseek.models.transformers_models.model import TransformersModel, is_transformers_class, read_transformers
from deepseek.models.transformers_models.pooling import POOLING_CONFIG_NAME
from deepseek.models.vit import keymap as vit_keymap
from deepseek.models.vit.model import ViT
from deepseek.models.weight_loading import PRECISIONS, build_without_values, fill_, is_int8, strip_wrappers
from deepseek.nn.quantized import replace_with_int8_
from deepseek.onnx.files import ONNX_SUFFIX, read_onnx
from deepseek.onnx.open_lengths import import_with_lengths
from deepseek.onnx.sample_inputs import InputSpec, build_inputs, describe_inputs, list_open

INT8_KEPT = ("gate", "refine", "far_gate")  # routers and gates of the mask: small, and they decide
"""Layers of a decoder that stay in float when the others become int8."""

Tensors = dict[str, Tensor]


class ModelParallel(Config):
    """Over how many ranks a model is spread, as configurations of generation 3.x say it."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that cut each layer."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Stages that hold some of the layers each."""


class LoadConfig(Config):
    """Settings of `load_model`."""

    precision: str = "auto"
    """`fp32`, `fp16`, `bf16`, `int8`; `auto` keeps that of the weights, or with a backend lets measurement choose."""
    batch_size: int = Field(default=1, ge=1)
    """Rows of the sample inputs that a backend is measured with."""
    backend: str | None = None
    """Who runs the model, a member of `BackendSelector` or its name; none gives the plain module."""
    sequence_length: int = Field(default=128, ge=1)
    """Tokens of the sample inputs of a text model."""
    shapes: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """Shapes of sample inputs by name, where a file leaves lengths open: {"images": [1, 3, 320, 320]}."""
    samples: str | None = None
    """An .npz file with inputs as they will come: an array [N, ...] for each input, in the model's order, `labels`
    aside. Backends are measured with them, compared on them, and calibrated for int8. None draws them at random, and
    then `auto` leaves int8 alone."""
    weights: str | None = None
    """A safetensors file or a model folder with trained weights for a model that is given by name."""
    base: str | None = None
    """Folder of the model that an adapter was trained on; none is where the adapter says."""
    overrides: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings of a named model that are changed: {"num_classes": 10}."""
    time_budget_s: float = Field(default=60.0, gt=0)
    """Longest time that measuring backends may take, in seconds."""
    tolerance: float | None = Field(default=None, gt=0)
    """Largest relative error of a backend's answer against FP32; none is the default of each precision."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Ranks that cut each layer, under a launcher such as torchrun."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Stages that hold some of the layers each, one after the other over those ranks."""
    model_parallel: ModelParallel | None = None
    """The same two sizes in one table, as older configurations have them."""
    device_map: JsonValue = None
    """Devices of the ranks in their order: {"gpu0": [0, 1], "gpu1": [2, 3]}. Without sizes each group is a stage."""

    @field_validator("precision", mode="before")
    @classmethod
    def _know_precision(cls, value: Any) -> Any:
        known = ["auto", *PRECISIONS.values()]
        if value is None:
            return "auto"
        if value not in known:
            raise ValueError(explain_unknown("precision", str(value), known))
        return value

    @field_validator("backend", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("weights", "samples", "base", mode="before")
    @classmethod
    def _say_path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class Opened:
    """A source that was opened: the model, and how to try it."""

    summary: str
    """The model and the source of its weights, in one sentence."""
    model: nn.Module | Program
    draw_inputs: Callable[[LoadConfig], tuple[Tensor, ...]]
    """Sample inputs for a config."""
    name: str
    """The name for messages and reports."""
    folder: Path | None = None
    """Where its tokenizer and other files are."""


def open_source(source: str | Path, config: LoadConfig, *, verify: bool = True) -> Opened:
    """Return the model that `source` names, in evaluation mode on the CPU, with its weights as they are stored.

    Raises `ConfigError` for an unknown name, `ArtifactError` for a path where no model is, and what reading raises.
    """
    if isinstance(source, str) and source in KNOWN_NAMES:
        return _open_name(source, config)
    path = find_model_folder(source)
    refuse_named_settings(path, config)
    refuse_pickles(path)
    if is_adapter(path):
        raise explain_nothing(source, path)
    for is_kind, read in _KINDS:
        if is_kind(path):
            return read(path, config, verify)
    raise explain_nothing(source, path)


def refuse_named_settings(path: Path, config: LoadConfig) -> None:
    """Raise where `config` says what only a named model can follow."""
    if config.base:
        raise ConfigError(f"{path} is no adapter, and base was given; leave base out")
    for setting, value in (("weights", config.weights), ("overrides", config.overrides)):
        if value:
            raise ConfigError(f"{path} brings its own weights and shape, and {setting} was given; leave {setting} out")


# ---- names

KNOWN_NAMES = tuple(sorted({*zoo.NAMES, *text_zoo.NAMES}))


def _open_name(name: str, config: LoadConfig) -> Opened:
    is_text = name in text_zoo.MODELS
    model = (text_zoo if is_text else zoo).build(name, **config.overrides).eval()
    if config.weights is not None:
        load_weights_(model, Path(config.weights))
        origin = f"weights from {config.weights}"
    else:
        origin = "random weights"
        warn_caller(
            f"{name} has random weights, so its answers mean nothing; give weights=FOLDER_OR_FILE for trained ones"
        )
    summary = f"{name}, {'a text model' if is_text else 'from the zoo'}, with {origin}"
    weights = Path(config.weights) if config.weights is not None else None
    folder = weights if weights is None or weights.is_dir() else weights.parent
    return Opened(summary, model, partial(draw_for, model), name, folder)


def load_weights_(model: nn.Module, path: Path) -> None:
    """Replace the parameters of `model`, in place, by those of a safetensors file or model folder.

    Names may be our own, for text models those of Hugging Face, and for vision models torchvision's, those of Hugging
    Face (ResNet, ViT) and of timm (MobileNetV3); what wrappers of torch put before them is taken off. Raises
    `ArtifactError` where one is missing, left over or of another shape.
    """
    tensors = read_weights(path)
    if isinstance(model, TransformersModel):
        tensors = _fit_names(model, strip_wrappers(tensors, set(model.model.state_dict()), source=path))
    else:
        known = set(model.state_dict())
        tensors = strip_wrappers(tensors, known, source=path)
        if not set(tensors) <= known:
            tensors = import_names(model, tensors)
    if isinstance(model, Decoder):
        model.config = tie_as_stored(model.config, tensors)
        if model.config.tie_embeddings:
            model.head.weight = model.embed.weight
    fill_(model, tensors, None, source=path)


def import_names(model: nn.Module, tensors: Tensors) -> Tensors:
    """Rename tensors of another library to our names."""
    config: Any = getattr(model, "config", None)
    if isinstance(model, Decoder):
        family = find_family(model.config)
        return tensors if family is None else import_tensors(tensors, family)
    for kind, import_names in _IMPORTERS.items():
        if isinstance(model, kind):
            return import_names(tensors, config)
    return tensors


_IMPORTERS: dict[type[nn.Module], Callable[[Tensors, Any], Tensors]] = {
    ResNet: resnet_keymap.import_tensors,
    ViT: vit_keymap.import_weights,
    MobileNetV3: mobilenet_v3_keymap.import_tensors,
}


def read_weights(path: Path) -> Tensors:
    """Read the tensors of a safetensors file or a model folder, under the names that stand there."""
    refuse_pickles(path)
    if is_artifact(path):
        return open_artifact(path).tensors()
    if path.is_dir():
        return read_tensors(find_weight_files(path))
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; give a safetensors file or a model folder as weights")
    return read_tensor_file(path)


def _fit_names(model: TransformersModel, tensors: Tensors) -> Tensors:
    """Rename tensors to the wrapped model's names, whether the file is of a bare model or has a head."""
    prefix = f"{getattr(model.model, 'base_model_prefix', '')}."
    known = set(model.model.state_dict())
    fitted = {}
    for name, tensor in tensors.items():
        choices = (name, name.removeprefix(prefix), prefix + name)
        fitted["model." + next((choice for choice in choices if choice in known), name)] = tensor
    computed = [name for name in fitted if name.endswith(".position_ids")]  # tables that old files carry
    return {name: tensor for name, tensor in fitted.items() if name not in computed}


def draw_for(model: nn.Module, config: LoadConfig) -> tuple[Tensor, ...]:
    """Sample inputs for a model of ours, by its architecture. Raises `ConfigError` where shapes cannot be followed."""
    model = plain_module(model)
    if isinstance(model, Decoder | TransformersModel):
        drawn = text_zoo.draw_tokens(model, config.batch_size, config.sequence_length)
        names = model.input_names if isinstance(model, TransformersModel) else ("tokens",)
    else:
        settings: Any = model.config
        size = getattr(settings, "image_size", None) or _image_size(model)
        drawn = (_draw_images(config.batch_size, settings.in_channels, size),)
        names = ("images",)
    return tuple(_redraw(name, tensor, config.shapes) for name, tensor in zip(names, drawn, strict=True))


def _image_size(model: nn.Module) -> int:
    return next(entry.image_size for entry in zoo.MODELS.values() if entry.assemble is type(model))


def _draw_images(batch_size: int, channels: int, size: int) -> Tensor:
    return torch.randn(batch_size, channels, size, size, generator=torch.Generator().manual_seed(zoo.SAMPLE_SEED))


def _redraw(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """`tensor`, or another of the shape that is wanted, with values in the same range."""
    shape = shapes.get(name)
    if shape is None:
        return tensor
    if len(shape) != tensor.dim():
        raise ConfigError(f"shapes.{name} has {len(shape)} lengths and the input has {tensor.dim()}; give as many")
    generator = torch.Generator().manual_seed(0)
    if tensor.is_floating_point():
        return torch.randn(shape, generator=generator)
    return torch.randint(int(tensor.min()), int(tensor.max()) + 1, shape, generator=generator)


# ---- folders


def _open_artifact(folder: Path, config: LoadConfig, verify: bool) -> Opened:
    artifact = open_artifact(folder, verify=verify)
    manifest = artifact.manifest
    known = [*list_architectures(), TRANSFORMERS]
    if manifest.architecture.startswith(OWN):
        raise ConfigError(
            f"{folder} holds the weights of a {manifest.architecture.removeprefix(OWN)}, a class that deepseek does "
            "not have; build it yourself and fill it with deepseek.models.model_sources.load_weights_(model, folder)"
        )
    if manifest.architecture not in known:
        raise ConfigError(explain_unknown("architecture", manifest.architecture, known))
    if manifest.precision not in PRECISIONS.values():
        raise ConfigError(explain_unknown("precision", manifest.precision, PRECISIONS.values()))
    check_sizes(manifest.architecture_config, str(folder / MANIFEST_NAME))
    if manifest.architecture == TRANSFORMERS:
        model: nn.Module = read_transformers(folder, manifest.architecture_config, artifact.tensors())
    else:
        tensors = artifact.tensors()
        if manifest.layout == "huggingface":
            model_type = json.loads(artifact.read_bytes(CONFIG_NAME))["model_type"]
            tensors = import_tensors(tensors, FAMILIES[model_type])
        model = assemble(manifest.architecture, manifest.architecture_config, tensors, source=folder)
    summary = f"{folder}, an artifact of architecture {manifest.architecture}, stored in {manifest.precision}"
    return Opened(summary, model.eval(), partial(draw_for, model), str(folder), folder)


def assemble(name: str, settings: Mapping[str, Any], tensors: Tensors, *, source: Path) -> nn.Module:
    """Return the model of architecture `name` whose parameters are `tensors` themselves."""
    architecture = list_architectures()[name]
    if name == DECODER:
        settings = tie_as_stored(DecoderConfig.from_dict(settings), tensors).to_dict()
    try:
        model = build_without_values(lambda: architecture.build(settings))
    except RuntimeError as error:  # torch has no memory for the tables of positions
        raise ArtifactError(
            f"the model in {source} cannot be built ({first_line(error)}); check the sizes in its config"
        ) from error
    if is_int8(tensors) and name == DECODER:
        replace_with_int8_(model, INT8_KEPT)
    fill_(model, tensors, None, source=source)
    return model


def _open_huggingface(folder: Path, config: LoadConfig, verify: bool) -> Opened:
    values = ModelFolder(folder).config
    if (folder / ADAPTER_CONFIG_NAME).exists():
        warn_caller(f"{folder} holds an adapter as well, which is not applied; merge it into the weights first")
    if is_decoder(values) and (folder / POOLING_CONFIG_NAME).is_file():  # trained to embed texts, not to go on
        values = {**values, "architectures": [name_body(values)]}
    elif is_decoder(values):
        try:
            settings, family = import_config(values)
        except ConfigError as error:
            warn_caller(f"{folder}: {error}; it is loaded through transformers instead")
        else:
            tensors = strip_wrappers(read_tensors(find_weight_files(folder)), (), source=folder)
            return _open_decoder(folder, settings, import_tensors(fit_prefix(tensors, family), family))
    # Every file is read here first: what is damaged or a pickle in disguise is refused before another library opens it.
    model = read_transformers(folder, values, read_tensors(find_weight_files(folder)))
    kind = type(model.model).__name__
    return Opened(f"{folder}, a {kind} through transformers", model, partial(draw_for, model), str(folder), folder)


def is_decoder(values: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` is of a family that our decoder follows, with the head that continues texts."""
    family = FAMILIES.get(str(values.get("model_type")))
    names = values.get("architectures") or []
    named = str(names[0]) if isinstance(names, list) and names else ""
    return family is not None and (named in ("", family.class_name) or not is_transformers_class(named))


def name_body(values: Mapping[str, Any]) -> str:
    """Return the class of transformers that is the decoder of a `config.json` without its head."""
    named = FAMILIES[str(values["model_type"])].class_name
    return named.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model")


def _open_decoder(folder: Path, settings: DecoderConfig, tensors: Tensors) -> Opened:
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise ArtifactError(
                f"{folder} is quantized ({name} is {str(tensor.dtype).removeprefix('torch.')}) in a way that the "
                "decoder does not read; give the folder it was made from, and quantize that with `deepseek quantize`"
            )
    if "head.weight" not in tensors and not settings.tie_embeddings:
        warn_caller(
            f"{folder} has no head, and its {CONFIG_NAME} says that the head is not the embedding; the embedding is "
            "taken for it: set tie_word_embeddings to true if that is right, and copy the weights again if not"
        )
    model = assemble(DECODER, settings.to_dict(), tensors, source=folder).eval()
    return Opened(
        f"{folder}, a Hugging Face folder as our decoder", model, partial(draw_for, model), str(folder), folder
    )


def find_weight_files(folder: Path) -> list[Path]:
    """Return the files that the index names, or the one file there is."""
    if (folder / INDEX_NAME).exists():
        weight_map = read_settings(folder / INDEX_NAME, error=CorruptArtifactError).get("weight_map")
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if not names or not all(map(is_plain_name, names)):
            raise CorruptArtifactError(f"{folder / INDEX_NAME} has no weight_map of file names; download it again")
        if WEIGHTS_NAME not in names and (folder / WEIGHTS_NAME).exists():
            raise ArtifactError(
                f"{folder} holds the model twice, as {WEIGHTS_NAME} and in the files of {INDEX_NAME}; "
                "remove the one that is older"
            )
        paths = [folder / name for name in sorted(names)]
    else:
        paths = [folder / WEIGHTS_NAME]
    for path in paths:
        if not path.is_file():
            others = sorted(other.name for other in folder.glob("*" + SAFETENSORS_SUFFIX))
            way_out = "a model needs a .safetensors file, download it again"
            if others and len(paths) == 1:
                way_out = (
                    f"the folder holds {', '.join(others[:3])}, which nothing names: copy {INDEX_NAME} too, "
                    f"or, of one whole file under the names of transformers, call it {WEIGHTS_NAME}"
                )
            raise ArtifactError(f"{path} is missing; {way_out}")
    return paths


def read_max_length(folder: Path) -> int | None:
    """Return the tokens that the model in `folder` takes at once, or `None` where its config does not say."""
    if is_adapter(folder):
        base = Path(str(read_settings(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")))
        return read_max_length(base) if base.is_dir() else None
    if is_artifact(folder):
        length = read_manifest(folder).architecture_config.get("max_length")
    else:
        values = dict(ModelFolder(folder).config)
        length = next((values[name] for name in _LENGTH_NAMES if name in values), None)
    return length if isinstance(length, int) else None


# ---- files


def _open_onnx(path: Path, config: LoadConfig, verify: bool) -> Opened:
    proto = read_onnx(path)
    specs = describe_inputs(proto)

    is_measured = config.backend is not None  # backends are compared in FP32, and choose a precision themselves
    model, lengths = import_with_lengths(
        proto,
        list_open(specs, config.shapes),
        partial(draw_for_specs, specs, config),
        source=str(path),
        in_float32=is_measured,
    )
    draw = partial(draw_for_specs, specs, lengths=lengths)
    return Opened(f"{path}, an ONNX file converted to PyTorch", model, draw, str(path))


def draw_for_specs(
    specs: Sequence[InputSpec], config: LoadConfig, lengths: Mapping[str, int] = MappingProxyType({})
) -> tuple[Tensor, ...]:
    """Sample inputs for a file, by what it says of its inputs; `lengths` are those found for what it leaves open."""
    return build_inputs(
        specs,
        config.shapes,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        lengths=lengths,
    )


def _open_tensorflow(path: Path, config: LoadConfig, verify: bool) -> Opened:
    program = run_tensorflow(path, config.precision)
    summary = f"{path}, a TensorFlow model run as it is by OpenVINO"
    return Opened(summary, program, partial(draw_for_specs, program.inputs), str(path))


def is_onnx(path: Path) -> bool:
    """Return whether `path` is an ONNX file, by its name."""
    return path.suffix == ONNX_SUFFIX and path.is_file()


def is_huggingface(path: Path) -> bool:
    """Return whether `path` is a folder with a `config.json`."""
    return (path / CONFIG_NAME).is_file()


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What configs of Hugging Face call the longest sequence.
_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path, LoadConfig, bool], Opened]], ...] = (
    (is_artifact, _open_artifact),
    (is_huggingface, _open_huggingface),
    (is_onnx, _open_onnx),
    (find_tensorflow, _open_tensorflow),
)


def explain_nothing(source: str | Path, path: Path) -> Exception:
    """Return the error for a source where no model is."""
    if (path / ADAPTER_CONFIG_NAME).exists():
        return ArtifactError(
            f"{path} holds an adapter and no model; make a model of it and its base with `deepseek merge-adapter`, and "
            "give that"
        )
    if path.is_dir():
        return ArtifactError(
            f"{path} has neither manifest.json nor {CONFIG_NAME} nor {SAVED_MODEL_NAME}, so it holds no model; "
            "check the path"
        )
    if path.is_file():
        return ArtifactError(
            f"{path} is a file of a kind that is not read; give a model folder, or a file of .onnx, .pb or .tflite"
        )
    if isinstance(source, str) and path.name == source and not path.suffix:
        unknown = explain_unknown("model", source, KNOWN_NAMES)
        return ConfigError(f"{unknown}; a folder or file of that name does not exist either")
    return ArtifactError(f"{path} does not exist; give the folder of an artifact or of a Hugging Face model, or a name")
