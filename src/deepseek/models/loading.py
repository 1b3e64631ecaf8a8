"""From a model to a folder and back: `save_model` writes an artifact, `load_model` reads one, or a Hugging Face folder.

A decoder that has a twin at Hugging Face (Llama, GPT-2, Mixtral) is written under the twin's names with its
`config.json`, so that `transformers` opens the same folder; any other is written under our own names. Either way the
manifest carries the exact config. Trained models, conversions and servers all pass through these two functions.

Loading builds the model without weights and then hands it the memory-mapped tensors themselves: nothing is initialized
first and nothing is copied, so that a model is there in the time it takes to verify it. Weights that ask for another
precision, and those of GPT-2 and Mixtral folders, which are stored turned, are copied once. An int8 model is one whose
layers `make_int8_` replaced; it is stored under our own names and comes back with the same layers.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from deepseek.artifact.format import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, Description, Manifest, is_plain_name
from deepseek.artifact.reading import is_artifact, open_artifact, read_tensors
from deepseek.artifact.verifying import SAFETENSORS_SUFFIX, refuse_pickles
from deepseek.artifact.writing import MAX_SHARD_BYTES, write_artifact
from deepseek.core.errors import ArtifactError, ConfigError, CorruptArtifactError
from deepseek.core.names import explain_unknown
from deepseek.data.tokenizing import Tokenizer, save_tokenizer
from deepseek.models.decoder.keymap import (
    FAMILIES,
    Family,
    export_config,
    export_tensors,
    find_twin,
    import_config,
    import_tensors,
)
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.nn.packed import pack_
from deepseek.nn.quantized import replace_with_int8_

ARCHITECTURE = "decoder"
Precision = Literal["fp32", "bf16", "fp16"]
INT8_KEPT = ("gate", "refine", "far_gate")  # routers and gates of the mask: small, and they decide
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PRECISIONS = {dtype: name for name, dtype in _DTYPES.items()} | {torch.int8: "int8"}


def load_model(
    path: str | Path, *, precision: Precision | None = None, verify: bool = True, packed: bool = False
) -> Decoder:
    """The model in the artifact or Hugging Face folder `path`, in evaluation mode on the CPU.

    `precision` is that of the weights in memory; none keeps them as they are stored. With `verify`, every file of an
    artifact is compared with its manifest first; a Hugging Face folder has none to compare with. Raises
    `CorruptArtifactError`, `UnsafeFileError` for a pickle, `UnsupportedSchemaError`, `ConfigError` for a model that
    this decoder cannot be or an int8 one that is to be widened, and `ArtifactError` where there is no model.

    A `packed` model has its weights laid out for this machine's kernels (`nn/packed.py`): it decodes at up to twice the
    speed, and can be run but not trained or saved.
    """
    folder = Path(path)
    if is_artifact(folder):
        config, tensors = _read_artifact(folder, verify=verify)
    else:
        config, tensors = _read_huggingface(folder)
    model = _assemble(config, tensors, _dtype_of(precision), source=folder).eval()
    return pack_(model) if packed else model


def save_model(
    model: Decoder,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    precision: Precision | None = None,
    metrics: Mapping[str, float] | None = None,
    plan: Mapping[str, JsonValue] | None = None,
    parent_digest: str | None = None,
    config_digest: str | None = None,
    data_position: Mapping[str, JsonValue] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Manifest:
    """Write `model` and its `tokenizer` as the artifact `folder`; `precision` converts the weights on the way.

    The other arguments go into the manifest as they are. Raises `ArtifactError` where `folder` holds something already
    and `StorageError` for what the disk refuses; either way `folder` is as it was.
    """
    if not isinstance(model, Decoder):
        raise ArtifactError(
            f"save_model writes a Decoder and was given a {type(model).__name__}; pass the Decoder itself"
        )
    tensors = _stored_tensors(model, _dtype_of(precision))
    files = _tokenizer_files(tokenizer)
    family = None if _is_int8(tensors) else find_twin(model.config)
    if family is not None:
        tensors = export_tensors(tensors, family)
        files[CONFIG_NAME] = _config_json(model.config, family, _main_dtype(tensors), tokenizer)
    description = Description(
        architecture=ARCHITECTURE,
        architecture_config=model.config.to_dict(),
        layout="deepseek" if family is None else "huggingface",
        precision=_name_precision(_main_dtype(tensors)),
        plan=dict(plan or {}),
        parent_digest=parent_digest,
        config_digest=config_digest,
        data_position=dict(data_position or {}),
        metrics=dict(metrics or {}),
    )
    return write_artifact(
        folder, tensors, description, files=files, max_shard_bytes=max_shard_bytes, overwrite=overwrite
    )


def make_int8_(model: Decoder) -> Decoder:
    """Replace the layers of `model` by int8 ones, in place, and return it; what decides stays in float."""
    replace_with_int8_(model, INT8_KEPT)
    return model


def count_stored_bytes(model: Decoder) -> int:
    """Bytes of the weights of `model` in an artifact, as they are now."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _stored_tensors(model, None).values())


# ---- reading


def _read_artifact(folder: Path, *, verify: bool) -> tuple[DecoderConfig, dict[str, Tensor]]:
    artifact = open_artifact(folder, verify=verify)
    manifest = artifact.manifest
    if manifest.architecture != ARCHITECTURE:
        raise ConfigError(explain_unknown("architecture", manifest.architecture, [ARCHITECTURE]))
    if manifest.precision not in _PRECISIONS.values():
        raise ConfigError(explain_unknown("precision", manifest.precision, _PRECISIONS.values()))
    config, tensors = DecoderConfig.from_dict(manifest.architecture_config), artifact.tensors()
    if manifest.layout == "deepseek":
        return config, tensors
    model_type = json.loads(artifact.read_bytes(CONFIG_NAME))["model_type"]
    return config, import_tensors(tensors, FAMILIES[model_type])


def _read_huggingface(folder: Path) -> tuple[DecoderConfig, dict[str, Tensor]]:
    refuse_pickles(folder)
    if not folder.is_dir():
        seen = "is a file" if folder.exists() else "does not exist"
        raise ArtifactError(f"{folder} {seen}; give the folder of an artifact or of a Hugging Face model")
    if not (folder / CONFIG_NAME).is_file():
        raise ArtifactError(
            f"{folder} has neither manifest.json nor {CONFIG_NAME}, so it holds no model; check the path"
        )
    config, family = import_config(_read_json(folder / CONFIG_NAME))
    return config, import_tensors(read_tensors(_find_weights(folder)), family)


def _find_weights(folder: Path) -> list[Path]:
    """The files that the index names, or the one file there is."""
    if (folder / INDEX_NAME).is_file():
        weight_map = _read_json(folder / INDEX_NAME).get("weight_map")
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if not names or not all(map(is_plain_name, names)):
            raise CorruptArtifactError(f"{folder / INDEX_NAME} has no weight_map of file names; download it again")
        paths = [folder / name for name in sorted(names)]
    else:
        paths = [folder / WEIGHTS_NAME]
    for path in paths:
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; a model needs a {SAFETENSORS_SUFFIX} file, download it again")
    return paths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptArtifactError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise CorruptArtifactError(f"{path} holds a {type(values).__name__}, expected an object; download it again")
    return values


# ---- assembling


def _assemble(
    config: DecoderConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, *, source: Path
) -> Decoder:
    """A decoder whose parameters are `tensors` themselves, as `dtype`; tied names get one parameter."""
    with _parameters_without_values():
        model = Decoder(config)
    if _is_int8(tensors):
        if dtype is not None:
            raise ConfigError(f"{source} is int8 and was asked for as {dtype}; leave precision out")
        make_int8_(model)
    parameters, aliases = dict(model.named_parameters()), _tied_names(model)
    state = {
        name: nn.Parameter(tensor.to(dtype or tensor.dtype)) if name in parameters else tensor
        for name, tensor in tensors.items()
        if name not in aliases  # a file may hold a copy; the architecture says that they are one
    }
    state |= {alias: state[owner] for alias, owner in aliases.items() if owner in state}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        problems = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise ArtifactError(f"the weights in {source} do not fit its config ({problems}); mend the config") from error
    return model


@contextmanager
def _parameters_without_values() -> Iterator[None]:
    """Modules built inside by this thread get parameters on the meta device, and buffers with their real values.

    `torch.device("meta")` would take the values of the buffers too, and tables of angles stand in no file.
    """
    owner = threading.get_ident()

    def strip(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != owner:
            return None  # keeps the parameter as it is
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch's annotation leaves out that what a hook returns takes the parameter's place.
    handle = register_module_parameter_registration_hook(strip)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _dtype_of(precision: str | None) -> torch.dtype | None:
    if precision is not None and precision not in _DTYPES:
        raise ConfigError(explain_unknown("precision", precision, _DTYPES))
    return None if precision is None else _DTYPES[precision]


def _is_int8(tensors: Mapping[str, Tensor]) -> bool:
    return any(tensor.dtype is torch.int8 for tensor in tensors.values())


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Names of stored tensors that are another one, and that one's name."""
    owners: dict[int, str] = {}
    named = model.state_dict(keep_vars=True).items()
    names = {name: owners.setdefault(id(tensor), name) for name, tensor in named}
    return {name: owner for name, owner in names.items() if name != owner}


# ---- writing


def _stored_tensors(model: Decoder, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Parameters by name, as `dtype` and tied ones once, and buffers as they are."""
    aliases, parameters = _tied_names(model), dict(model.named_parameters())
    return {
        name: tensor.to(dtype or tensor.dtype) if name in parameters else tensor
        for name, tensor in model.state_dict().items()
        if name not in aliases
    }


def _main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of the largest tensor."""
    return max(tensors.values(), key=torch.numel).dtype


def _name_precision(dtype: torch.dtype) -> str:
    if dtype not in _PRECISIONS:
        raise ArtifactError(f"the weights are {dtype}; convert them to one of {', '.join(_PRECISIONS.values())}")
    return _PRECISIONS[dtype]


def _tokenizer_files(tokenizer: Tokenizer | None) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _config_json(config: DecoderConfig, family: Family, dtype: torch.dtype, tokenizer: Tokenizer | None) -> bytes:
    values = export_config(config, family, dtype)
    if tokenizer is not None:
        values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return json.dumps(values, indent=1).encode()
