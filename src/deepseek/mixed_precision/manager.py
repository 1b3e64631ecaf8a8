"""A model in mixed precision with one line: as a wrapper, as a context, and at the levels O0, O1 and O2.

    manager = PrecisionManager(model)            # FP16, BF16 or TF32, by what the device has
    outputs = manager.forward(inputs)            # or manager(inputs)
    with manager:                                # the same for code that calls the model itself
        outputs = model(inputs)

At O2 the weights themselves are 16 bits wide and the optimizer updates FP32 masters of them, which it is given by
`manager.use_masters_(optimizer)`: gradients go into the masters as they are formed, so that accumulating, clipping
`manager.master_params` and a `GradScaler` work on FP32, and after each step the masters are rounded into the weights.
An update smaller than half a 16-bit step would otherwise be lost every time (Micikevicius et al. 2018, section 3.1).

TF32 is a way of multiplying FP32 numbers that NVIDIA GPUs have since Ampere; elsewhere asking for it is an error.
Speed comes from hardware: on most CPUs with the instructions bf16 matmuls pay, and FP16 is for trying numerics.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.mixed_precision.amp_levels import Level, choose_level
from deepseek.mixed_precision.forward_precision import is_bf16_faster

ManagedPrecision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_TF32_CAPABILITY = (8, 0)
# Norms add up many squares; their few weights stay FP32 at O2.
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


class PrecisionManager:
    """Runs `model` under a precision and a level; at O2 its weights are narrowed in place when this is built.

    `precision` is `fp16`, `bf16`, `tf32`, `fp32`, or `auto`: bf16 where it is faster, else FP16 on a GPU, else
    FP32. `level` defaults to the environment's `DS_AMP_LEVEL`, else O1. Raises `ConfigError` for a precision that the
    model's device does not have.

    >>> manager = PrecisionManager(nn.Linear(4, 2), precision="bf16")
    >>> manager.forward(torch.ones(3, 4)).dtype, manager.fp16_params[0].dtype
    (torch.bfloat16, torch.bfloat16)
    """

    def __init__(self, model: nn.Module, precision: ManagedPrecision = "auto", *, level: Level | None = None) -> None:
        self.model = model
        self.level = choose_level(level)
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.precision = "fp32" if self.level == "O0" else resolve_precision(precision, self.device)
        self.dtype = _DTYPES[self.precision]
        self._contexts: list[ExitStack] = []
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        if self.level == "O2" and self.dtype != torch.float32:
            self._masters = narrow_weights_(model, self.dtype)
            for weight, master in self._masters.items():
                _send_gradient(weight, master)

    def forward(self, *inputs: Any, **named_inputs: Any) -> Any:
        """Return the model's answer under this precision."""
        with self.context():
            return self.model(*inputs, **named_inputs)

    __call__ = forward

    def __enter__(self) -> Self:
        stack = ExitStack()
        stack.enter_context(self.context())
        self._contexts.append(stack)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._contexts.pop().__exit__(*exception)

    @property
    def fp16_params(self) -> list[Tensor]:
        """The parameters as the matmuls read them: the weights themselves at O2, else copies rounded now."""
        return [
            parameter if parameter in self._masters else parameter.detach().to(self.dtype)
            for parameter in self.model.parameters()
        ]

    @property
    def master_params(self) -> list[nn.Parameter]:
        """Return the parameters for the optimizer, all FP32: masters of narrowed weights, others as they are."""
        return [self._masters.get(parameter, parameter) for parameter in self.model.parameters()]

    def use_masters_(self, optimizer: torch.optim.Optimizer) -> None:
        """Let `optimizer`, built from the model's parameters and not yet stepped, update the FP32 masters instead."""
        if not self._masters:
            return
        if optimizer.state:
            raise ConfigError("the optimizer has stepped already; hand it to use_masters_ before its first step")
        for group in optimizer.param_groups:
            group["params"] = [self._masters.get(parameter, parameter) for parameter in group["params"]]
        optimizer.register_step_post_hook(lambda *_: self.round_masters_())

    @torch.no_grad()
    def round_masters_(self) -> None:
        """Write the masters, rounded, into the weights."""
        if self._masters:
            torch._foreach_copy_(list(self._masters), list(self._masters.values()))

    def state_dict(self) -> dict[str, Any]:
        """Return the masters by parameter name; the weights follow from them."""
        named = {parameter: name for name, parameter in self.model.named_parameters()}
        masters = {named[weight]: master.detach() for weight, master in self._masters.items()}
        return {"level": self.level, "precision": self.precision, "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over masters, and round them into the weights. Raises `ConfigError` for those of another model."""
        named = dict(self.model.named_parameters())
        if {named[name] for name in state["masters"] if name in named} != set(self._masters):
            raise ConfigError(
                f"the state has masters for {len(state['masters'])} parameters and this model at level {self.level} "
                f"for {len(self._masters)} others; load it into the same model at level {state['level']}"
            )
        for name, master in state["masters"].items():
            self._masters[named[name]].copy_(master)
        self.round_masters_()

    def context(self) -> AbstractContextManager[object]:
        """Return a fresh context for one forward pass."""
        if self.precision == "fp32":
            return torch.autocast(self.device.type, enabled=False)
        if self.precision == "tf32":
            return tf32_matmuls()
        return torch.autocast(self.device.type, dtype=self.dtype)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the concrete precision for `device`. Raises `ConfigError` for one that is unknown or missing there."""
    if precision not in get_args(ManagedPrecision):
        raise ConfigError(explain_unknown("precision", precision, get_args(ManagedPrecision)))
    if precision == "auto":
        if is_bf16_faster(device):
            return "bf16"
        return "fp16" if device.type == "cuda" else "fp32"
    if precision == "tf32" and not has_tf32(device):
        raise ConfigError(
            f"precision 'tf32' was asked for and {device} does not have it (NVIDIA GPUs since Ampere do); "
            "choose 'bf16', 'fp32' or 'auto'"
        )
    return precision


def has_tf32(device: torch.device) -> bool:
    """Return whether `device` multiplies FP32 numbers in TF32."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= _FIRST_TF32_CAPABILITY
    )


@contextmanager
def tf32_matmuls() -> Any:
    """FP32 matmuls and convolutions on CUDA in TF32, and afterwards as they were."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@torch.no_grad()
def narrow_weights_(model: nn.Module, dtype: torch.dtype) -> dict[nn.Parameter, nn.Parameter]:
    """Give all float32 weights but those of norms `dtype`, in place; return the FP32 master of each."""
    of_norms = {
        id(parameter) for module in model.modules() if isinstance(module, _NORMS) for parameter in module.parameters()
    }
    masters: dict[nn.Parameter, nn.Parameter] = {}
    for weight in model.parameters():
        if weight.dtype == torch.float32 and id(weight) not in of_norms:
            masters[weight] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            weight.data = weight.data.to(dtype)
    return masters


def _send_gradient(weight: nn.Parameter, master: nn.Parameter) -> None:
    """Add each gradient of `weight` to its master's, in FP32, and keep none in 16 bits."""

    def send(parameter: Tensor) -> None:
        assert parameter.grad is not None
        wide = parameter.grad.float()
        master.grad = wide if master.grad is None else master.grad.add_(wide)
        parameter.grad = None

    if weight.requires_grad:
        weight.register_post_accumulate_grad_hook(send)
