"""From a name, folder or file to a model and back: `load_model` opens it, `save_model` writes an artifact.

    load_model("runs/model")                                    the module, in evaluation mode
    load_model("resnet50", {"precision": "fp16", "batch_size": 64, "backend": BackendSelector.AUTO})
                                                                what runs it fastest here; `explain()` says why

What can be given is in `model_sources.py`. What comes back is a `LoadedModel` (`loaded_model.py`), which is called like
the model, and without a backend used like the module it loaded in every other way as well.

A decoder that has a counterpart at Hugging Face (Llama, GPT-2, Mixtral) is written under its names with `config.json`,
so that `transformers` opens the same folder, as is any model that `transformers` defines; all others are written under
our own names. Either way the manifest carries the exact config. Weights that ask for another precision, and those of
GPT-2 and Mixtral folders, which are stored transposed, are copied once; all others are the mapped file itself. An int8
decoder is one whose layers `make_int8_` replaced; it comes back with the same layers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from deepseek.artifact.format import CONFIG_NAME, TOKENIZER_NAME, Description, Manifest
from deepseek.artifact.reading import find_model_folder, is_adapter, is_artifact, read_manifest
from deepseek.artifact.writing import MAX_SHARD_BYTES, write_artifact
from deepseek.compiler.runtimes.selection import SelectionEvent
from deepseek.core.caller_warnings import warn_caller
from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.core.model_folder import GENERATION_FILE, ModelFolder
from deepseek.data.tokenizing import Tokenizer, save_tokenizer
from deepseek.models.adapters import open_adapter
from deepseek.models.architectures import DECODER, OWN, TRANSFORMERS, name_architecture
from deepseek.models.backend_loading import has_half_arithmetic, run_on_backend
from deepseek.models.decoder.keymap import FAMILIES, export_config, export_tensors, find_family
from deepseek.models.decoder.model import Decoder
from deepseek.models.loaded_model import LoadedModel, LoadedModule, Origin, RunModel, plain_module
from deepseek.models.model_sources import INT8_KEPT, KNOWN_NAMES, LoadConfig, Opened, draw_for, open_source
from deepseek.models.parallel_loading import check_whole, is_parallel, spread
from deepseek.models.programs import Program
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.models.weight_loading import dtype_of, is_int8, main_dtype, name_precision, stored_tensors
from deepseek.nn.lora import find_adapted
from deepseek.nn.packed import pack_
from deepseek.nn.quantized import replace_with_int8_

__all__ = [
    "LoadConfig",
    "LoadedModel",
    "count_stored_bytes",
    "load_decoder",
    "load_model",
    "make_int8_",
    "save_model",
]

Precision = Literal["fp32", "bf16", "fp16"]


def load_model(
    source: str | Path,
    config: LoadConfig | Mapping[str, Any] | None = None,
    *,
    precision: str | None = None,
    weights: str | Path | None = None,
    verify: bool = True,
    packed: bool = False,
    tensor_parallel_size: int | None = None,
    pipeline_parallel_size: int | None = None,
    device_map: Mapping[str, Sequence[int]] | None = None,
    on_event: Callable[[SelectionEvent], None] | None = None,
) -> LoadedModel:
    """Load the model that `source` names, in evaluation mode on the CPU.

    `source` is a name (`resnet50`, `bert-base`, ...), the folder of an artifact, of Hugging Face or of a TensorFlow
    SavedModel, or an ONNX, `.pb` or `.tflite` file. `config` is a `LoadConfig` or its settings as a dict; `precision`
    and `weights` are two of them. A name gives random weights, with a warning, unless `weights` leads to trained ones.

    `precision` is that of the weights in memory; none keeps them as they are stored, whatever a `config.json` says of
    their dtype, and where a file holds several, as that of its largest tensor. With `verify`, every file of an
    artifact is compared with its manifest first; other sources have none to compare with. A `packed` decoder has its
    weights laid out for this machine's kernels (`nn/packed.py`): it decodes at up to twice the speed, and can be run
    but not trained or saved. `on_event` hears of every backend that is tried.

    Under a launcher, `tensor_parallel_size` ranks cut each layer and `pipeline_parallel_size` stages hold some of the
    layers each; every rank calls the model with the same inputs and gets the whole answer. `device_map` names the
    devices of the ranks, in their order (`models/parallel_loading.py`).

    Raises `ConfigError` for an unknown name or setting and for a model that cannot be built or converted,
    `CorruptArtifactError`, `UnsafeFileError` for a pickle, `UnsupportedSchemaError`, and `ArtifactError` where there is
    no model.

    >>> from deepseek.models import zoo
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     manifest = save_model(zoo.build("resnet18", width=8, num_classes=10), folder + "/model")
    ...     load_model(folder + "/model")(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 10])
    """
    settings = _settings_of(
        config,
        precision=precision,
        weights=None if weights is None else str(weights),
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        device_map=None if device_map is None else dict(device_map),
    )
    folder = find_model_folder(source)
    has_adapter = source not in KNOWN_NAMES and is_adapter(folder)
    if has_adapter and settings.backend is not None:
        raise ConfigError(
            f"{folder} is an adapter and a backend was asked for, which takes whole models; make one with `deepseek "
            "merge-adapter`"
        )
    if settings.backend is not None:
        check_whole(f"backend {settings.backend!r}", source, settings)
        if packed:
            raise ConfigError(
                "a packed model has a layout of its own and a backend was asked for; leave one of them out"
            )
        return run_on_backend(source, settings, verify=verify, on_event=on_event)
    opened = (
        _open_adapter(folder, settings, verify=verify) if has_adapter else open_source(source, settings, verify=verify)
    )
    draw = partial(opened.draw_inputs, settings)
    if isinstance(opened.model, Program):
        check_whole(f"the runtime {opened.model.runtime}", source, settings)
        program = opened.model
        return RunModel(program, Origin(opened.summary, draw, program.explain(), program.runtime, opened.folder), None)
    module = _as_precision(opened.model, settings.precision, source)
    if is_parallel(settings):
        return _spread_over_ranks(module, opened, settings, source, packed=packed, has_adapter=has_adapter)
    if packed:
        module = _as_packed(module, source)
    return LoadedModule(module, Origin(opened.summary, draw, _PLAIN, "torch", opened.folder))


def _spread_over_ranks(
    module: nn.Module, opened: Opened, settings: LoadConfig, source: str | Path, *, packed: bool, has_adapter: bool
) -> RunModel:
    """Return the model whose parts lie on the ranks of the launcher."""
    if packed or has_adapter or is_int8(module.state_dict()):
        check_whole("packed" if packed else "with an adapter" if has_adapter else "in int8", source, settings)
    run, where = spread(module, settings)
    draw = partial(opened.draw_inputs, settings)
    return RunModel(run, Origin(f"{opened.summary}, spread by {where}", draw, where, where, opened.folder), None)


def _open_adapter(folder: Path, settings: LoadConfig, *, verify: bool) -> Opened:
    """Open an adapter on its base, as one model."""
    start = open_adapter(folder, settings.base, verify=verify)
    with_tokenizer = folder if (folder / TOKENIZER_NAME).is_file() else start.folder
    return Opened(start.summary, start.model, partial(draw_for, start.model), str(folder), with_tokenizer)


_PLAIN = "as it was loaded, by torch; give a backend, for example auto, to have what is fastest here"


def _as_packed(module: nn.Module, source: str | Path) -> nn.Module:
    if not isinstance(module, Decoder):
        raise ConfigError(
            f"{source} is a {type(module).__name__} and packed=True takes decoders only; call load_model without it, "
            "or with backend='auto', which looks for what runs it fastest"
        )
    return pack_(module)


def load_decoder(
    source: str | Path, *, precision: str | None = None, verify: bool = True, packed: bool = False
) -> Decoder:
    """Like `load_model`, for work that needs our decoder; raises `ConfigError` where `source` is another model."""
    module = load_model(source, precision=precision, verify=verify).module
    if not isinstance(module, Decoder):
        kind = type(module.model if isinstance(module, TransformersModel) else module).__name__
        raise ConfigError(
            f"{source} holds a {kind}, and what generates text, serves and quantizes takes decoders of ours or of the "
            f"Hugging Face families {', '.join(FAMILIES)}; give one of them, or run this one with "
            "deepseek predict or load_model"
        )
    return pack_(module) if packed else module


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    precision: Precision | None = None,
    metrics: Mapping[str, float] | None = None,
    plan: Mapping[str, JsonValue] | None = None,
    parent_digest: str | None = None,
    config_digest: str | None = None,
    data_position: Mapping[str, JsonValue] | None = None,
    origin: str | Path | None = None,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Manifest:
    """Write `model` and its `tokenizer` as the artifact `folder`; `precision` converts the weights on the way.

    `model` is a `Decoder`, a model of the zoo, or one of `transformers` that `load_model` gave. `origin` is the model
    folder that it came from, whose family and settings of generation are kept, and `files` are further ones by name.
    The other arguments go into the manifest as they are. Raises `ArtifactError` for another model and where `folder`
    holds something already, and `StorageError` for what the disk refuses; either way `folder` is as it was.
    """
    model = plain_module(model)
    if find_adapted(model):
        raise ArtifactError(
            "this model has adapters beside its weights; save_adapter writes them alone, and merge_lora_ makes them one"
        )
    architecture = name_architecture(model)
    from_origin = None if origin is None else _open_folder(Path(origin))
    tensors, settings, written_files, is_foreign = _WRITERS.get(architecture, _write_plain)(
        model, dtype_of(precision), tokenizer, from_origin
    )
    description = Description(
        architecture=architecture,
        architecture_config=settings,
        layout="huggingface" if is_foreign else "deepseek",
        precision=name_precision(main_dtype(tensors)),
        plan=dict(plan or {}),
        parent_digest=parent_digest,
        config_digest=config_digest,
        data_position=dict(data_position or {}),
        metrics=dict(metrics or {}),
    )
    all_files = tokenizer_files(tokenizer) | written_files | dict(files or {})
    if from_origin is not None and from_origin.generation:
        written = json.loads(all_files.get(GENERATION_FILE, b"{}"))
        all_files[GENERATION_FILE] = json.dumps({**from_origin.generation, **_drop_missing(written)}, indent=2).encode()
    return write_artifact(
        folder, tensors, description, files=all_files, max_shard_bytes=max_shard_bytes, overwrite=overwrite
    )


def save_own_model(
    model: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    **record: Any,
) -> Manifest:
    """Write a model of a class of your own as the artifact `folder`, whose weights `load_weights_` reads back.

    `load_model` cannot build such a class. `record` goes into the manifest as it is.
    """
    tensors = stored_tensors(plain_module(model), None)
    kind = type(plain_module(model))
    description = Description(
        architecture=f"{OWN}{kind.__module__}.{kind.__qualname__}",
        architecture_config={},
        precision=name_precision(main_dtype(tensors)),
        **record,
    )
    return write_artifact(
        folder, tensors, description, files=tokenizer_files(tokenizer) | dict(files or {}), overwrite=overwrite
    )


def make_int8_(model: Decoder) -> Decoder:
    """Replace the layers of `model` by int8 ones, in place, and return it; what decides stays in float."""
    replace_with_int8_(model, INT8_KEPT)
    return model


def count_stored_bytes(model: nn.Module) -> int:
    """Count the bytes of the weights of `model` in an artifact, as they are now."""
    return sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(plain_module(model), None).values())


# ---- precision


def _settings_of(config: LoadConfig | Mapping[str, Any] | None, **said: Any) -> LoadConfig:
    """One config from the two places where a user may say things."""
    if isinstance(config, LoadConfig):
        settings = config
    elif config is None or isinstance(config, Mapping):
        settings = LoadConfig.from_dict(config or {})
    else:
        raise ConfigError(f"config is {config!r}; give a LoadConfig or a dict of its settings")
    return settings.override({name: value for name, value in said.items() if value is not None})


def _as_precision(model: nn.Module, precision: str, source: str | Path) -> nn.Module:
    """Give the weights of `model` the `precision`, in place, and return it."""
    if isinstance(model, Decoder) and is_int8(model.state_dict()):
        if precision not in ("auto", "int8"):
            raise ConfigError(f"{source} is int8 and was asked for as {precision}; leave precision out")
        return model
    if precision == "auto":
        dtypes = {parameter.dtype for parameter in model.parameters()}
        if not isinstance(model, Decoder) or len(dtypes) == 1:
            return model
        return _cast_parameters_(model, main_dtype(model.state_dict()))  # norms in fp32 beside matrices in bf16
    if precision == "int8":
        if isinstance(model, Decoder):
            return make_int8_(model)
        raise ConfigError(
            f"{source} becomes int8 only together with a backend, which checks what it costs; add backend='auto'"
        )
    dtype = dtype_of(precision)
    assert dtype is not None
    if precision == "fp16" and not has_half_arithmetic():
        warn_caller(
            f"{source} is loaded in fp16, which this machine can store but not compute in quickly; "
            "run it on a GPU, or take bf16"
        )
    return _cast_parameters_(model, dtype) if isinstance(model, Decoder) else model.to(dtype)


def _cast_parameters_(model: Decoder, dtype: torch.dtype) -> Decoder:
    """Cast the parameters, in place; tables of angles stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


# ---- writing

_Written = tuple[dict[str, Tensor], dict[str, Any], dict[str, bytes], bool]


def _open_folder(folder: Path) -> ModelFolder:
    return ModelFolder(folder, listed=read_manifest(folder).files if is_artifact(folder) else None)


def _write_plain(
    model: nn.Module, dtype: torch.dtype | None, tokenizer: Tokenizer | None, origin: ModelFolder | None
) -> _Written:
    """Under our own names; every float of a vision model has one dtype, running statistics too."""
    settings: Any = model.config
    tensors = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in stored_tensors(model, None).items()
    }
    return tensors, settings.to_dict(), {}, False


def _write_decoder(
    model: Decoder, dtype: torch.dtype | None, tokenizer: Tokenizer | None, origin: ModelFolder | None
) -> _Written:
    """Write `model` under the names of its Hugging Face counterpart, where it has one; its origin's, where that can."""
    tensors = stored_tensors(model, dtype)
    preferred = None if origin is None else origin.config.get("model_type")
    family = None if is_int8(tensors) else find_family(model.config, preferred)
    if family is None:
        return tensors, model.config.to_dict(), {}, False
    tensors = export_tensors(tensors, family)
    values = export_config(model.config, family, main_dtype(tensors)) | _token_ids(tokenizer, origin)
    return tensors, model.config.to_dict(), {CONFIG_NAME: json.dumps(values, indent=1).encode()}, True


def _write_transformers(
    model: TransformersModel, dtype: torch.dtype | None, tokenizer: Tokenizer | None, origin: ModelFolder | None
) -> _Written:
    """Write `model` as `transformers` writes it."""
    tensors = stored_tensors(model.model, dtype)
    settings = model.config | {"dtype": str(main_dtype(tensors)).removeprefix("torch.")}
    return tensors, settings, {CONFIG_NAME: json.dumps(settings, indent=1).encode()}, True


_WRITERS: dict[str, Callable[[Any, torch.dtype | None, Tokenizer | None, ModelFolder | None], _Written]] = {
    DECODER: _write_decoder,
    TRANSFORMERS: _write_transformers,
}


def tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """Return the files of a tokenizer by name."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _token_ids(tokenizer: Tokenizer | None, origin: ModelFolder | None) -> dict[str, Any]:
    """Return the numbers of the tokens that begin, end and fill texts: the tokenizer's, else those of the origin."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    stored = {} if origin is None else {**_drop_missing(origin.config), **_drop_missing(origin.generation)}
    ids = {name: stored[name] for name in names if name in stored}
    if tokenizer is not None:
        ids |= _drop_missing({"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id})
    return ids


def _drop_missing(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
