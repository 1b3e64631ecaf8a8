"""Precision chosen layer by layer while a model trains, from what its gradients are like.

    dynamic = DynamicPrecision(model)
    for batch in loader:
        loss = loss_function(model(batch.x).float(), batch.y)
        loss.backward()
        optimizer.step()
        for event in dynamic.step():     # before the gradients are cleared
            print(event)
        optimizer.zero_grad()
    print(dynamic.explain())

Every so many steps it looks (`watching`): histograms of exponents of each layer's activations and gradients, and how
much the weight's gradient varies from batch to batch. After a window of such steps it decides (`deciding`): a layer
runs in 16 bits where its rounding noise drowns in its gradient noise, nothing leaves the format's range and something
is gained (`costs`); else in FP32. It carries the decisions out (`narrowing`), and they stand until the next window, so
that compiled code is compiled again only when one changes. What a layer is: a module with a weight matrix of its own
(linear, convolution, recurrent, attention); operators between layers run as the layers beside them do.

Infinities are traced to the layer where they began and put it into FP32 at once. The numbers are added up over all
ranks before anything is decided, so every rank decides the same. Decisions are events, and part of `state_dict()`.

Cost: nothing on most steps but the contexts; a sampled step is an eager one, with one more reading pass over the
layers' activations and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepseek.core.errors import CheckpointError, ConfigError
from deepseek.core.events import Event
from deepseek.core.names import explain_unknown
from deepseek.mixed_precision.costs import Saving, assume_saving, measure_saving
from deepseek.mixed_precision.forward_precision import has_native_bf16
from deepseek.mixed_precision.gradient_statistics import Sample, Watch, sample_gradient
from deepseek.mixed_precision.layer_precision import Compute, clear_compute_, set_compute_, tally_of
from deepseek.mixed_precision.loss_scaling import Group
from deepseek.mixed_precision.policy import (
    Evidence,
    LayerState,
    Rules,
    Verdict,
    apply_hysteresis,
    choose,
    find_culprits,
    find_format,
)
from deepseek.mixed_precision.sample_window import SampleWindow

Low = Literal["auto", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_STATE_VERSION = 1


@dataclass(frozen=True)
class PrecisionChanged(Event):
    """A layer goes on in another precision."""

    step: int
    """Steps done."""
    layer: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True)
class PrecisionPlanned(Event):
    """A window of samples is over and all layers were looked at."""

    step: int
    num_low: int
    """Layers in 16 bits."""
    num_layers: int
    joint_share: float
    """Rounding noise over gradient noise, summed over the layers in 16 bits."""


class DynamicPrecision:
    """Runs the layers of `model`, changed in place, in FP32 or in `low`, and decides anew as `step` is called.

    `low` is `bf16`, `fp16`, or `auto` by device. `every` is the number of steps between two samples and `window` the
    number of samples behind one decision; the first windows are sampled on every step. `rules` are the bounds. With
    `start="low"` all layers begin in 16 bits, with `"fp32"` they earn it; `auto` is `low` for bf16, whose range is
    FP32's, and `fp32` for FP16. `narrow_storage` keeps FP32 activations in bf16 between the two passes, except those of
    FP32 layers. `costs` is `measured` or, for runs that must repeat exactly, `assumed`. A `scaler` has the scale that
    FP16 gradients have. `group` are the ranks that decide together. A model that was compiled, by `model.compile()` or
    by `torch.compile(model)` given here, runs as it is written on sampled steps.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> dynamic = DynamicPrecision(model, low="bf16")
    >>> model(torch.ones(1, 8)).dtype, dynamic.precisions
    (torch.bfloat16, {'0': 'bf16', '2': 'bf16'})
    >>> dynamic.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        low: Low = "auto",
        every: int = 100,
        window: int = 4,
        rules: Rules = Rules(),  # noqa: B008 - frozen
        start: Literal["auto", "low", "fp32"] = "auto",
        narrow_storage: bool = True,
        costs: Literal["measured", "assumed"] = "measured",
        scaler: torch.amp.GradScaler | None = None,
        group: Group = "world",
    ) -> None:
        _check_settings(every, window, rules, start, costs)
        self._compiled = model if hasattr(model, "_orig_mod") else None  # what torch.compile(model) returns
        self.model = model = getattr(model, "_orig_mod", model)
        self.layers = find_layers(model)
        self.device = next(model.parameters()).device
        self.low = choose_low(low, self.device)
        self.every, self.window, self.rules = every, window, rules
        self.narrow_storage, self.costs, self.scaler, self.group = narrow_storage, costs, scaler, group
        self.num_steps = 0
        self.savings: dict[str, Saving] = {}
        self.evidence: dict[str, Evidence] = {}
        self.verdicts: dict[str, Verdict] = {}
        begins_low = start == "low" or (start == "auto" and self.low == "bf16")
        self.states = {name: LayerState(self.low if begins_low else "fp32") for name in self.layers}
        self._must_sample = False
        self._watch: Watch | None = None
        self._stash = ExitStack()
        self._window = SampleWindow(tuple(self.layers), self.device, group)
        self._apply()
        self._watch_next()

    @property
    def precisions(self) -> dict[str, str]:
        """The precision of each layer now."""
        return {name: state.precision for name, state in self.states.items()}

    def step(self, *, is_skipped: bool = False) -> tuple[Event, ...]:
        """Report that an optimizer step is done, before its gradients are cleared; return what changed.

        `is_skipped` says that a scaler skipped the step: the next one is sampled, to see where the infinity comes from.
        Raises `ConfigError` where there are no gradients to look at on a step that is sampled.
        """
        self.num_steps += 1
        tally_of(self.model).close_step()
        events = self._close_sample() if self._watch is not None else ()
        self._must_sample = is_skipped
        self._watch_next()
        return events

    def explain(self) -> str:
        """Show a table of the layers: precision, rounding noise over gradient noise, underflow, time saved, and why."""
        head = ("layer", "runs in", "noise share", "underflow", "saved ms", "saved MB", "because")
        rows = [head, *(self._row(name) for name in self.layers)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
        return "\n".join(
            "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1])) for row in rows
        )

    def remove(self) -> None:
        """Take everything off the model again."""
        self._unwatch()
        for module in self.model.modules():
            clear_compute_(module)

    def state_dict(self) -> dict[str, Any]:
        """Decisions and the window in progress: plain values and tensors."""
        return {
            "version": _STATE_VERSION,
            "low": self.low,
            "num_steps": self.num_steps,
            "must_sample": self._must_sample,
            "layers": {name: (layer.precision, layer.num_good, layer.reason) for name, layer in self.states.items()},
            "savings": {name: astuple(saving) for name, saving in self.savings.items()},
            **self._window.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; raises `CheckpointError` for that of another model or another format."""
        if state.get("version") != _STATE_VERSION or state["low"] != self.low:
            raise CheckpointError(
                f"the precision state is of version {state.get('version')} with {state.get('low')} and expected are "
                f"version {_STATE_VERSION} with {self.low}; build DynamicPrecision with the format it was saved with"
            )
        if set(state["layers"]) != set(self.layers):
            changed = sorted(set(state["layers"]) ^ set(self.layers))
            raise CheckpointError(
                f"the precision state is of another model (layers that differ: {', '.join(changed[:3])}); "
                "load it into the model that it was saved with"
            )
        self.states = {name: LayerState(*state["layers"][name]) for name in self.layers}
        self.savings = {name: Saving(*saving) for name, saving in state["savings"].items()}
        self.num_steps, self._must_sample = state["num_steps"], state["must_sample"]
        self._window.load_state_dict(state)
        self._apply()
        self._watch_next()

    # What is sampled

    def _is_sampled(self) -> bool:
        is_early = self.num_steps < self.window * self.rules.patience
        return is_early or self._must_sample or self.num_steps % self.every == 0

    def _watch_next(self) -> None:
        """Hooks for the coming step where it is sampled."""
        self._unwatch()
        if self._is_sampled():
            self._watch = Watch(self.layers)
            self._stash = run_eagerly_(self.model, self._compiled)
            tally_of(self.model).reopen()

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._stash.close()

    def _close_sample(self) -> tuple[Event, ...]:
        """Read what the hooks saw, on all ranks; decide where a window is full or something overflowed."""
        assert self._watch is not None
        samples = self._watch.samples
        self._unwatch()
        gradients = {name: sample_gradient(_weight(layer)) for name, layer in self.layers.items()}
        if all(gradient is None for gradient in gradients.values()):
            raise ConfigError(
                "a sampled step left no gradients behind; call step() once per optimizer step, "
                "after backward() and before zero_grad()"
            )
        if not any(sample.gradients for sample in samples.values()):
            raise ConfigError(
                "a sampled step was run by compiled code, which no hook sees into; compile with model.compile(), "
                "or give DynamicPrecision what torch.compile(model) returned"
            )
        if not self.savings:
            self._estimate_savings(samples)
        flags = self._window.add(samples, gradients)
        if flags is not None:
            return self._blame(flags)
        return self._decide() if self._window.num_samples >= self.window else ()

    def _estimate_savings(self, samples: Mapping[str, Sample]) -> None:
        """Estimate each layer's saving in 16 bits, as the mean over the ranks; one measurement for equal layers."""
        known: dict[Any, Saving] = {}
        table = torch.zeros(len(samples), 3, dtype=torch.float64)
        for row, (name, sample) in enumerate(samples.items()):
            layer = self.layers[name]
            key = (
                type(layer),
                sample.input_shape,
                tuple(parameter.shape for parameter in layer.parameters(recurse=False)),
            )
            if key not in known:
                known[key] = self._estimate_saving(layer, sample)
            table[row] = torch.tensor(astuple(known[key]), dtype=torch.float64)
        table, _ = self._window.reduce(table, torch.zeros(0))
        table /= self._window.world_size
        self.savings = {
            name: Saving(seconds, num_bytes, is_measured=is_measured > 0)
            for name, (seconds, num_bytes, is_measured) in zip(samples, table.tolist(), strict=True)
        }

    def _estimate_saving(self, layer: nn.Module, sample: Sample) -> Saving:
        saving = None
        if self.costs == "measured" and sample.input_shape is not None:
            saving = measure_saving(layer, sample.input_shape, _DTYPES[self.low])
        return saving or assume_saving(layer, sample.input_shape)

    # What is decided

    def _decide(self) -> tuple[Event, ...]:
        """The end of a window."""
        self.evidence = self._gather()
        scale = self.scaler.get_scale() if self.scaler is not None else 1.0
        answers = choose(self.evidence, find_format(self.low), self.rules, scale=scale)
        self.verdicts = {name: verdict for name, (_, verdict) in answers.items()}
        states = {
            name: apply_hysteresis(self.states[name], self.verdicts[name], self.low, self.rules) for name in self.layers
        }
        self._window.clear()
        changes = self._change(states)
        lows = [name for name, state in self.states.items() if state.precision != "fp32"]
        share = sum(self.verdicts[name].share for name in lows)
        return (*changes, PrecisionPlanned(self.num_steps, len(lows), len(self.layers), share))

    def _gather(self) -> dict[str, Evidence]:
        """Gather the window's evidence, equal on all ranks."""
        return self._window.gather(self.savings, self.scaler.get_scale() if self.scaler is not None else 1.0)

    def _blame(self, flags: Tensor) -> tuple[Event, ...]:
        """Put the layers where infinities began into FP32 at once; such a sample is no evidence otherwise."""
        bad = flags.tolist()
        names = list(self.layers)
        culprits = find_culprits([(name, not row[0], not row[1]) for name, row in zip(names, bad, strict=True)])
        is_forward_fine = not any(row[0] or row[1] for row in bad)
        # A scale above 1 may be what is too large, which the scaler lowers by itself.
        if is_forward_fine and (self.scaler is None or self.scaler.get_scale() <= 1):
            culprits = (names[max(range(len(bad)), key=lambda row: bad[row][2])],)
        states = dict(self.states)
        for name in culprits:
            if states[name].precision != "fp32":
                where = "gradients" if is_forward_fine else "activations"
                states[name] = LayerState("fp32", 0, f"{where} became infinite or no numbers here")
        return self._change(states)

    def _change(self, states: dict[str, LayerState]) -> tuple[Event, ...]:
        changed = [name for name in self.layers if states[name].precision != self.states[name].precision]
        events = tuple(
            PrecisionChanged(
                self.num_steps, name, self.states[name].precision, states[name].precision, states[name].reason
            )
            for name in changed
        )
        self.states = states
        if changed:
            self._apply()
        return events

    # What is carried out

    def _apply(self) -> None:
        """Set the model itself, every layer in FP32, and where a low part stands in a part that is not."""
        is_low = {name: state.precision != "fp32" for name, state in self.states.items()}
        wanted = _containers(is_low) | is_low
        mostly = any(is_low.values()) and sum(is_low.values()) * 2 >= len(is_low)
        wanted[""] = is_low.get("", mostly)
        surrounding: dict[str, bool] = {}
        for name, module in self.model.named_modules():
            around = surrounding.get(name.rpartition(".")[0], False) if name else False
            surrounding[name] = wanted.get(name, around)
            is_inherited = name != "" and wanted.get(name, False) and around
            if name == "" or name in self.layers or (name in wanted and not is_inherited):
                set_compute_(module, self._compute(name, surrounding[name], is_inherited=is_inherited))
            elif surrounding[name] and self.narrow_storage and isinstance(module, nn.RMSNorm):
                set_compute_(module, self._compute(name, is_low=True, is_inherited=True))
            else:
                clear_compute_(module)

    def _compute(self, name: str, is_low: bool, *, is_inherited: bool) -> Compute:
        return Compute(
            self.device.type,
            _DTYPES[self.low] if is_low else None,
            keeps_narrow=self.narrow_storage and is_low,
            is_root=name == "",
            is_layer=name in self.layers,
            is_inherited=is_inherited,
        )

    def _row(self, name: str) -> tuple[str, ...]:
        verdict, saving = self.verdicts.get(name), self.savings.get(name)
        return (
            name or "(model)",
            self.states[name].precision,
            f"{verdict.share:.1e}" if verdict else "-",
            f"{verdict.underflow:.1%}" if verdict else "-",
            _milliseconds(saving),
            f"{saving.num_bytes / 1e6:.2f}" if saving else "-",
            self.states[name].reason,
        )


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with a matrix of their own that is multiplied, by name; norms and embeddings have none.

    Raises `ConfigError` for a model without one. A module that stands in two places is named by the first.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no layer with a weight matrix, so there is no precision to choose; "
            "give a model with linear, convolution or similar layers"
        )
    return layers


def run_eagerly_(model: nn.Module, compiled: nn.Module | None) -> ExitStack:
    """Let compiled modules run as they are written until the stack is closed; hooks see nothing of compiled code."""
    stack = ExitStack()
    for module in model.modules():
        call = getattr(module, "_compiled_call_impl", None)
        if call is not None:
            module._compiled_call_impl = None
            stack.callback(setattr, module, "_compiled_call_impl", call)
    if compiled is not None:
        stack.callback(compiled.__dict__.__setitem__, "forward", compiled.__dict__["forward"])
        compiled.__dict__["forward"] = model.__call__
    return stack


def choose_low(low: str, device: torch.device) -> str:
    """Choose the 16-bit format for `device`: bf16, or FP16 on a GPU without it. Raises `ConfigError` if unknown.

    >>> choose_low("auto", torch.device("cpu"))
    'bf16'
    """
    if low not in ("auto", *_DTYPES):
        raise ConfigError(explain_unknown("16-bit format", low, ("auto", *_DTYPES)))
    if low != "auto":
        return low
    return "fp16" if device.type == "cuda" and not has_native_bf16(device) else "bf16"


def _containers(is_low: Mapping[str, bool]) -> dict[str, bool]:
    """Modules with layers among their children -> whether their own operators run low: if all those layers do."""
    children: dict[str, list[bool]] = {}
    for name, low in is_low.items():
        if name:
            children.setdefault(name.rpartition(".")[0], []).append(low)
    return {name: all(lows) for name, lows in children.items()}


def _milliseconds(saving: Saving | None) -> str:
    if saving is None:
        return "-"
    return f"{saving.seconds * 1e3:.2f}" if saving.is_measured else "assumed"


def _weight(layer: nn.Module) -> Tensor:
    return next(parameter for parameter in layer.parameters(recurse=False) if parameter.dim() > 1)


def _check_settings(every: int, window: int, rules: Rules, start: str, costs: str) -> None:
    if every < 1:
        raise ConfigError(f"every is {every}; give a number of steps, 1 or more")
    if window < rules.min_samples:
        raise ConfigError(f"window is {window} samples and the rules want at least {rules.min_samples}; raise window")
    for what, value, known in (("start", start, ("auto", "low", "fp32")), ("costs", costs, ("measured", "assumed"))):
        if value not in known:
            raise ConfigError(explain_unknown(what, value, known))
