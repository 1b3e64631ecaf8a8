"""From a model and a config to a torch optimizer.

Weights that multiply (two or more dims, embeddings aside) are decayed; norms, biases and embeddings are not. AdamW runs
torch's fused kernel. SGD is for convolutions and for comparing gradients, since Adam hides a wrong scale.

`muon` orthogonalizes the updates of the matrices between the embedding and the head (Jordan et al. 2024; `muon.py`) and
leaves everything else to AdamW, stacked experts too. A head is known by its name, `head` or `lm_head`. Its updates are
scaled to the size that AdamW's would have (Liu et al. 2025), so that one learning rate serves both.
On the quickstart's run it is worth more than twice the steps: see docs/log.md.

`schedule_free` is AdamW whose model is an average along its path, so that no schedule is needed (`schedule_free.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from deepseek.core.config import Config
from deepseek.core.errors import ConfigError
from deepseek.optim.clipping import CLIP_WINDOW
from deepseek.optim.gradient_prediction import GradientPredictionConfig, read_gradient_prediction
from deepseek.optim.layer_depths import find_depths
from deepseek.optim.learning_rates import BASE_LEARNING_RATE, REFERENCE_BATCH_SIZE, Schedule, read_schedule
from deepseek.optim.muon import Muon
from deepseek.optim.schedule_free import build_schedule_free


class OptimizerConfig(Config):
    """Optimizer, learning rate and clipping."""

    name: Literal["adamw", "muon", "schedule_free", "sgd"] = "adamw"
    """Update rule."""
    base_learning_rate: float = Field(default=BASE_LEARNING_RATE, gt=0)
    """Peak learning rate for a batch of `reference_batch_size` sequences; it scales linearly with the batch."""
    reference_batch_size: int = Field(default=REFERENCE_BATCH_SIZE, ge=1)
    """Sequences per optimizer step that `base_learning_rate` is meant for."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay of weight matrices, per step and unit of learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moment per step."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to AdamW's denominator."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the learning rate from each block to the one before it: the head learns at the full rate, the last of
    L blocks at `layer_decay`, the embedding at its power L + 1. 1 gives all the same rate."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of SGD."""
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient, 0.5 to 2.0 as a rule; none does not clip. A run also reads it as
    `ds_grad_clip`."""
    adaptive_clip: float | None = Field(default=None, gt=0, le=100)
    """Percentile of the last norms that a larger gradient is scaled to, 90 for example; `grad_clip` stays the upper
    bound. None clips by `grad_clip` alone."""
    adaptive_clip_window: int = Field(default=CLIP_WINDOW, ge=1)
    """Steps whose norms count as the last ones."""
    gradient_prediction: Annotated[GradientPredictionConfig | None, BeforeValidator(read_gradient_prediction)] = None
    """Damp steps before a divergence that the last losses and norms announce: `true`, or settings; none does not."""
    schedule: Annotated[Schedule, BeforeValidator(read_schedule)] = "cosine"
    """Shape of the learning rate over the run; `wsd` (warm-up, stable, decay) is another name for `trapezoid`. Not read
    by `schedule_free`, which has a warm-up alone."""
    warmup_steps: int = Field(default=20, ge=0)
    """Optimizer steps of linear warm-up."""
    final_factor: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a multiple of the peak."""
    decay_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the run over which a trapezoid falls."""

    @property
    def used_schedule(self) -> Schedule:
        """The schedule that steps follow."""
        return "constant" if self.name == "schedule_free" else self.schedule


def build_optimizer(model: nn.Module, config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
    """Build a torch optimizer over all trainable parameters of `model`.

    Raises `ConfigError` for a model without blocks where learning rates depend on them.
    """
    optimizer = _BUILDERS[config.name](model, config, learning_rate)
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use `learning_rate` in every parameter group from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(_SCALE, 1.0)


def scale_learning_rate_(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply every learning rate by `factor`, until one is set again."""
    if factor != 1.0:
        for group in optimizer.param_groups:
            group["lr"] *= factor


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give `optimizer` a saved state, each tensor of it laid out in memory as its parameter is.

    Files hold tensors row by row, and torch's fused kernels walk the memory of a parameter and its moments in step:
    where a convolution has its channels last, they would pair the wrong numbers.
    """
    optimizer.load_state_dict(state)
    for part in optimizer.parts if isinstance(optimizer, JointOptimizer) else (optimizer,):
        for parameter, values in part.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class JointOptimizer(torch.optim.Optimizer):
    """Two optimizers, each with its own parameters, that act as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        # The parts read the very groups that are shown here, so a learning rate set on one is set on the other.
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of each part; there is no closure, since two parts cannot share one evaluation."""
        if closure is not None:
            raise ConfigError("a joint optimizer takes no closure; compute the gradients before step()")
        for part in self.parts:
            part.step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: nobody could say which part should update the new parameters."""
        if len(self.param_groups) == sum(len(part.param_groups) for part in self.parts):
            raise ConfigError("a joint optimizer takes no new parameters; build it again from the whole model")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the parts' states, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split trainable parameters into those that are decayed (two dims or more, embeddings aside) and the others."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2 and id(parameter) not in embeddings]
    kept = [parameter for parameter in parameters if parameter.ndim < 2 or id(parameter) in embeddings]
    return decayed, kept


def _build_adamw(model: nn.Module, config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
    return _adamw(_groups(model, *split_parameters(model), config), config, learning_rate)


def _build_muon(model: nn.Module, config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
    decayed, kept = split_parameters(model)
    heads = {id(head.weight) for name, head in model.named_modules() if _is_head(name) and isinstance(head, nn.Linear)}
    matrices = [
        parameter
        for parameter in decayed
        if parameter.ndim == 2 and min(parameter.shape) >= _SMALLEST_MATRIX and id(parameter) not in heads
    ]
    if not matrices:
        raise ConfigError("muon is for matrices and this model has none between its embedding and head; choose 'adamw'")
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in decayed if id(parameter) not in chosen]
    muon = Muon(_groups(model, matrices, [], config), learning_rate)
    return JointOptimizer(muon, _adamw(_groups(model, others, kept, config), config, learning_rate))


def _is_head(path: str) -> bool:
    return path.rpartition(".")[2] in ("head", "lm_head")


def _build_sgd(model: nn.Module, config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
    groups = _groups(model, *split_parameters(model), config)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum)


def _build_schedule_free(model: nn.Module, config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
    groups = _groups(model, *split_parameters(model), config)
    return build_schedule_free(groups, learning_rate, config.betas, config.eps)


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=learning_rate, betas=config.betas, eps=config.eps, fused=True)


def _groups(
    model: nn.Module, decayed: list[nn.Parameter], kept: list[nn.Parameter], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Group the parameters by their decay and, with `layer_decay`, by the depth of their block."""
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    if config.layer_decay != 1:
        depths, last = find_depths(model)
        depth_of = {id(parameter): depths[name] for name, parameter in model.named_parameters()}
        groups = [
            {"params": [parameter for parameter in group["params"] if depth_of[id(parameter)] == depth]}
            | {"weight_decay": group["weight_decay"], _SCALE: config.layer_decay ** (last - depth)}
            for group in groups
            for depth in range(last + 1)
        ]
    return [group for group in groups if group["params"]]


# Key of a parameter group: what the learning rate of the run is multiplied by.
_SCALE = "learning_rate_scale"
# A narrower matrix (a router, a gate) is a handful of vectors; there is nothing to orthogonalize.
_SMALLEST_MATRIX = 16
_BUILDERS = {
    "adamw": _build_adamw,
    "muon": _build_muon,
    "schedule_free": _build_schedule_free,
    "sgd": _build_sgd,
}
