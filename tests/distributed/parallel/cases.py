"""Small models and their batches, and what a rank does to hold one plan against a single process."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek.distributed.parallel.mesh import build_mesh
from deepseek.distributed.parallel.parity import compare_steps, record_steps
from deepseek.distributed.plan import Plan
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.parallelizing import parallelize
from deepseek.models.vit.model import ViT, ViTConfig
from deepseek.nn.masks import MaskConfig
from deepseek.nn.moe import MoEConfig
from deepseek.nn.rotary import RopeScaling
from deepseek.optim.muon import Muon
from deepseek.optim.optimizers import JointOptimizer

BATCHES_PER_STEP = 4
NUM_STEPS = 2
IGNORED = -100
# 29 tokens do not divide by 2 or 4, nor do the ranks of a vocabulary of 50,257.
SHAPE = {"vocab_size": 29, "num_layers": 2, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 12}
SHAPE |= {"max_length": 16}
GPT2 = {"num_kv_heads": None, "norm": "layer", "feedforward": "gelu", "position": "learned"}
GPT2 |= {"attention_bias": True, "feedforward_bias": True}
GEMMA = {"norm": "rms_centered", "post_norms": True, "qk_norm": True, "feedforward": "geglu", "logits_softcap": 20.0}
GEMMA |= {"attention_softcap": 15.0, "scale_embeddings": True, "tie_embeddings": False}
CONFIGS = {
    "llama": DecoderConfig(**SHAPE),
    "deep": DecoderConfig(**(SHAPE | {"num_layers": 5})),
    "gpt2": DecoderConfig(**(SHAPE | GPT2)),
    "gemma": DecoderConfig(**(SHAPE | GEMMA)),
    "mask": DecoderConfig(**SHAPE, mask=MaskConfig(local_distance=2, local_heads=0.75)),
    "hard": DecoderConfig(**SHAPE, mask=MaskConfig(local_distance=2, local_heads=0.5, is_dynamic=False)),
    "window": DecoderConfig(**SHAPE, sliding_window=3, full_layers=(1,), rope_theta_window=100.0),
    "documents": DecoderConfig(**SHAPE, rope_scaling=RopeScaling(kind="dynamic", factor=2.0, original_length=4)),
    "moe": DecoderConfig(**SHAPE, moe=MoEConfig(num_experts=4, top_k=2, ffn_size=8, balance_rate=0.1)),
    "bounded": DecoderConfig(**SHAPE, moe=MoEConfig(num_experts=4, top_k=2, ffn_size=8, capacity_factor=4.0)),
    "vit": ViTConfig(image_size=8, patch_size=4, num_layers=3, num_heads=4, hidden_size=16, mlp_size=12, num_classes=5),
}
OWN_ROWS = {"0": "vocabulary", "1": "columns", "3": "rows"}


class TokenTask:
    """The next token of rows of tokens."""

    def forward(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        targets = batch[1].flatten()
        return F.cross_entropy(outputs.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")

    def count_units(self, batch):
        return int((batch[1] != IGNORED).sum())

    def cut_sequence(self, batch, ring):
        return tuple(ring.cut(tensor) for tensor in batch)


class DocumentTask(TokenTask):
    """The same where each row holds two documents that do not see each other."""

    def forward(self, model, batch):
        return model(batch[0], documents_BT=batch[2])


class ImageTask:
    """The class of images."""

    def forward(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch[1], reduction="sum")

    def count_units(self, batch):
        return len(batch[1])


def find_task(name):
    tasks = {"vit": ImageTask, "documents": DocumentTask}
    return tasks.get(name, TokenTask)()


def checkpoint_(layer):
    """Recompute a layer in its backward pass."""
    layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def build_model(name, seed=0):
    torch.manual_seed(seed)
    if name == "own":
        layers = (nn.Embedding(29, 8), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 8), nn.LayerNorm(8), nn.Linear(8, 29))
        return nn.Sequential(*layers).double()
    model = (ViT if name == "vit" else Decoder)(CONFIGS[name.removeprefix("checkpointed ")]).double().train()
    for layer in model.layers if name.startswith("checkpointed") else ():
        checkpoint_(layer)
    return model


def build_batches(name, num_steps=NUM_STEPS):
    """Batches whose numbers of units differ, one of them with none."""
    generator = torch.Generator().manual_seed(1)
    return [
        [_build_batch(name, generator, is_empty=index == 1) for index in range(BATCHES_PER_STEP)]
        for _ in range(num_steps)
    ]


def _build_batch(name, generator, *, is_empty):
    if name == "vit":
        images = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
        return images, torch.randint(5, (2,), generator=generator)
    tokens = torch.randint(29, (2, 9), generator=generator)
    is_hidden = torch.rand(2, 8, generator=generator) < (1.0 if is_empty else 0.3)
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].masked_fill(is_hidden, IGNORED))
    if name != "documents":
        return batch
    ends = torch.randint(1, 8, (2, 1), generator=generator)
    return *batch, (torch.arange(8) >= ends).long()


def merge(batches):
    return tuple(torch.cat(tensors) for tensors in zip(*batches, strict=True))


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def muon(groups):
    """All matrices by Muon, everything else by SGD, so that a wrong scale shows."""
    matrices = [{"params": [weight for weight in group["params"] if weight.ndim == 2]} for group in groups]
    others = [{"params": [weight for weight in group["params"] if weight.ndim != 2]} for group in groups]
    kept, rest = ([group for group in part if group["params"]] for part in (matrices, others))
    return JointOptimizer(Muon(kept, lr=0.05), torch.optim.SGD(rest, lr=0.1))


def compare(name, plan, *, optimizer=sgd, seed=0, num_steps=NUM_STEPS):
    """Hold `plan` against one process."""
    steps, task = build_batches(name, num_steps), find_task(name)
    records = record_steps(build_model(name), task, steps, optimizer, dp=plan.dp, merge=merge)
    rows = OWN_ROWS if name == "own" else None
    parallel = parallelize(build_model(name, seed), plan, build_mesh(plan), rows=rows)
    return compare_steps(parallel, task, steps, records, optimizer)


def compare_all(rank, cases):
    """What each case comes to: the first parting in words, or nothing."""
    found = {}
    for label, (name, settings, optimizer) in cases.items():
        # Other ranks begin with other weights, which those of rank 0 replace.
        # One step of SGD shows all that is wrong with its gradients; AdamW has a state, which the second step reads.
        num_steps = 1 if optimizer == "sgd" else 2
        parity = compare(name, Plan(**settings), optimizer=OPTIMIZERS[optimizer], seed=rank, num_steps=num_steps)
        found[label] = parity.partings[0].describe() if parity.partings else None
        assert parity.num_compared > 10
    return found


OPTIMIZERS = {"sgd": sgd, "adamw": adamw, "muon": muon}
