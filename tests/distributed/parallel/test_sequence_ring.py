"""Attention round a ring against torch's own over the whole sequence; whole models are in test_parity.py."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel import sequence_ring
from deepseek.distributed.parallel.mesh import build_mesh
from deepseek.distributed.parallel.sequence_ring import AttentionRule, SequenceRing, attend_around_ring
from deepseek.distributed.plan import Plan
from deepseek.models.parallelizing import parallelize
from tests.distributed.parallel.cases import build_batches, build_model
from tests.distributed.ranks import run_ranks

LENGTH = 16


def compare_with_torch(rank, dtype, rows_at_once):
    """The largest differences of outputs and gradients, with four query heads on two heads of keys."""
    sequence_ring.ROWS_AT_ONCE = rows_at_once
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, LENGTH, 8) for heads in (4, 2, 2, 4)]
    q, k, v, towards = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    ring = SequenceRing(dist.group.WORLD, rank, dist.get_world_size())
    own = [ring.cut(tensor, 2).requires_grad_() for tensor in (q, k, v)]
    y = attend_around_ring(*own, ring, AttentionRule(scale=8**-0.5))
    y.backward(ring.cut(towards, 2))
    whole = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    expected = F.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)
    expected.backward(towards.double())
    pairs = [(y, expected), *((mine.grad, theirs.grad) for mine, theirs in zip(own, whole, strict=True))]
    assert all(mine.dtype == dtype for mine, _ in pairs)
    return [float((mine.double() - ring.cut(theirs, 2)).abs().max()) for mine, theirs in pairs]


@pytest.mark.parametrize(
    ("world_size", "dtype", "rows", "allowed"),
    [(1, torch.float64, 256, 1e-14), (2, torch.float64, 3, 1e-14), (4, torch.float32, 256, 5e-6)],
)
def test_queries_see_the_keys_of_all_ranks(world_size, dtype, rows, allowed):
    for differences in run_ranks(compare_with_torch, world_size, dtype, rows):
        assert max(differences) < allowed


def test_a_cut_is_balanced_and_covers_the_sequence():
    pairs = []
    for rank in range(4):
        places = SequenceRing(None, rank, 4).cut(torch.arange(24)[None])[0]
        pairs.append(places)
        assert torch.equal(places, SequenceRing(None, 0, 4).positions(6, torch.device("cpu"), rank))
    assert torch.cat(pairs).sort().values.tolist() == list(range(24))
    assert len({int(places.sum()) for places in pairs}) == 1  # as many keys are seen from each rank
    with pytest.raises(ConfigError, match=r"18 tokens cannot be cut into 2\*cp = 8 equal pieces; pad it to 24"):
        SequenceRing(None, 0, 4).cut(torch.zeros(1, 18))


class WholeTask:
    """A learner that knows nothing of cutting."""

    def count_units(self, batch):
        return 1


def gather_and_refuse(rank):
    plan = Plan(cp=2)
    mesh = build_mesh(plan)
    parallel = parallelize(build_model("llama"), plan, mesh)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    batch = build_batches("llama", 1)[0][0]
    with pytest.raises(ConfigError, match="cp=2 cuts sequences and WholeTask does not say how"):
        parallel.accumulate_gradients(WholeTask(), [batch])
    for refused in ({"positions_BT": tokens}, {"lengths_B1": tokens[:, :1]}):
        with pytest.raises(ConfigError, match="leave positions_BT, cache and lengths_B1 out, or use cp=1"):
            parallel.module(tokens, **refused)
    with pytest.raises(ConfigError, match="last_only asks for one token"):
        parallel.module(tokens, last_only=True)
    with pytest.raises(ConfigError, match="the sequence has 24 tokens and this model was made for 16"):
        parallel.module(torch.zeros(1, 12, dtype=torch.long))
    ring = SequenceRing(mesh.group("cp"), rank, 2)
    whole = torch.arange(16).view(2, 8)
    return ring.gather(ring.cut(whole)).tolist() == whole.tolist()


def test_what_ranks_have_is_gathered_in_order_and_what_cannot_be_cut_is_refused():
    assert run_ranks(gather_and_refuse, 2) == [True, True]
