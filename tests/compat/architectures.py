"""Every architecture of `transformers`, built without values, as it is in memory and as it is written to a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto

from deepseek.compat.tensors import TensorSpec

MAX_TENSORS = 2_500
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"),
    *("num_encoder_layers", "num_decoder_layers", "encoder_num_layers", "decoder_num_layers"),
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def list_classes() -> dict[str, str]:
    """The name of one class of each model type, the one that continues texts where there is one."""
    found: dict[str, str] = {}
    mappings = [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("MAPPING_NAMES")]
    for names in mappings:
        for model_type, classes in names.items():
            for name in [classes] if isinstance(classes, str) else classes:
                if not name.endswith("Config") and (model_type not in found or "ForCausalLM" in name):
                    found[model_type] = name
    return found


def describe_forms(name: str) -> Iterator[dict[str, TensorSpec]]:
    """The tensors of a shallow model of the class of that name: in memory, and in the file that it writes."""
    kind = getattr(transformers, name, None)
    model = _build(kind) if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None
    if model is None or len(model.state_dict()) > MAX_TENSORS:
        return
    tensors = model.state_dict()
    yield _describe(tensors)
    tied = getattr(model, "all_tied_weights_keys", {})
    with contextlib.suppress(Exception):  # some rules of the library do not run without values
        yield _describe(revert_weight_conversion(model, {n: t for n, t in tensors.items() if n not in tied}))


def _build(kind: type[transformers.PreTrainedModel]) -> torch.nn.Module | None:
    """The model, with two layers where the config lets it; none where the library cannot build it from defaults."""
    for shrink in (_shrink, lambda config: config):
        with contextlib.suppress(Exception), torch.device("meta"):
            return kind(shrink(kind.config_class()))
    return None


def _shrink(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    for names, largest in ((_LAYERS, 2), (_EXPERTS, 8)):
        for name in names:
            if isinstance(getattr(config, name, None), int) and getattr(config, name) > largest:
                setattr(config, name, largest)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list | tuple) and len(kinds) > 2:
        shorter = (list(dict.fromkeys(kinds)) * 2)[: max(2, len(set(kinds)))]
        config.layer_types, config.num_hidden_layers = shorter, len(shorter)
    for part in list(vars(config).values()):
        if isinstance(part, transformers.PretrainedConfig):
            _shrink(part)
    return config


def _describe(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {n: TensorSpec(_DTYPES[t.dtype], tuple(t.shape)) for n, t in tensors.items() if t.dtype in _DTYPES}
