"""Pipeline parallelism: the orders of `schedules.py`, played with tensors.

    stage 0     embed, layers 0-1      forward 0, forward 1, backward 0, ...
    stage 1     layers 2-3, head                  forward 0, backward 0, forward 1, ...

Zero-bubble orders have a third kind of pass: `weight_gradients.py` splits the backward pass for them.

Each rank holds one chunk of the model, or several when stages are interleaved: a whole model whose other layers are
taken out (`models/<name>/plan.py` says how), so that parameters keep their names. Every rank reads every micro-batch;
between stages only activations and their gradients travel, each behind a header with its shape, so that micro-batches
may have different lengths. Sends never wait for their receiver: they are kept until the step ends.

The planner times the same orders (`planning/estimate/simulation.py`), so what was estimated is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepseek.distributed.parallel.data_parallel import read_loss
from deepseek.distributed.parallel.tensor_headers import allocate, empty_header, write_header
from deepseek.distributed.parallel.weight_gradients import Deferred, WeightGradients, accumulate_
from deepseek.distributed.plan import Plan
from deepseek.distributed.schedules import Work, order_work


class Learner(Protocol):
    """What a step needs to know of a task; `deepseek.train.Task` is one."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Return what the model makes of a batch."""

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the () sum of the loss over the units of a batch."""

    def count_units(self, batch: Any) -> int:
        """Count the units of a batch that the loss is a sum over."""


@dataclass(frozen=True)
class PipelineStage:
    """Layers of a model that one chunk holds: `first` up to, not including, `stop` of `num_layers`."""

    index: int
    num_stages: int
    first: int
    stop: int
    num_layers: int

    @property
    def is_first(self) -> bool:
        """Whether it reads the batch."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether its output is the model's."""
        return self.index == self.num_stages - 1

    def holds(self, layer: int) -> bool:
        """Return whether `layer`, counted from 0, is one of its own."""
        return self.first <= layer < self.stop


class Received(nn.Module):
    """Stands where a stage's input comes in: whatever it is called with, it returns what was received."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Tensor:
        assert self.value is not None, "a stage computes after it has received its input"
        return self.value


class TakenOut(nn.Module):
    """Stands for a layer that another stage holds, and returns its first input."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


@dataclass
class StageModule:
    """The part of the model of one stage."""

    stage: PipelineStage
    module: nn.Module
    received: Received | None
    """Where the input comes in; `None` in the first stage."""
    weights: WeightGradients | None = None
    """Where linear layers leave their weight gradients, if the schedule has a pass for them."""
    inputs: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    deferred: dict[int, Deferred] = field(default_factory=dict)
    """By micro-batch: weight gradients between the backward and the weight pass."""


@dataclass(frozen=True)
class _Step:
    """What all passes of a step share."""

    learner: Learner
    micro_batches: Sequence[Any]
    num_units: int
    loss_context: Callable[[], AbstractContextManager[None]]


class Pipeline:
    """The stages of one rank, and the order in which they work."""

    def __init__(
        self, plan: Plan, chunks: Sequence[StageModule], group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self._plan = plan
        self.chunks = list(chunks)
        self._group = group
        self._device = device
        self._rank = dist.get_rank(group)
        self._kept: list[tuple[dist.Work, Tensor]] = []

    def run(
        self,
        learner: Learner,
        micro_batches: Sequence[Any],
        num_units: int,
        *,
        loss_context: Callable[[], AbstractContextManager[None]] = nullcontext,
        before_backward: Callable[[StageModule, bool], None] = lambda chunk, is_last: None,
    ) -> float:
        """Compute the gradients of the summed loss over `num_units`; return this rank's part of the loss.

        `before_backward` is told before each pass that adds to the gradients of all weights of a chunk whether it is
        the chunk's last of the step.
        """
        plan, step = self._plan, _Step(learner, micro_batches, num_units, loss_context)
        left = [len(micro_batches)] * len(self.chunks)
        loss = 0.0
        with self._deferring():
            for work in order_work(plan.schedule, plan.pp, self._rank, len(micro_batches), plan.virtual_stages):
                chunk = self.chunks[work.chunk]
                if work.kind == "weight" or (work.kind == "backward" and chunk.weights is None):
                    left[work.chunk] -= 1
                    before_backward(chunk, left[work.chunk] == 0)
                if work.kind == "forward":
                    loss += self._go_forward(chunk, work, step)
                elif work.kind == "backward":
                    self._go_back(chunk, work, step)
                else:
                    accumulate_(chunk.deferred.pop(work.micro_batch))
        for sent, _ in self._kept:
            sent.wait()
        self._kept.clear()
        return loss

    def _deferring(self) -> AbstractContextManager[object]:
        """Let linear layers leave their weight gradients to the passes that the schedule has for them."""
        stack = ExitStack()
        for chunk in self.chunks:
            if chunk.weights is not None:
                stack.enter_context(chunk.weights.deferring())
        return stack

    def _go_forward(self, chunk: StageModule, work: Work, step: _Step) -> float:
        """Compute one micro-batch, and return its part of the loss, which only the last stage has."""
        batch, loss = step.micro_batches[work.micro_batch], 0.0
        self._receive_input(chunk, work)
        outputs = step.learner.forward(chunk.module, batch)
        if chunk.stage.is_last:
            with step.loss_context():
                outputs = step.learner.loss(outputs, batch) / step.num_units
            loss = read_loss(outputs)
        else:
            self._send(outputs.detach(), chunk.stage.index + 1, work, is_gradient=False)
        chunk.outputs[work.micro_batch] = outputs
        return loss

    def _receive_input(self, chunk: StageModule, work: Work) -> None:
        if chunk.received is not None:
            value = self._receive(chunk.stage.index - 1, chunk.stage.index, work, is_gradient=False)
            chunk.received.value = chunk.inputs[work.micro_batch] = value.requires_grad_()

    def _go_back(self, chunk: StageModule, work: Work, step: _Step) -> None:
        output = chunk.outputs.pop(work.micro_batch)
        if chunk.stage.is_last:
            with step.loss_context():
                output.backward()
        else:
            output.backward(self._receive(chunk.stage.index + 1, chunk.stage.index, work, is_gradient=True))
        if chunk.weights is not None:
            chunk.deferred[work.micro_batch] = chunk.weights.take()
        if chunk.received is not None:
            gradient = chunk.inputs.pop(work.micro_batch).grad
            assert gradient is not None
            self._send(gradient, chunk.stage.index - 1, work, is_gradient=True)

    def _tag(self, stage: int, work: Work, *, is_gradient: bool) -> int:
        """Number a message by the stage that it goes to, its micro-batch and what it is."""
        num_stages = self._plan.pp * self._plan.virtual_stages
        return 2 * (2 * (work.micro_batch * num_stages + stage) + is_gradient)

    def _send(self, tensor: Tensor, stage: int, work: Work, *, is_gradient: bool) -> None:
        tag = self._tag(stage, work, is_gradient=is_gradient)
        for message, message_tag in ((write_header(tensor), tag), (tensor.contiguous(), tag + 1)):
            work_handle = dist.isend(message, group=self._group, group_dst=stage % self._plan.pp, tag=message_tag)
            assert work_handle is not None
            self._kept.append((work_handle, message))

    def _receive(self, sender: int, stage: int, work: Work, *, is_gradient: bool) -> Tensor:
        tag, source = self._tag(stage, work, is_gradient=is_gradient), sender % self._plan.pp
        header = empty_header(self._device)
        dist.recv(header, group=self._group, group_src=source, tag=tag)
        tensor = allocate(header, self._device)
        dist.recv(tensor, group=self._group, group_src=source, tag=tag + 1)
        return tensor
