"""A small encoder, batches of sentences for it, and a backend that counts."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from deepseek.compiler.dynamic_shapes.buckets import Cost
from deepseek.compiler.dynamic_shapes.dynamic_graph import dynamic_graph

CUT_OFTEN = Cost(overhead=1.0, token=1.0, pair=0.0)


SIZE = 16


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(SIZE), nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)
        self.dropout = dropout

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, SIZE // 2)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return x + F.dropout(F.gelu(self.out(attended)), self.dropout, self.training)


class Encoder(nn.Module):
    def __init__(self, num_layers=3, dropout=0.0):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50, SIZE), nn.Embedding(64, SIZE)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(num_layers))

    def forward(self, tokens, mask):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return x


def count_graphs():
    """A backend that compiles nothing and remembers each graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


def make_batch(generator, num_rows=6, longest=40):
    lengths = [generator.choice([2, 3, 5, 8, 21, longest]) for _ in range(num_rows)]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(1, 50, mask.shape) * mask, mask


def build_pair(module, **options):
    plain = copy.deepcopy(module)
    settings = {"backend": "eager", "cache": False} | options
    return dynamic_graph(module, **settings), plain
