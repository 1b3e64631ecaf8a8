"""Context parallelism: long sequences cut over ranks, and attention whose keys and values travel round a ring.

    4 ranks, 8 equal pieces of a sequence:   rank 0 has 0 and 7, rank 1 has 1 and 6, rank 2 2 and 5, rank 3 3 and 4

Under a causal mask the last pieces see most, so each rank has one from the front and one from the back: in every step
of the ring all ranks compute the same two of four blocks. A step computes what a rank's queries see of the keys that
are with it, and merges that into the result by log-sum-exp, in at least FP32; meanwhile the keys travel on. The
backward pass computes the scores again, and gradients of keys and values travel on with them until they are home.

Memory of a rank: its own queries, keys and values, those of one other rank, and scores of `ROWS_AT_ONCE` queries.
Bytes it sends: keys and values (cp - 1) times forward; backward these again, and their gradients cp times.

Shapes: B batch, T tokens of this rank, N query heads, K key/value heads, H head size, P = cp ranks, R queries at once,
S keys. Sources: Liu et al. 2023 (ring attention); Brandon et al. 2023 (striped); Dao 2023 (log-sum-exp in backward).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek.core.errors import ConfigError

ROWS_AT_ONCE = 256
"""Queries whose scores are held at the same time."""


@dataclass(frozen=True)
class SequenceRing:
    """The ranks that share a sequence, and which tokens of it this one has."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def cut(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return the part of a whole sequence, along `dim`, that lies on this rank.

        Raises `ConfigError` for a length that is no multiple of twice the ranks.
        """
        length = tensor.shape[dim]
        if length % (2 * self.size):
            longer = -(-length // (2 * self.size)) * 2 * self.size
            raise ConfigError(
                f"a sequence of {length} tokens cannot be cut into 2*cp = {2 * self.size} equal pieces; "
                f"pad it to {longer}, or choose another cp"
            )
        return tensor.index_select(dim, self.positions(length // self.size, tensor.device))

    def positions(self, num_local: int, device: torch.device, rank: int | None = None) -> Tensor:
        """Return the (T,) places of the tokens of a rank, this one or another, in a sequence of P T tokens.

        >>> ring = SequenceRing(None, rank=0, size=2)
        >>> ring.positions(4, torch.device("cpu")).tolist(), ring.positions(4, torch.device("cpu"), 1).tolist()
        ([0, 1, 6, 7], [2, 3, 4, 5])
        """
        first, piece = (self.rank if rank is None else rank), num_local // 2
        pieces = (first, 2 * self.size - 1 - first)
        return torch.cat([torch.arange(index * piece, (index + 1) * piece, device=device) for index in pieces])

    def gather(self, local: Tensor) -> Tensor:
        """Return the (B, P T) values of a whole sequence, of which each rank has (B, T); no gradient passes."""
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        places = [self.positions(local.shape[1], local.device, rank) for rank in range(self.size)]
        return torch.cat(parts, dim=1)[:, torch.cat(places).argsort()]


class SequenceLearner(Protocol):
    """A learner whose batches can be cut."""

    def cut_sequence(self, batch: Any, ring: SequenceRing) -> Any:
        """Return `batch` with the tokens of this rank alone, and the targets that go with them."""


def cut_batches(learner: Any, micro_batches: Sequence[Any], ring: SequenceRing) -> list[Any]:
    """Return the part of each micro-batch that this rank of `ring` learns from.

    Raises `ConfigError` for a learner that does not say how its batches are cut.
    """
    if not hasattr(learner, "cut_sequence"):
        raise ConfigError(
            f"cp={ring.size} cuts sequences and {type(learner).__name__} does not say how its batches are cut; give it "
            "a method cut_sequence(batch, ring) that cuts tokens and targets by ring.cut, or use cp=1"
        )
    return [cast("SequenceLearner", learner).cut_sequence(batch, ring) for batch in micro_batches]


@dataclass(frozen=True)
class AttentionRule:
    """What decides on a score besides query and key."""

    scale: float
    softcap: float | None = None
    """Scores are bent to stay below it."""
    window: int | None = None
    """How many tokens a query sees, itself among them; none is all before it."""
    local_distance: int | None = None
    """How far back the bias of local heads begins."""
    documents_BT: Tensor | None = None
    """(B, P T) numbers of documents, which do not see each other; none is one a row."""


def attend_around_ring(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    ring: SequenceRing,
    rule: AttentionRule,
    far_BNT: Tensor | None = None,
) -> Tensor:
    """Return what causal attention over the whole sequence gives for the queries of this rank.

    `far_BNT` is added to the scores of each query with keys that are farther than `rule.local_distance`.
    """
    return _RingAttention.apply(q_BNTH, k_BKTH, v_BKTH, far_BNT, ring, rule)  # type: ignore[no-any-return,no-untyped-call]


@dataclass(frozen=True)
class _Block:
    """Queries of this rank and keys of one rank that meet: ranges among the local tokens."""

    queries: slice
    keys: slice
    is_causal: bool
    """Whether some of these queries lie before some of these keys."""


def _list_blocks(ring: SequenceRing, owner: int, num_local: int) -> Iterator[_Block]:
    """List what this rank's queries see of the keys of `owner`, `ROWS_AT_ONCE` queries at a time."""
    piece = num_local // 2
    is_own = owner == ring.rank
    # Front pieces of earlier ranks are seen by all; to a later rank's keys only the back piece comes after all.
    first = piece if owner > ring.rank else 0
    stop_keys = piece if owner < ring.rank else num_local
    for begin in range(first, num_local, ROWS_AT_ONCE):
        end = min(begin + ROWS_AT_ONCE, num_local)
        yield _Block(slice(begin, end), slice(0, end if is_own else stop_keys), is_own)


class _Scores:
    """Scores of queries with the keys of one rank, and their gradients; heads that share keys lie side by side."""

    def __init__(
        self, q_BNTH: Tensor, far_BNT: Tensor | None, num_kv_heads: int, ring: SequenceRing, rule: AttentionRule
    ) -> None:
        self._q_BKGTH = q_BNTH.unflatten(1, (num_kv_heads, -1))
        self._far_BKGT = None if far_BNT is None else far_BNT.unflatten(1, (num_kv_heads, -1))
        self._ring, self._rule = ring, rule
        self._num_local = q_BNTH.shape[2]

    def queries(self, block: _Block) -> Tensor:
        """(B, K, G R, H)."""
        q_BKRH: Tensor = self._q_BKGTH[:, :, :, block.queries].flatten(2, 3)
        return q_BKRH

    def compute(self, k_BKSH: Tensor, block: _Block, owner: int) -> tuple[Tensor, Tensor | None]:
        """Return (B, K, G, R, S) scores, and the bent ones before biases and masks where there is a softcap."""
        rule = self._rule
        raw = self.queries(block) @ k_BKSH[:, :, block.keys].transpose(2, 3)
        scores = widen(raw).unflatten(2, (self._q_BKGTH.shape[2], -1)) * rule.scale
        bent = None
        if rule.softcap is not None:
            scores = bent = rule.softcap * (scores / rule.softcap).tanh()
        far = self.find_far(block, owner)
        if self._far_BKGT is not None and far is not None:
            scores = scores + torch.where(far, self._far_BKGT[:, :, :, block.queries, None].to(scores.dtype), 0.0)
        hidden = self._find_hidden(block, owner)
        return (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)), bent

    def find_far(self, block: _Block, owner: int) -> Tensor | None:
        """(R, S), true beyond the local distance."""
        distance = self._rule.local_distance
        return None if distance is None else self._measure_distance(block, owner) > distance

    def _find_hidden(self, block: _Block, owner: int) -> Tensor | None:
        """Return what broadcasts to the scores and is true where a key is not seen; `None` where all are."""
        rule = self._rule
        hidden = None
        if block.is_causal or rule.window is not None:
            distance_RS = self._measure_distance(block, owner)
            hidden = distance_RS < 0
            if rule.window is not None:
                hidden = hidden | (distance_RS >= rule.window)
        if rule.documents_BT is not None:
            queries, keys = self._find_positions(block, owner)
            ours_BR, theirs_BS = rule.documents_BT[:, queries], rule.documents_BT[:, keys]
            other = (ours_BR[:, :, None] != theirs_BS[:, None])[:, None, None]
            hidden = other if hidden is None else other | hidden
        return hidden

    def _measure_distance(self, block: _Block, owner: int) -> Tensor:
        queries, keys = self._find_positions(block, owner)
        return queries[:, None] - keys

    def _find_positions(self, block: _Block, owner: int) -> tuple[Tensor, Tensor]:
        device = self._q_BKGTH.device
        queries, keys = (self._ring.positions(self._num_local, device, rank) for rank in (self._ring.rank, owner))
        return queries[block.queries], keys[block.keys]


class _RingAttention(torch.autograd.Function):
    """Attention of this rank's queries to all keys, which pass by."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BNTH: Tensor,
        k_BKTH: Tensor,
        v_BKTH: Tensor,
        far_BNT: Tensor | None,
        ring: SequenceRing,
        rule: AttentionRule,
    ) -> Tensor:
        """Merge what the keys of each rank give."""
        with torch.autocast(q_BNTH.device.type, enabled=False):
            y_BNTH, total_BNT = _attend(q_BNTH, k_BKTH, v_BKTH, far_BNT, ring, rule)
        ctx.save_for_backward(q_BNTH, k_BKTH, v_BKTH, far_BNT, y_BNTH, total_BNT)
        ctx.ring, ctx.rule = ring, rule
        return y_BNTH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the scores again, and send gradients of keys and values home with them."""
        with torch.autocast(gradients[0].device.type, enabled=False):
            q_BNTH, k_BKTH, v_BKTH, far_BNT, y_BNTH, total_BNT = ctx.saved_tensors
            found = _go_back(q_BNTH, k_BKTH, v_BKTH, far_BNT, y_BNTH, total_BNT, gradients[0], ctx.ring, ctx.rule)
        return (*found, None, None)


def _attend(
    q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, far_BNT: Tensor | None, ring: SequenceRing, rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    """Return the result in the dtype of the queries, and the (B, N, T) log of the sum of exponentials."""
    num_kv_heads, num_local = k_BKTH.shape[1], q_BNTH.shape[2]
    scores_of = _Scores(q_BNTH, far_BNT, num_kv_heads, ring, rule)
    y_BKGTH = torch.zeros_like(widen(q_BNTH)).unflatten(1, (num_kv_heads, -1))
    total_BKGT = torch.full_like(y_BKGTH[..., 0], -torch.inf)
    for owner, kv_2BKTH in _pass_round(torch.stack((k_BKTH, v_BKTH)), ring):
        k_BKSH, v_BKSH = kv_2BKTH
        for block in _list_blocks(ring, owner, num_local):
            scores, _ = scores_of.compute(k_BKSH, block, owner)
            here = scores.logsumexp(-1)
            before = total_BKGT[..., block.queries]
            after = torch.logaddexp(before, here)
            weights = (scores - after[..., None]).exp().to(v_BKSH.dtype)
            added = widen(weights.flatten(2, 3) @ v_BKSH[:, :, block.keys]).unflatten(2, (-1, after.shape[-1]))
            y_BKGTH[..., block.queries, :] = y_BKGTH[..., block.queries, :] * (before - after).exp()[..., None] + added
            total_BKGT[..., block.queries] = after
    return y_BKGTH.flatten(1, 2).to(q_BNTH.dtype), total_BKGT.flatten(1, 2)


def _go_back(
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    far_BNT: Tensor | None,
    y_BNTH: Tensor,
    total_BNT: Tensor,
    gradient_BNTH: Tensor,
    ring: SequenceRing,
    rule: AttentionRule,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of queries, keys, values and the far bias."""
    num_kv_heads, num_local = k_BKTH.shape[1], q_BNTH.shape[2]
    scores_of = _Scores(q_BNTH, far_BNT, num_kv_heads, ring, rule)
    gradient_BKGTH = gradient_BNTH.unflatten(1, (num_kv_heads, -1))
    total_BKGT = total_BNT.unflatten(1, (num_kv_heads, -1))
    mean_BKGT = (widen(gradient_BKGTH) * widen(y_BNTH).unflatten(1, (num_kv_heads, -1))).sum(-1)
    dq_BKGTH = torch.zeros_like(widen(q_BNTH)).unflatten(1, (num_kv_heads, -1))
    dfar_BKGT = torch.zeros_like(total_BKGT) if far_BNT is not None and far_BNT.requires_grad else None
    dkv_2BKTH = torch.zeros_like(widen(torch.stack((k_BKTH, v_BKTH))))
    for owner, kv_2BKTH in _pass_round(torch.stack((k_BKTH, v_BKTH)), ring):
        k_BKSH, v_BKSH = kv_2BKTH
        for block in _list_blocks(ring, owner, num_local):
            scores, bent = scores_of.compute(k_BKSH, block, owner)
            num_groups = scores.shape[2]
            weights = (scores - total_BKGT[..., block.queries, None]).exp()
            dy = gradient_BKGTH[..., block.queries, :].flatten(2, 3)
            dkv_2BKTH[1][:, :, block.keys] += widen(weights.to(dy.dtype).flatten(2, 3).transpose(2, 3) @ dy)
            dweights = widen(dy @ v_BKSH[:, :, block.keys].transpose(2, 3)).unflatten(2, (num_groups, -1))
            dscores = weights * (dweights - mean_BKGT[..., block.queries, None])
            if dfar_BKGT is not None:
                far = cast("Tensor", scores_of.find_far(block, owner))
                dfar_BKGT[..., block.queries] += torch.where(far, dscores, 0.0).sum(-1)
            if bent is not None and rule.softcap is not None:
                dscores = dscores * (1 - (bent / rule.softcap).square())
            draw = (dscores * rule.scale).to(q_BNTH.dtype).flatten(2, 3)
            dq_BKGTH[..., block.queries, :] += widen(draw @ k_BKSH[:, :, block.keys]).unflatten(2, (num_groups, -1))
            dkv_2BKTH[0][:, :, block.keys] += widen(draw.transpose(2, 3) @ scores_of.queries(block))
        dkv_2BKTH = _take_home(dkv_2BKTH, ring)
    dk_BKTH, dv_BKTH = dkv_2BKTH.to(k_BKTH.dtype)
    dfar_BNT = None if dfar_BKGT is None or far_BNT is None else dfar_BKGT.flatten(1, 2).to(far_BNT.dtype)
    return dq_BKGTH.flatten(1, 2).to(q_BNTH.dtype), dk_BKTH, dv_BKTH, dfar_BNT


def widen(tensor: Tensor) -> Tensor:
    """Return `tensor` in the dtype that sums are kept in: FP32, or its own where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _pass_round(own: Tensor, ring: SequenceRing) -> Iterator[tuple[int, Tensor]]:
    """Yield each rank with its tensor, this one's first; the next one travels while the caller computes."""
    here = own
    for step in range(ring.size):
        is_last = step == ring.size - 1
        arrive = None if is_last else _pass_on(here, ring)
        yield (ring.rank - step) % ring.size, here
        if arrive is not None:
            here = arrive()


def _take_home(gradient: Tensor, ring: SequenceRing) -> Tensor:
    """Send the gradient of keys and values on with them: after as many steps as there are ranks it is home."""
    return _pass_on(gradient, ring)()


def _pass_on(tensor: Tensor, ring: SequenceRing) -> Callable[[], Tensor]:
    """Begin to send a tensor to the next rank; the function that is returned waits for that of the rank before."""
    sent, received = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
    if ring.size == 1:
        return lambda: sent
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, group=ring.group, group_peer=(ring.rank + 1) % ring.size),
            dist.P2POp(dist.irecv, received, group=ring.group, group_peer=(ring.rank - 1) % ring.size),
        ]
    )

    def arrive() -> Tensor:
        for work in works:
            work.wait()
        return received

    return arrive
