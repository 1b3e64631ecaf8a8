"""Faults that are seeded into a plan, one at a time: each a patch of the runtime, and what the oracle says of it first.

A fault is a row: the model, the plan, what is patched, and the kind and name of the value that parts first.
"""

import contextlib
from dataclasses import dataclass
from dataclasses import replace as replace_value
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import RowwiseParallel

from deepseek.distributed.differentiable_all_to_all import _RowExchange
from deepseek.distributed.parallel import (
    data_parallel,
    experts,
    parallel_model,
    pipeline,
    sequence_ring,
    tensor_parallel,
)
from deepseek.distributed.parallel.data_parallel import GradientReducer
from deepseek.distributed.parallel.parallel_model import ParallelModel
from deepseek.distributed.parallel.pipeline import Pipeline, PipelineStage
from deepseek.distributed.parallel.sequence_ring import SequenceRing
from deepseek.distributed.parallel.weight_gradients import WeightGradients
from deepseek.distributed.plan import Plan
from deepseek.models import parallelizing
from deepseek.models.decoder import plan as decoder_plan
from deepseek.optim import muon
from tests.distributed.parallel.cases import OPTIMIZERS, compare


@dataclass(frozen=True)
class Fault:
    """One row."""

    model: str
    plan: dict
    patch: object
    """A function that returns a context in which the fault is there."""
    kind: str
    """Kind of the value that parts first."""
    name: str = ""
    """Part of its name."""
    optimizer: str = "sgd"


def replace(owner, name, value):
    """The context in which `owner.name` is `value`."""
    return lambda: mock.patch.object(owner, name, value)


def wrap(owner, name, change):
    """The context in which `owner.name(...)` answers what `change(original, ...)` answers."""
    original = getattr(owner, name)
    return lambda: mock.patch.object(owner, name, lambda *given, **named: change(original, *given, **named))


def nothing(*_, **__):
    return None


ROWS_OUTPUT = RowwiseParallel._prepare_output_fn


def halve(original, bucket, flat):
    original(bucket, flat / 2)


def forget_a_weight(original, bucket, flat):
    counts = len(flat) - len(bucket)  # how many ranks have each gradient stands behind them
    original(bucket[1:], torch.cat([flat[bucket[0].numel() : counts], flat[counts + 1 :]]))


def drop_the_last_batch(original, self, learner, micro_batches, num_units):
    return original(self, learner, micro_batches[:-1], num_units)


def never_synchronize(original, self, chunk, is_last):
    original(self, chunk, False)


def drop_input_gradient(original, tensor, module, inputs):
    return original(tensor, module, (inputs[0].detach(), *inputs[1:]))


def keep_partial_sums(original, layouts, use_local_output, module, outputs, mesh):
    """Embeddings stay as they are: torch keeps the mask of one that is not summed, and fails at the next."""
    is_embedding = isinstance(module, nn.Embedding)
    return original(layouts, use_local_output, module, outputs, mesh) if is_embedding else outputs.to_local()


def swap_local(original, model, rows, plan, mesh, comm):
    """Swap the shards of one weight between the ranks."""
    parallel = original(model, rows, plan, mesh, comm)
    local = dict(parallel.named_parameters())["layers.0.attention.v_proj.weight"].to_local()
    parts = [torch.empty_like(local) for _ in range(2)]
    dist.all_gather(parts, local.detach())
    local.detach().copy_(parts[1 - dist.get_rank()])
    return parallel


def take_other_part(original, tensor, module, inputs, output):
    return output.chunk(2, dim=1)[1 - tensor.rank]


def begin_a_layer_late(original, self, layer):
    return original(self, layer) and not (self.index == 1 and layer == self.first)


def receive_the_first_again(original, self, *given, **named):
    value = original(self, *given, **named)
    if named["is_gradient"]:
        return value
    self.first_value = getattr(self, "first_value", value.detach().clone())
    return self.first_value.clone()


def send_no_gradient(original, self, tensor, *given, **named):
    original(self, tensor * (not named["is_gradient"]), *given, **named)


def send_transposed_rows(original, self, tensor, *given, **named):
    original(self, tensor.flip(0), *given, **named)


def forget_the_first(original, self):
    """The weight gradients of the first micro-batch are lost."""
    taken = original(self)
    is_first = not getattr(self, "has_taken", False)
    self.has_taken = True
    return {} if is_first else taken


def play_twice(original, deferred):
    original(deferred)
    original(deferred)


def mix_the_layers(original, self, layer, x, gradient):
    """The gradient of a layer is computed from the input that the layer before noted."""
    before = getattr(self, "before", {}).get(x.shape, x)
    self.before = getattr(self, "before", {}) | {x.shape: x}
    original(self, layer, before, gradient)


def count_a_loss_twice(original, self, loss):
    return original(self, 2 * loss)


def scramble_answers(original, run, group, travel, groups):
    answers = original(run, group, travel, groups)
    return [answer.flip(0) for answer in answers]


def lose_gradients(ctx, gradient):
    return gradient.new_zeros((sum(ctx.exchange[0]), *gradient.shape[1:])), None, None, None, None


def own_units_only(self, learner, micro_batches):
    return max(1, sum(learner.count_units(batch) for batch in micro_batches))


def forget_a_group(original, self):
    return original(self)[1:]


def add_a_little(original, self):
    original(self)
    gradient = dict(self.named_parameters())["layers.1.feedforward.up_proj.weight"].grad
    if dist.get_rank() == 1:
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient)[0] *= 1 + 1e-6


def spoil_a_replica(original, self):
    """One rank's copy of a norm drifts."""
    original(self)
    if dist.get_rank() == 1:
        dict(self.named_parameters())["norm.weight"].grad.mul_(1.001)


def spread_namelessly(original, *given):
    original(*given)
    return []


def skip_a_block(original, ring, owner, num_local):
    """Rank 1 does not look at the keys of rank 0."""
    return iter(()) if ring.rank > owner else original(ring, owner, num_local)


def see_the_future(original, ring, owner, num_local):
    """The first queries of each block see one key too many of a later rank."""
    for block in original(ring, owner, num_local):
        yield replace_value(block, queries=slice(block.queries.start - (owner > ring.rank), block.queries.stop))


def keep_gradients_of_keys(original, gradient, ring):
    return gradient


def take_neighboring_targets(original, self, tensor, dim=1):
    other = SequenceRing(self.group, 1 - self.rank, self.size)
    return original(other if tensor.min() < 0 else self, tensor, dim)


def orthogonalize_alone(matrix):
    """The matrix with zeros where others have their pieces."""
    local = matrix.to_local()
    whole = local.new_zeros(matrix.shape)
    whole[: local.shape[0], : local.shape[1]] = local
    return whole


def lose_the_last(original, tensor, sender, mesh):
    original(tensor.zero_() if sender == mesh.size() - 1 else tensor, sender, mesh)


SEQUENCES = {"tp": 2, "sequence_parallel": True}
ZERO_BUBBLE = {"pp": 2, "schedule": "zero_bubble"}
FAULTS = {
    "gradients are not summed over ranks": Fault(
        "llama", {"dp": 2}, replace(GradientReducer, "finish", nothing), "gradient", "norm.weight"
    ),
    "gradients are averaged": Fault(
        "llama", {"dp": 2}, wrap(data_parallel, "_spread_out", halve), "gradient", "norm.weight"
    ),
    "a weight is left out of its bucket": Fault(
        "llama", {"dp": 2}, wrap(data_parallel, "_spread_out", forget_a_weight), "gradient", "norm.weight"
    ),
    "a loss is divided by the units of its own rank": Fault(
        "llama", {"dp": 2}, replace(ParallelModel, "count_units", own_units_only), "loss"
    ),
    "a micro-batch is left out": Fault("llama", {"dp": 2}, wrap(ParallelModel, "_run", drop_the_last_batch), "loss"),
    "a loss counts twice": Fault("llama", {"dp": 2}, wrap(ParallelModel, "_sum_loss", count_a_loss_twice), "loss"),
    "ranks begin with weights of their own": Fault(
        "llama", {"dp": 2}, replace(parallel_model, "broadcast_", nothing), "loss"
    ),
    "sharded gradients are averaged": Fault(
        "llama",
        {"dp": 2, "zero_stage": 3},
        replace(data_parallel, "sum_gradients_", nothing),
        "gradient",
        "norm.weight",
    ),
    "sharded gradients are never reduced": Fault(
        "llama", {"dp": 2, "zero_stage": 1}, wrap(ParallelModel, "_before_backward", never_synchronize), "gradient"
    ),
    "results of rows are not summed": Fault(
        "llama",
        {"tp": 2},
        replace(RowwiseParallel, "_prepare_output_fn", staticmethod(partial(keep_partial_sums, ROWS_OUTPUT))),
        "loss",
    ),
    "the gradient of a block's input is lost": Fault(
        "llama",
        {"tp": 2},
        wrap(tensor_parallel, "_enter", drop_input_gradient),
        "gradient",
        "layers.1.feedforward_norm",
    ),
    "shards of a weight are swapped": Fault("llama", {"tp": 2}, wrap(parallelizing, "cut", swap_local), "loss"),
    "a gradient that is a part of a sum is not summed": Fault(
        "gemma", {"tp": 2}, replace(parallel_model, "sum_over", nothing), "gradient", "layers.1.attention.k_norm"
    ),
    "norms of cut sequences are not summed": Fault(
        "llama", SEQUENCES, replace(parallel_model, "sum_over", nothing), "gradient", "norm.weight"
    ),
    "a rank takes the other part of the positions": Fault(
        "gpt2", SEQUENCES, wrap(tensor_parallel, "_split", take_other_part), "loss"
    ),
    "gates of the wrong heads are used": Fault(
        "mask",
        {"tp": 2},
        wrap(decoder_plan, "_keep_gates", lambda o, first, stop, *rest: o(0, stop - first, *rest)),
        "loss",
    ),
    "a copy drifts": Fault(
        "llama", {"tp": 2}, wrap(ParallelModel, "_finish_gradients", spoil_a_replica), "gradient", "norm.weight"
    ),
    "a gradient is off by one in a million": Fault(
        "llama",
        {"tp": 2},
        wrap(ParallelModel, "_finish_gradients", add_a_little),
        "gradient",
        "layers.1.feedforward.up_proj.weight",
    ),
    "what ranks hold alike counts twice in the norm": Fault(
        "llama",
        {"tp": 2},
        lambda: mock.patch("deepseek.distributed.parallel.cut_tensors.find_cut_axes", lambda *_, **__: ("tp",)),
        "norm",
    ),
    "tied weights of two stages are not summed": Fault(
        "llama", {"pp": 2}, replace(ParallelModel, "_sum_twins", nothing), "gradient", "embed.weight"
    ),
    "a stage begins a layer late": Fault("deep", {"pp": 2}, wrap(PipelineStage, "holds", begin_a_layer_late), "loss"),
    "a stage computes with an activation that is stale": Fault(
        "llama", {"pp": 2}, wrap(Pipeline, "_receive", receive_the_first_again), "loss"
    ),
    "rows of an activation are swapped on the way": Fault(
        "llama", {"pp": 2}, wrap(Pipeline, "_send", send_transposed_rows), "loss"
    ),
    "a stage sends no gradient back": Fault(
        "llama", {"pp": 2}, wrap(Pipeline, "_send", send_no_gradient), "gradient", "layers.0.feedforward.down_proj"
    ),
    "a weight gradient is forgotten": Fault(
        "llama", ZERO_BUBBLE, wrap(WeightGradients, "take", forget_the_first), "gradient", "layers.1.feedforward"
    ),
    "a weight gradient is played twice": Fault(
        "llama", ZERO_BUBBLE, wrap(pipeline, "accumulate_", play_twice), "gradient", "layers.1.feedforward"
    ),
    "a weight gradient is computed from the input of another layer": Fault(
        "llama", ZERO_BUBBLE, wrap(WeightGradients, "note", mix_the_layers), "gradient", "layers.1"
    ),
    "gradients of different experts are summed": Fault(
        "moe", {"dp": 2, "ep": 2}, wrap(parallel_model, "_spread_experts", spread_namelessly), "gradient", "experts"
    ),
    "answers of experts are scrambled": Fault(
        "moe", {"dp": 2, "ep": 2}, wrap(experts, "_run_over_ranks", scramble_answers), "loss"
    ),
    "gradients do not travel back to the tokens": Fault(
        "moe",
        {"dp": 2, "ep": 2},
        replace(_RowExchange, "backward", staticmethod(lose_gradients)),
        "gradient",
        "experts",
    ),
    "loads are counted on each rank alone": Fault(
        "moe", {"dp": 2}, replace(parallel_model, "balance_over_ranks_", nothing), "loss"
    ),
    "a block of keys is skipped": Fault("llama", {"cp": 2}, wrap(sequence_ring, "_list_blocks", skip_a_block), "loss"),
    "a query sees a key of its future": Fault(
        "llama", {"cp": 2}, wrap(sequence_ring, "_list_blocks", see_the_future), "loss"
    ),
    "gradients of keys do not travel home": Fault(
        "llama", {"cp": 2}, wrap(sequence_ring, "_take_home", keep_gradients_of_keys), "gradient", "layers.1.attention"
    ),
    "a rank learns the targets of another one": Fault(
        "llama", {"cp": 2}, wrap(SequenceRing, "cut", take_neighboring_targets), "loss"
    ),
    "each rank orthogonalizes its own piece": Fault(
        "llama", {"tp": 2}, replace(muon, "gather", orthogonalize_alone), "parameter", "weight", optimizer="muon"
    ),
    "an update is lost on its way": Fault(
        "llama", {"dp": 2, "zero_stage": 1}, wrap(muon, "send_to_all", lose_the_last), "parameter", "weight", "muon"
    ),
    "an optimizer knows half of the weights": Fault(
        "llama", {"tp": 2}, wrap(ParallelModel, "parameter_groups", forget_a_group), "parameter"
    ),
}


def find_all(rank, names):
    """What the oracle says of each fault, and how it was seen."""
    found = {}
    for name in names:
        fault = FAULTS[name]
        seed = rank if fault.patch is FAULTS["ranks begin with weights of their own"].patch else 0
        with contextlib.ExitStack() as stack:
            stack.enter_context(fault.patch())
            optimizer = OPTIMIZERS[fault.optimizer]
            parity = compare(fault.model, Plan(**fault.plan), optimizer=optimizer, seed=seed, num_steps=1)
        first = parity.partings[0] if parity.partings else None
        found[name] = None if first is None else (first.kind, first.name, first.step)
    return found
