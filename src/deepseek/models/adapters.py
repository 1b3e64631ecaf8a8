"""LoRA adapters as folders, in the form of the library `peft`: small, and named after the model they were trained on.

    adapter/
      manifest.json                 ours: the digest of the base, where it was, and a checksum of every file
      adapter_config.json           as `peft` writes it: rank, alpha, targets, the base's folder
      adapter_model.safetensors     base_model.model.PATH.lora_A.weight, ...lora_B.weight, and modules saved in full

`attach_` begins an adapter on a model, `save_adapter` writes it, `open_adapter` opens the base and puts it on. A folder
that `peft` wrote has no manifest, and is opened all the same. Paths are those of Hugging Face where the model has a
counterpart there. Where their layer is several of ours side by side (GPT-2's `c_attn`), each of ours has an adapter of
its own, and in the file they are one of the ranks' sum, with a B of blocks; read the other way round, B is cut and A
shared.

On a float base the corrections are added to the weights when an adapter is opened, which makes it as fast as its base;
int8 weights cannot hold them, and there they stay beside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.artifact.format import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    TOKENIZER_NAME,
    Description,
    Manifest,
)
from deepseek.artifact.reading import is_adapter, is_artifact, open_artifact, read_tensor_file
from deepseek.artifact.verifying import refuse_pickles
from deepseek.artifact.writing import write_artifact
from deepseek.core.errors import ArtifactError, ConfigError, CorruptArtifactError
from deepseek.core.model_folder import ModelFolder, read_settings
from deepseek.models.decoder.keymap import (
    FAMILIES,
    GPT2,
    Family,
    export_tensors,
    find_family,
    find_modules,
    import_tensors,
    name_module,
)
from deepseek.models.decoder.model import Decoder
from deepseek.models.starting_weights import (
    CAUSAL_LM,
    HeadSpec,
    StartingModel,
    StartSource,
    open_start,
    refuse_no_numbers,
)
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.models.weight_loading import NUM_NAMED, main_dtype, name_precision
from deepseek.nn.freezing import hold_norms_
from deepseek.nn.lora import LoRAConfig, LoRALinear, add_lora_, find_adapted, is_named, merge_lora_, put_, scaling_of
from deepseek.nn.quantized import Int8Linear

ARCHITECTURE = "adapter"
_PREFIX = "base_model.model."
_DIGITS = 12
"""Digits of a digest that an error shows."""


def attach_(start: StartingModel, config: LoRAConfig) -> list[str]:
    """Put new adapters on the model that a run begins with, in place, and return the paths of their layers.

    Raises `ConfigError` for random weights, which no adapter could be opened on again.
    """
    if start.parent_digest is None:
        raise ConfigError(
            f"an adapter is trained on weights that exist, and there are only random ones ({start.summary}); give a "
            "folder as init, or init_weights"
        )
    model = start.model
    return add_lora_(model, config, aliases=_Names.of(start).linear, new_tensors=start.new_tensors)


# ---- writing


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    start: StartingModel,
    config: LoRAConfig,
    *,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    **record: Any,
) -> Manifest:
    """Write the adapters of `model`, and the modules that were trained in full, as the artifact `folder`.

    `record` goes into the manifest: metrics, digests, the position in the data.
    """
    names = _Names.of(replace(start, model=model))
    tensors, ranks, alphas = _pack_adapters(names, config)
    adapted = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors}
    saved = names.their_tensors(
        {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and ".lora_" not in name
        }
    )
    tensors |= {f"{_PREFIX}{name}": tensor for name, tensor in saved.items()}
    base = Path(start.source.name).resolve() if start.source.weights is None else start.source.name
    settings = {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES.get(start.source.head.purpose),
        "base_model_name_or_path": str(base),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilized,
        "target_modules": _shorten(adapted, set(names.linear.values())),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}) or None,
        "fan_in_fan_out": names.family is GPT2,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    description = Description(
        architecture=ARCHITECTURE,
        architecture_config={"base": start.source.describe()},
        layout="huggingface",
        precision=name_precision(main_dtype(tensors)),
        **(record | {"parent_digest": start.parent_digest}),
    )
    content = dict(files or {}) | {ADAPTER_CONFIG_NAME: json.dumps(settings, indent=2).encode()}
    return write_artifact(
        folder, tensors, description, files=content, weights_name=ADAPTER_WEIGHTS_NAME, overwrite=overwrite
    )


def _pack_adapters(names: _Names, config: LoRAConfig) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
    """Return the tensors of the adapters by peft's names, and the ranks and alphas that differ from the config's."""
    groups: dict[str, dict[str, LoRALinear]] = {}
    for path, layer in find_adapted(names.model).items():
        groups.setdefault(names.theirs(path), {})[path] = layer
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for theirs, layers in groups.items():
        a_RI, b_OR = _join(names, theirs, layers)
        tensors[f"{_PREFIX}{theirs}.lora_A.weight"] = a_RI
        tensors[f"{_PREFIX}{theirs}.lora_B.weight"] = b_OR
        rank, scaling = a_RI.shape[0], next(iter(layers.values())).scaling
        alpha = scaling * (math.sqrt(rank) if config.rank_stabilized else rank)
        if (rank, alpha) != (config.rank, config.alpha):
            ranks[theirs], alphas[theirs] = rank, alpha
    return tensors, ranks, alphas


def _join(names: _Names, theirs: str, layers: Mapping[str, LoRALinear]) -> tuple[Tensor, Tensor]:
    """Return A and B of their layer, which is one or several of ours side by side."""
    parts = names.ours(theirs)
    if len(parts) == 1:
        (layer,) = layers.values()
        return layer.lora_A, layer.lora_B
    a_RI = torch.cat([layers[part].lora_A for part in parts if part in layers])
    sizes = [linear.out_features for part in parts if (linear := _find_linear(names.model, part))]
    b_OR = torch.zeros(sum(sizes), a_RI.shape[0])
    row = column = 0
    for part, num_rows in zip(parts, sizes, strict=True):
        if part in layers:
            rank = layers[part].rank
            b_OR[row : row + num_rows, column : column + rank] = layers[part].lora_B.detach()
            column += rank
        row += num_rows
    return a_RI, b_OR


def _shorten(targets: set[str], every: set[str]) -> list[str]:
    """Return the last parts of the targets' names where all layers of such a name are targets, else whole names."""
    short: set[str] = set()
    for target in targets:
        last = target.rpartition(".")[2]
        alike = {name for name in every if name.rpartition(".")[2] == last}
        short.add(last if alike <= targets else target)
    return sorted(short)


# ---- reading


def open_adapter(folder: str | Path, base: str | Path | None = None, *, verify: bool = True) -> StartingModel:
    """Open the base of the adapter in `folder` with the adapter on it, in evaluation mode.

    `base` is the folder of the base, where it is no longer the one that the adapter names. Raises `ArtifactError` where
    there is no base, for another base than the adapter was trained on, and for an adapter that does not fit it.
    """
    start, names, _ = _open_on_base(Path(folder), base, verify=verify)
    if all(isinstance(layer.base, nn.Linear) for layer in find_adapted(names.model).values()):
        merge_lora_(names.model)
    return replace(start, model=start.model.requires_grad_(True).eval())


def continue_adapter(folder: str | Path, head: HeadSpec) -> tuple[StartingModel, LoRAConfig]:
    """Open the base of the adapter in `folder` with the adapter beside its weights, to be trained further.

    The config is the adapter's own. Raises what `open_adapter` raises, and `ConfigError` for an adapter whose answers
    are not those of `head`, or that adapts layers which are several of ours.
    """
    folder = Path(folder)
    start, names, settings = _open_on_base(folder, None, verify=True, entries=head.entries)
    theirs, model = start.source.head, start.model
    if theirs.purpose != head.purpose or (head.num_outputs, head.labels) != (theirs.num_outputs, theirs.labels):
        raise ConfigError(
            f"{folder} is an adapter for {_describe_head(theirs)}, and this run trains one for {_describe_head(head)}; "
            "begin with its base instead, or give data with the same classes"
        )
    adapted = find_adapted(model)
    if fused := [path for path in adapted if len(names.ours(names.theirs(path))) > 1]:
        raise ConfigError(
            f"{folder} adapts {names.theirs(fused[0])}, which is several layers of ours side by side, so that its rank "
            "would grow each time; make one model of both with `deepseek merge-adapter`, and train a new adapter on it"
        )
    config = LoRAConfig(
        rank=int(settings["r"]),
        alpha=float(settings["lora_alpha"]),
        dropout=float(settings.get("lora_dropout") or 0.0),
        targets=tuple(adapted),
        modules_to_save=tuple(settings.get("modules_to_save") or ()),
        rank_stabilized=bool(settings.get("use_rslora")),
    )
    saved = {name for name, parameter in model.named_parameters() if parameter.requires_grad and ".lora_" not in name}
    model.requires_grad_(False)
    for layer in adapted.values():
        layer.dropout = config.dropout
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in saved or ".lora_" in name)
    hold_norms_(model)
    new = tuple(name for name in start.new_tensors if name not in saved)
    return replace(start, model=model.train(), new_tensors=new), config


def adapts_just(start: StartingModel, patterns: Sequence[str]) -> bool:
    """Return whether `patterns` name the layers with an adapter, and no other linear layer."""
    names = _Names.of(start)
    chosen = {path for path, theirs in names.linear.items() if is_named((path, theirs), patterns)}
    return chosen == set(find_adapted(names.model))


def _describe_head(head: HeadSpec) -> str:
    named = f" ({', '.join(head.labels[:NUM_NAMED])})" if head.labels else ""
    return head.purpose if head.num_outputs is None else f"{head.purpose} with {head.num_outputs} outputs{named}"


def _open_on_base(
    folder: Path, base: str | Path | None, *, verify: bool, entries: Mapping[str, Any] | None = None
) -> tuple[StartingModel, _Names, dict[str, Any]]:
    """Open a base with its adapter beside the weights; what was trained in full is all that has gradients besides."""
    refuse_pickles(folder)
    manifest = open_artifact(folder, verify=verify).manifest if is_artifact(folder) else None
    settings = _read_settings(folder)
    tensors = _read_tensors(folder)
    source = _find_source(folder, manifest, settings, tensors, base)
    if entries is not None:
        source = replace(source, head=replace(source.head, entries=entries))
    start = open_start(source.name, source.head, weights=source.weights, settings=source.settings, allow_int8=True)
    if manifest is not None and manifest.parent_digest != start.parent_digest:
        raise ArtifactError(
            f"{folder} was trained on the model {str(manifest.parent_digest)[:_DIGITS]} and {source.name} is "
            f"{str(start.parent_digest)[:_DIGITS]}; give the folder of its own base, with --base or base="
        )
    names = _Names.of(start)
    start.model.requires_grad_(False)
    _put_on_(names, settings, tensors, folder)
    return replace(start, summary=f"{folder}, an adapter on {start.summary}", source=source), names, settings


def find_tokenizer_folder(folder: str | Path) -> Path:
    """Return the folder with the tokenizer of a model: `folder` itself, or of an adapter without one its base."""
    folder = Path(folder)
    if not is_adapter(folder) or (folder / TOKENIZER_NAME).is_file():
        return folder
    return Path(str(_read_settings(folder).get("base_model_name_or_path")))


def _put_on_(names: _Names, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Put an adapter that was read from `folder` on a model, in place."""
    pairs: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, mark, which = name.partition(".lora_")
        if mark:
            pairs.setdefault(path, {})[which.partition(".")[0]] = tensor
        else:
            saved[name] = tensor
    for theirs, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ArtifactError(
                f"{folder} holds {', '.join(f'lora_{name}' for name in sorted(pair))} of {theirs}, and an adapter of "
                "linear layers has a lora_A and a lora_B of each; adapt linear layers only"
            )
        _put_pair_(names, theirs, pair["A"], pair["B"], settings, folder)
    _put_saved_(names, saved, folder)


def _put_pair_(
    names: _Names, theirs: str, a_RI: Tensor, b_OR: Tensor, settings: Mapping[str, Any], folder: Path
) -> None:
    layers = {part: layer for part in names.ours(theirs) if (layer := _find_linear(names.model, part))}
    sizes = [layer.out_features for layer in layers.values()]
    rank = a_RI.shape[0]
    fits = b_OR.shape == (sum(sizes), rank) and {layer.in_features for layer in layers.values()} == {a_RI.shape[1]}
    if not fits:
        raise ArtifactError(
            f"{folder} adapts {theirs} with A {list(a_RI.shape)} and B {list(b_OR.shape)}, and the base has no linear "
            "layer of that name and these sizes; give the base that the adapter was trained on"
        )
    alpha = next((value for key, value in _alphas(settings).items() if _is_named(theirs, key)), settings["lora_alpha"])
    scaling = scaling_of(float(alpha), rank, is_stabilized=bool(settings.get("use_rslora")))
    for (part, layer), rows_OR in zip(layers.items(), b_OR.split(sizes), strict=True):
        adapted = LoRALinear(layer, rank, scaling)
        adapted.lora_A = nn.Parameter(a_RI.float().clone())
        adapted.lora_B = nn.Parameter(rows_OR.float().clone())
        put_(names.model, part, adapted)


def _put_saved_(names: _Names, saved: Mapping[str, Tensor], folder: Path) -> None:
    """Replace the parameters that were trained in full."""
    model = names.model
    modules = dict(model.named_modules())
    for name, tensor in names.our_tensors(saved).items():
        parent, _, last = name.rpartition(".")
        old = getattr(modules.get(parent), last, None)
        if not isinstance(old, Tensor) or old.shape != tensor.shape:
            raise ArtifactError(
                f"{folder} holds {name} of shape {list(tensor.shape)}, for which its base has no place; give the base "
                "that the adapter was trained on"
            )
        if isinstance(model, Decoder) and name == "head.weight" and model.config.tie_embeddings:
            model.config = model.config.override({"tie_embeddings": False})
        setattr(modules[parent], last, nn.Parameter(tensor.to(old.dtype, copy=True)))


def _read_settings(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`. Raises `ArtifactError` for an adapter of a kind that is not read."""
    settings = read_settings(folder / ADAPTER_CONFIG_NAME, error=CorruptArtifactError)
    if settings.get("peft_type") != "LORA":
        raise ArtifactError(
            f"{folder} is an adapter of type {settings.get('peft_type')!r}, and LORA is read only; merge it with peft"
        )
    unread = [name for name in _UNREAD if settings.get(name)]
    if settings.get("bias", "none") != "none":
        unread.append("bias")
    if unread:
        raise ArtifactError(
            f"{folder} uses {', '.join(unread)} of peft, which plain LoRA does not have; merge it with peft "
            "(`merge_and_unload`) and give the merged folder"
        )
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CorruptArtifactError(
            f"{folder / ADAPTER_CONFIG_NAME} has lora_alpha={alpha!r}, and a finite number is needed; copy the adapter "
            "again"
        )
    return settings


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / ADAPTER_WEIGHTS_NAME
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; copy the adapter again, with its weights as safetensors")
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in read_tensor_file(path).items()}
    refuse_no_numbers(tensors, folder)
    return tensors


def _find_source(
    folder: Path,
    manifest: Manifest | None,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: str | Path | None,
) -> StartSource:
    """Return the base of an adapter: the one that is given, or the one that it names."""
    recorded = None if manifest is None else manifest.architecture_config.get("base")
    if isinstance(recorded, dict):
        source = StartSource.from_dict(recorded)
    else:
        source = StartSource(str(settings.get("base_model_name_or_path")), _guess_head(folder, settings, tensors))
    if base is not None:
        source = source.at(str(base))
    where = Path(source.weights or source.name)
    if not where.exists():
        raise ArtifactError(
            f"{folder} is an adapter on {where}, which is not there; give the folder of its base, with --base or base="
        )
    return source


def _guess_head(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> HeadSpec:
    """Return the head of the base that `peft` trained on, by the task that it noted."""
    task_type = settings.get("task_type") or "CAUSAL_LM"
    purpose = next((purpose for purpose, name in _TASK_TYPES.items() if name == task_type), None)
    if purpose is None:
        raise ArtifactError(f"{folder} was trained for {task_type}, which is not read; merge it with peft")
    if purpose == CAUSAL_LM.purpose:
        return CAUSAL_LM
    heads = [tensor for name, tensor in tensors.items() if ".lora_" not in name and name.endswith("weight")]
    return HeadSpec(purpose, heads[-1].shape[0] if heads else None)  # type: ignore[arg-type]


def _alphas(settings: Mapping[str, Any]) -> dict[str, float]:
    return dict(settings.get("alpha_pattern") or {})


def _is_named(theirs: str, key: str) -> bool:
    """Return whether a key of a pattern of `peft` names the layer `theirs`: its end, or all of it."""
    return theirs == key or theirs.endswith(f".{key}")


# ---- names


@dataclass(frozen=True, eq=False)
class _Names:
    """The names of a model's layers at Hugging Face, and back."""

    model: nn.Module
    family: Family | None
    """The family of a decoder whose names are used, that of its folder; none where names are ours."""

    @classmethod
    def of(cls, start: StartingModel) -> _Names:
        """Return the names in the folder that the model came from."""
        if not isinstance(start.model, Decoder):
            return cls(start.model, None)
        model_type = "" if start.folder is None else str(ModelFolder(start.folder).config.get("model_type"))
        return cls(start.model, FAMILIES.get(model_type) or find_family(start.model.config))

    @property
    def fused(self) -> Mapping[str, Sequence[str]]:
        """Their layers that are several of ours."""
        return {} if self.family is None else self.family.fused

    @property
    def linear(self) -> dict[str, str]:
        """Their name of each linear layer, by ours."""
        return {
            path.removesuffix(".base"): self.theirs(path.removesuffix(".base"))
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear | Int8Linear)
        }

    def theirs(self, path: str) -> str:
        """Return their name of a layer."""
        if self.family is not None:
            return name_module(path, self.family)
        return path.removeprefix("model.") if isinstance(self.model, TransformersModel) else path

    def their_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename tensors that are trained in full."""
        if self.family is not None:
            return export_tensors(tensors, self.family)
        return {self.theirs(name): tensor for name, tensor in tensors.items()}

    def our_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename their tensors."""
        if self.family is not None:
            return import_tensors(tensors, self.family)
        return {self._ours(name): tensor for name, tensor in tensors.items()}

    def ours(self, theirs: str) -> list[str]:
        """Return the layers of ours that their layer is."""
        return [self._ours(theirs)] if self.family is None else find_modules(theirs, self.family)

    def _ours(self, name: str) -> str:
        return f"model.{name}" if isinstance(self.model, TransformersModel) else name


def _find_linear(model: nn.Module, path: str) -> nn.Linear | Int8Linear | None:
    """Return the linear layer `path`, or `None` where there is none."""
    layer = dict(model.named_modules()).get(path)
    if isinstance(layer, LoRALinear):
        layer = layer.base
    return layer if isinstance(layer, nn.Linear | Int8Linear) else None


# What a task is called in peft.
_TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "hidden_states": "FEATURE_EXTRACTION",
}
# Settings of peft that change what an adapter computes.
_UNREAD = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "arrow_config",
)
