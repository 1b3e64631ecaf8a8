"""A decoder as trainers for GPUs run it: bf16 weights, fused norms and attention, 32 bit gradients and optimizer state.

Written with torch alone, so that the planner's bytes are held against something that knows nothing of the planner.

Shapes: B sequences, T tokens, C channels, N heads, H channels of a head.
"""

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from deepseek.planning.models.model_shape import ModelShape
from tests.planning.storage_ledger import StorageLedger


class FusedRMSNorm(torch.autograd.Function):
    """The norm as one kernel: keeps its input and one number per row."""

    @staticmethod
    def forward(ctx, x_BTC, weight_C):
        scale = x_BTC.float().pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
        ctx.save_for_backward(x_BTC, weight_C, scale)
        return (x_BTC * scale).to(x_BTC.dtype) * weight_C

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        normal = (x * scale).to(x.dtype)
        inner = gradient * weight
        grad_x = scale * (inner - normal * (inner * normal).mean(-1, keepdim=True))
        return grad_x.to(x.dtype), (gradient * normal).sum((0, 1))


class Rotated(torch.autograd.Function):
    """Rotary angles as one kernel: keeps nothing but the angles, which all layers share."""

    @staticmethod
    def forward(ctx, x_BNTH, cos, sin):
        ctx.save_for_backward(cos, sin)
        first, second = x_BNTH.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    @staticmethod
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        first, second = gradient.chunk(2, -1)
        return torch.cat((first * cos + second * sin, second * cos - first * sin), -1), None, None


class FlashAttention(torch.autograd.Function):
    """Grouped causal attention as the kernels for GPUs do it: keeps its inputs, its result and one number per row."""

    @staticmethod
    def forward(ctx, query_BNTH, key_BKTH, value_BKTH):
        result = attend(query_BNTH, key_BKTH, value_BKTH)
        rows = torch.zeros(query_BNTH.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query_BNTH, key_BKTH, value_BKTH, result, rows)
        return result

    @staticmethod
    def backward(ctx, gradient):
        inputs = [each.detach().requires_grad_() for each in ctx.saved_tensors[:3]]
        with torch.enable_grad():
            result = attend(*inputs)
        return torch.autograd.grad(result, inputs, gradient)


def attend(query, key, value):
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) if groups > 1 else each for each in (key, value))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        width, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.shape = shape
        self.norm_1, self.norm_2 = (nn.Parameter(torch.ones(shape.hidden)) for _ in range(2))
        self.query, self.key, self.value = (nn.Linear(shape.hidden, size, bias=False) for size in (width, keys, keys))
        self.out = nn.Linear(width, shape.hidden, bias=False)
        self.gate, self.up = (nn.Linear(shape.hidden, shape.ffn, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x, cos, sin):
        normal = FusedRMSNorm.apply(x, self.norm_1)
        query, key, value = (self.split(project(normal)) for project in (self.query, self.key, self.value))
        query, key = Rotated.apply(query, cos, sin), Rotated.apply(key, cos, sin)
        mixed = FlashAttention.apply(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        normal = FusedRMSNorm.apply(x, self.norm_2)
        return x + self.down(F.silu(self.gate(normal)) * self.up(normal))

    def split(self, x_BTC):
        return x_BTC.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)


class PlainDecoder(nn.Module):
    def __init__(self, shape, is_recomputing=False):
        super().__init__()
        self.shape, self.is_recomputing = shape, is_recomputing
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        angles = torch.outer(torch.arange(shape.sequence), 1e4 ** -torch.linspace(0, 1, shape.head_dim // 2))
        self.register_buffer("cos", angles.cos().bfloat16())
        self.register_buffer("sin", angles.sin().bfloat16())

    def forward(self, tokens_BT):
        x = self.embedding(tokens_BT)
        for block in self.blocks:
            if self.is_recomputing:
                x = checkpoint(block, x, self.cos, self.sin, use_reentrant=False)
            else:
                x = block(x, self.cos, self.sin)
        return self.head(FusedRMSNorm.apply(x, self.norm))


def take_loss(model, tokens_BT):
    logits = model(tokens_BT[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens_BT[:, 1:].flatten())


def measure_step(shape: ModelShape, micro_batch: int, *, micro_batches: int = 2, is_recomputing: bool = False):
    """(peak bytes of a whole step, bytes of weights, gradients and optimizer) on one device."""
    torch.manual_seed(0)
    model = PlainDecoder(shape, is_recomputing).bfloat16()
    tokens = torch.randint(0, shape.vocabulary, (micro_batch, shape.sequence + 1))

    def run():
        for _ in range(micro_batches):
            take_loss(model, tokens).backward()

    return measure_run(model, run)


def measure_run(model, run):
    """(peak bytes, bytes of the state) of `run`, with 32 bit gradients and optimizer state beside bf16 weights."""
    ledger = StorageLedger()
    ledger.add([*model.parameters(), *model.buffers()])
    with ledger:
        weights = [local(each.data) for each in model.parameters()]
        state = [tuple(torch.zeros_like(each, dtype=torch.float32) for _ in range(4)) for each in weights]
        for weight, (_, _, _, gradient) in zip(model.parameters(), state, strict=True):
            weight.register_post_accumulate_grad_hook(accumulate_in(gradient))
        state_bytes = ledger.now_bytes
        run()
    assert all(float(gradient.abs().sum()) > 0 for _, _, _, gradient in state)
    return ledger.peak_bytes, state_bytes


def local(tensor):
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def accumulate_in(gradient):
    def accumulate(weight):
        found = weight.grad
        if isinstance(found, DTensor):  # of an embedding every rank has the whole gradient at first
            found = found.redistribute(weight.device_mesh, weight.placements)
        gradient.add_(local(found))
        weight.grad = None

    return accumulate


def measure_tensor_parallel_step(shape: ModelShape, micro_batch: int, mesh):
    """The same of one rank that has a share of the heads, of the MLP and of the vocabulary."""
    torch.manual_seed(0)
    model = PlainDecoder(shape).bfloat16()
    ways = {"embedding": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(use_local_output=False)}
    for index in range(shape.layers):
        ways |= {f"blocks.{index}.{name}": ColwiseParallel() for name in ("query", "key", "value", "gate", "up")}
        ways |= {f"blocks.{index}.{name}": RowwiseParallel() for name in ("out", "down")}
    parallelize_module(model, mesh, ways)
    tokens = torch.randint(0, shape.vocabulary, (micro_batch, shape.sequence + 1))

    def run():
        with loss_parallel():
            for _ in range(2):
                take_loss(model, tokens).backward()

    return measure_run(model, run)


class Stage(nn.Module):
    """One of several equal parts of a decoder, with the embedding in the first and the head in the last."""

    def __init__(self, whole, index, count):
        super().__init__()
        depth = whole.shape.layers // count
        self.blocks = whole.blocks[index * depth : (index + 1) * depth]
        self.embedding = whole.embedding if index == 0 else None
        self.norm, self.head = (whole.norm, whole.head) if index == count - 1 else (None, None)
        self.register_buffer("cos", whole.cos)
        self.register_buffer("sin", whole.sin)

    def forward(self, x):
        x = x if self.embedding is None else self.embedding(x)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return x if self.head is None else self.head(FusedRMSNorm.apply(x, self.norm))


def measure_pipeline_step(shape: ModelShape, micro_batch: int, rank: int, world: int, micro_batches: int):
    """The same of one stage of a 1F1B pipeline."""
    torch.manual_seed(0)
    stage = Stage(PlainDecoder(shape).bfloat16(), rank, world)
    tokens = torch.randint(0, shape.vocabulary, (micro_batch * micro_batches, shape.sequence + 1))

    def loss_of(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    schedule = Schedule1F1B(
        PipelineStage(stage, rank, world, torch.device("cpu")), n_microbatches=micro_batches, loss_fn=loss_of
    )

    def run():
        inputs = (tokens[:, :-1],) if rank == 0 else ()
        schedule.step(*inputs, **({"target": tokens[:, 1:]} if rank == world - 1 else {}))

    return measure_run(stage, run)


def measure_sharded_step(shape: ModelShape, micro_batch: int, mesh):
    """(peak bytes, bytes after a step) of one rank under FSDP2, with 32 bit shards and bf16 products."""
    torch.manual_seed(0)
    model = PlainDecoder(shape)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters())
    ledger = StorageLedger()
    ledger.add([*model.parameters(), *model.buffers()])
    tokens = torch.randint(0, shape.vocabulary, (micro_batch, shape.sequence + 1))
    with ledger:
        for _ in range(2):  # gradients of the first step stay, as they do between micro-batches
            ledger.restart_peak()
            take_loss(model, tokens).backward()
            optimizer.step()
    return ledger.peak_bytes, ledger.now_bytes
