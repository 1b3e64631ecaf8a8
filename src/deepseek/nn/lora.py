"""LoRA: linear layers that stay as they are, with a small trained correction of low rank beside each.

    y = W x + scaling * B A dropout(x)        A (rank, inputs), B (outputs, rank), scaling = alpha / rank

B starts at zero, so that a model with fresh adapters answers as before. W gets no gradient: it may be int8 (QLoRA), and
optimizer states are those of A and B alone. `add_lora_` wraps the layers, `merge_lora_` adds B A to the weights and
takes the wrappers off.

What an adapter costs beside its layer is skinny matmuls, whose speed depends on which side is thin: on a Zen 3, 512
rows of 1,536 gradients times B take 1.4 ms, and B^T times their transpose 0.4. So float layers and their corrections
are one autograd function, in which the rank comes first and sums are taken in place; the bases are as they were.

Source: Hu et al. 2021, "LoRA", section 4; Kalajdzievski 2023 for `rank_stabilized` (alpha / sqrt(rank)).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepseek.core.config import Config
from deepseek.core.errors import ConfigError
from deepseek.nn.freezing import explain_no_match, hold_norms_
from deepseek.nn.plain_linear import is_plain_linear, matmul_dtype
from deepseek.nn.quantized import Int8Linear

ALL_LINEAR = "all-linear"
"""The target that stands for every linear layer except the head."""
# Layers whose weights are read by name, not through a call: routers and gates of the mask.
_READ_BY_NAME = ("gate", "refine", "far_gate")


class LoRAConfig(Config):
    """Which layers get an adapter, and its size."""

    rank: int = Field(default=8, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(default=16.0, gt=0)
    """The correction is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the inputs of A that is dropped in training."""
    targets: tuple[str, ...] = Field(default=(ALL_LINEAR,), min_length=1)
    """Patterns of linear layers, by our names or those of Hugging Face: [q_proj, "layers.*.mlp.*"]; `all-linear` is
    every one except the head."""
    modules_to_save: tuple[str, ...] = ()
    """Patterns of modules that are trained in full and saved with the adapter; a new head always is."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that higher ranks learn as fast."""

    @property
    def scaling(self) -> float:
        """What the correction is multiplied by."""
        return scaling_of(self.alpha, self.rank, is_stabilized=self.rank_stabilized)


def scaling_of(alpha: float, rank: int, *, is_stabilized: bool) -> float:
    """Return what a correction of `rank` is multiplied by.

    >>> scaling_of(16.0, 4, is_stabilized=False), scaling_of(16.0, 4, is_stabilized=True)
    (4.0, 8.0)
    """
    return alpha / (math.sqrt(rank) if is_stabilized else rank)


class LoRALinear(nn.Module):
    """A linear layer, float or int8, that stays as it is, and its correction."""

    def __init__(self, base: nn.Linear | Int8Linear, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scaling, self.dropout = scaling, dropout
        self.base = base.requires_grad_(False)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.lora_A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        if self._is_one_function:
            return _run_adapted(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scaling)
        y: Tensor = self.base(x)
        inner = F.linear(F.dropout(x, self.dropout, self.training) if self.dropout else x, self.lora_A)
        # One kernel multiplies by B and adds, instead of three that pass over the outputs.
        added = torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), self.lora_B.t().to(y.dtype), alpha=self.scaling)
        return added.view(y.shape)

    @property
    def _is_one_function(self) -> bool:
        """Whether base and correction are computed by `_AdaptedLinear`; compilers read the written-out form."""
        if torch.compiler.is_compiling() or (self.dropout and self.training):
            return False
        return is_plain_linear(self.base) and not any(tensor.requires_grad for tensor in self.base.parameters())

    def correction(self) -> Tensor:
        """Return scaling * B A, (outputs, inputs)."""
        return self.scaling * (self.lora_B @ self.lora_A)


def _run_adapted(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
) -> Tensor:
    """Run `_AdaptedLinear` in the precision of a linear layer here."""
    dtype = matmul_dtype(x)
    if dtype != x.dtype:
        x, weight_OI = x.to(dtype), weight_OI.to(dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
    y: Tensor = _AdaptedLinear.apply(x, weight_OI, bias_O, a_RI.to(dtype), b_OR.to(dtype), scaling)  # type: ignore[no-untyped-call]
    return y


class _AdaptedLinear(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T with a frozen W; M rows, I inputs, O outputs, R rank."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        x_MI = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            y_MO = F.linear(x_MI, weight_OI, bias_O)
            inner_RM = a_RI @ x_MI.t()
            y_MO.addmm_(inner_RM.t(), b_OR.t(), alpha=scaling)
        ctx.save_for_backward(x_MI, weight_OI, a_RI, b_OR, inner_RM)
        ctx.scaling = scaling
        return y_MO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, weight_OI, a_RI, b_OR, inner_RM = ctx.saved_tensors
        gradient_MO = gradient.reshape(-1, gradient.shape[-1])
        inner_gradient_RM = (ctx.scaling * b_OR.t()).contiguous() @ gradient_MO.t()
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient_MI = gradient_MO @ weight_OI
            x_gradient_MI.addmm_(inner_gradient_RM.t(), a_RI)
            x_gradient = x_gradient_MI.view(*gradient.shape[:-1], -1)
        a_gradient_RI = inner_gradient_RM @ x_MI
        b_gradient_OR = (ctx.scaling * (inner_RM @ gradient_MO)).t()
        return x_gradient, None, None, a_gradient_RI, b_gradient_OR, None


def add_lora_(
    model: nn.Module,
    config: LoRAConfig,
    *,
    aliases: Mapping[str, str] | None = None,
    new_tensors: Collection[str] = (),
) -> list[str]:
    """Freeze `model`, put adapters on its linear layers, in place, and return the paths of these.

    `aliases` are other names of modules by their paths, which targets may use as well. Modules with `new_tensors` are
    trained in full. Raises `ConfigError` for a target or a module to save that matches nothing, or that shares its
    weights with another module.
    """
    names = {path: (path, (aliases or {}).get(path, path)) for path, _ in model.named_modules() if path}
    heads = {name.rpartition(".")[0] for name in new_tensors}
    heads |= set(_find(names, config.modules_to_save, "modules_to_save"))
    linear = {path for path, module in model.named_modules() if _is_target(path, module)} - heads
    patterns = [pattern for pattern in config.targets if pattern != ALL_LINEAR]
    _refuse_kinds(model, names, linear, patterns)
    chosen = set(_find({path: names[path] for path in names if path in linear}, patterns, "targets"))
    if len(patterns) < len(config.targets):
        chosen |= linear - _find_head(model)
    if not chosen:
        raise ConfigError(
            f"adapter.targets={list(config.targets)} names no linear layer of this {type(model).__name__} besides its "
            "head; train the head alone with freeze, or choose another model"
        )
    _refuse_shared(model, {*chosen, *heads})
    model.requires_grad_(False)
    targets = [path for path in names if path in chosen]
    for path in targets:
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear | Int8Linear)
        put_(model, path, LoRALinear(layer, config.rank, config.scaling, config.dropout))
    for path in heads:
        model.get_submodule(path).requires_grad_(True)
    hold_norms_(model)
    return targets


def find_adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers with an adapter, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def is_named(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether any of the names of a layer matches any of `patterns`, as targets do.

    >>> is_named(["layers.0.attention.q_proj"], ["k_proj", "q_proj"])
    True
    """
    return any(_matches(name, pattern) for name in names for pattern in patterns)


def merge_lora_(model: nn.Module) -> nn.Module:
    """Add the corrections to the weights and take the adapters off, in place, and return `model`.

    Raises `ConfigError` for int8 weights, which cannot hold them.
    """
    for path, layer in find_adapted(model).items():
        if not isinstance(layer.base, nn.Linear):
            raise ConfigError(
                f"{path} has int8 weights, which an adapter cannot be added to; widen the model to float first"
            )
        with torch.no_grad():
            layer.base.weight += layer.correction().to(layer.base.weight.dtype)
        put_(model, path, layer.base)
    return model


def put_(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _is_target(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Int8Linear) and path.rpartition(".")[2] not in _READ_BY_NAME


def _find_head(model: nn.Module) -> set[str]:
    """Return the path of the last linear layer, which gives the outputs."""
    return set([path for path, module in model.named_modules() if _is_target(path, module)][-1:])


def _find(names: Mapping[str, Sequence[str]], patterns: Sequence[str], setting: str) -> list[str]:
    """Return the paths whose names match `patterns`, each of which has to match something."""
    found: list[str] = []
    for pattern in patterns:
        fitting = [path for path, both in names.items() if any(_matches(name, pattern) for name in both)]
        if not fitting:
            known = [name for both in names.values() for name in both]
            raise ConfigError(explain_no_match(f"adapter.{setting}", pattern, known, "layer that can have an adapter"))
        found += fitting
    return found


def _refuse_kinds(
    model: nn.Module, names: Mapping[str, Sequence[str]], linear: Collection[str], patterns: Sequence[str]
) -> None:
    """Raise for a pattern that names modules with weights of their own, but none that an adapter can be put on."""
    for pattern in patterns:
        fitting = [path for path, both in names.items() if any(_matches(name, pattern) for name in both)]
        others = {path: model.get_submodule(path) for path in fitting if path not in linear}
        others = {path: module for path, module in others.items() if module._parameters}
        if others and len(others) == len(fitting):
            path, module = next(iter(others.items()))
            raise ConfigError(
                f"adapter.targets has the pattern {pattern!r}, which names {path}, a {type(module).__name__}, and "
                "adapters are for linear layers; leave it out, or train it in full with adapter.modules_to_save"
            )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _refuse_shared(model: nn.Module, paths: Collection[str]) -> None:
    """Raise where a weight of these modules is another module's as well: an adapter there would part them."""
    owners: dict[int, str] = {}
    for path, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            owner = owners.setdefault(id(tensor), path)
            if owner != path and {owner, path} & set(paths):
                raise ConfigError(
                    f"{path} shares its weights with {owner}, so that neither can be adapted alone; leave both out of "
                    "adapter.targets and adapter.modules_to_save"
                )
