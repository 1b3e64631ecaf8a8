"""A function's kernels recorded once per shape and started as one afterwards, on a GPU.

    forward = GraphedFunction(model.forward, buckets=(1, 2, 4, 8, 16, 32))
    logits = forward(tokens)            # 5 rows run in the recording for 8

Starting a kernel costs the CPU some microseconds; a small model starts hundreds per call and the GPU waits for them. A
recording replays them all in one go, on fixed addresses. Hence: inputs are copied into buffers that belong to the
recording, results are copied out, a new shape needs a new recording, and with `buckets` a batch is filled up with rows
of zeros to the next size there is (each row's result must depend on that row alone).

Dropout draws anew in each replay: generators are registered with the recording, which reads their state when it is
replayed and moves it on. Warming up and recording leave them where they were, so that a run with recordings draws the
numbers that a run without would.

Which recording serves a call (`make_key`, `choose_bucket`) is plain policy. How to record is a function that is passed
in; `record_on_gpu` is the one that does. It asks for CUDA and refuses where there is none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from deepseek.core.errors import ConfigError

_NUM_WARMUPS = 3

Key = tuple[tuple[tuple[int, ...], str, str] | Any, ...]
# Takes a function and its fixed inputs; returns its fixed results and what computes them anew.
Record = Callable[[Callable[..., Any], Sequence[Any]], tuple[Any, Callable[[], None]]]


def choose_bucket(size: int, buckets: Sequence[int]) -> int:
    """Return the smallest of `buckets`, which ascend, that holds `size` rows; raises `ConfigError` for too many rows.

    >>> choose_bucket(5, (1, 2, 4, 8))
    8
    """
    index = bisect_left(buckets, size)
    if index == len(buckets):
        raise ConfigError(f"{size} rows are more than the largest bucket, {buckets[-1]}; add a bucket of that size")
    return buckets[index]


def list_buckets(largest: int) -> tuple[int, ...]:
    """Return the powers of two up to `largest`, and `largest` itself: at most half of the rows are filled up.

    >>> list_buckets(12)
    (1, 2, 4, 8, 12)
    """
    powers = (1 << exponent for exponent in range(largest.bit_length()))
    return tuple(sorted({*(power for power in powers if power <= largest), largest}))


def make_key(values: Iterable[Any], *, mode: tuple[Any, ...] = ()) -> Key:
    """Return what a recording must share to serve: shapes, dtypes and devices of tensors, other values as they are.

    >>> make_key([torch.ones(2, 3), 0.5])
    (((2, 3), 'torch.float32', 'cpu'), 0.5)
    """
    described = (
        (tuple(value.shape), str(value.dtype), str(value.device)) if isinstance(value, Tensor) else value
        for value in values
    )
    return (*described, *mode)


@dataclass(frozen=True)
class _Recording:
    inputs: list[Any]
    outputs: Any
    replay: Callable[[], None]


class GraphedFunction:
    """A function that is recorded for each shape it meets and replayed afterwards; see the header of this file."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        buckets: Sequence[int] | None = None,
        dim: int = 0,
        max_recordings: int = 32,
        state: Sequence[Tensor] = (),
        record: Record | None = None,
    ) -> None:
        """`buckets` are sizes of `dim`, the batch; none records each size by itself.

        At most `max_recordings` are kept, those used last. `state` is what the function writes besides its result:
        running it to warm up leaves that as it was, so that a training step, backward pass and optimizer included, can
        be recorded if it writes gradients and weights in place. Raises `ConfigError` where there is no CUDA.
        """
        if buckets is not None and (not buckets or sorted(set(buckets)) != list(buckets) or buckets[0] < 1):
            raise ConfigError(
                f"buckets={tuple(buckets)} do not ascend from 1 or more; list each size once, smallest first"
            )
        if max_recordings < 1:
            raise ConfigError(f"max_recordings={max_recordings} keeps nothing; choose 1 or more")
        if record is None:
            refuse_without_cuda()
        self._function = function
        self._buckets = buckets
        self._dim = dim
        self._max_recordings = max_recordings
        self._state = tuple(state)
        self._record = record or record_on_gpu
        self._recordings: OrderedDict[Key, _Recording] = OrderedDict()

    @property
    def num_recordings(self) -> int:
        """Return the number of recordings that are kept."""
        return len(self._recordings)

    def __call__(self, *inputs: Any) -> Any:
        """Return the function's result for `inputs`, in tensors of their own."""
        flat, spec = tree_flatten(inputs)
        size, bucket = self._find_sizes(flat)
        recording = self._find(flat, spec, bucket)
        for fixed, value in zip(recording.inputs, flat, strict=True):
            if isinstance(value, Tensor):
                self._fill(fixed, value)
        recording.replay()
        return tree_map_only(Tensor, lambda value: self._take(value, size, bucket), recording.outputs)

    def _find_sizes(self, flat: Sequence[Any]) -> tuple[int, int]:
        """Return the rows of the batch, and rows of the recording."""
        if self._buckets is None:
            return -1, -1
        sizes = {leaf.shape[self._dim] for leaf in flat if isinstance(leaf, Tensor) and leaf.dim() > self._dim}
        if len(sizes) != 1:
            raise ConfigError(
                f"inputs have {sorted(sizes)} rows in dim {self._dim}; one number of rows is needed for all"
            )
        (size,) = sizes
        return size, choose_bucket(size, self._buckets)

    def _find(self, flat: Sequence[Any], spec: Any, bucket: int) -> _Recording:
        wanted = [self._widen(leaf, bucket) if isinstance(leaf, Tensor) else leaf for leaf in flat]
        key = make_key(wanted, mode=(spec, torch.is_grad_enabled()))
        if key not in self._recordings:
            fixed = [
                torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, Tensor) else leaf
                for leaf in wanted
            ]
            for buffer, value in zip(fixed, flat, strict=True):
                if isinstance(value, Tensor):
                    self._fill(buffer, value)
            with _unchanged(self._state):
                outputs, replay = self._record(self._function, tree_unflatten(fixed, spec))
            self._recordings[key] = _Recording(fixed, outputs, replay)
            if len(self._recordings) > self._max_recordings:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        return self._recordings[key]

    def _widen(self, value: Tensor, bucket: int) -> Tensor:
        """Return a tensor of the shape that the recording takes, without memory."""
        shape = list(value.shape)
        if bucket >= 0 and value.dim() > self._dim:
            shape[self._dim] = bucket
        return value.new_empty(()).expand(shape)

    def _fill(self, fixed: Tensor, value: Tensor) -> None:
        if fixed.shape == value.shape:
            fixed.copy_(value)
            return
        size = value.shape[self._dim]
        fixed.narrow(self._dim, 0, size).copy_(value)
        fixed.narrow(self._dim, size, fixed.shape[self._dim] - size).zero_()

    def _take(self, output: Tensor, size: int, bucket: int) -> Tensor:
        if size == bucket:
            return output.clone()
        if output.dim() <= self._dim or output.shape[self._dim] != bucket:
            raise ConfigError(
                f"a result has shape {tuple(output.shape)} and no {bucket} rows in dim {self._dim}, so that rows that "
                "were filled up are mixed into it; call without buckets"
            )
        return output.narrow(self._dim, 0, size).clone()


@contextmanager
def _unchanged(state: Sequence[Tensor]) -> Iterator[None]:
    kept = [tensor.detach().clone() for tensor in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)


def refuse_without_cuda() -> None:
    """Raise `ConfigError` unless there is a GPU that can record."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "CUDA graphs were asked for and torch sees no CUDA device; run on an NVIDIA GPU with a CUDA "
            "build of torch, or call the function itself"
        )


def record_on_gpu(
    function: Callable[..., Any], inputs: Sequence[Any], *, generators: Sequence[torch.Generator] = ()
) -> tuple[Any, Callable[[], None]]:
    """Record `function` on `inputs`, whose addresses it keeps; what it returned, and what replays it.

    `generators` are those, besides the default one of the device, that `function` draws from.
    """
    refuse_without_cuda()
    device = next((leaf.device for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)), torch.device("cuda"))
    drawn = [torch.cuda.default_generators[device.index or torch.cuda.current_device()], *generators]
    states = [generator.get_state() for generator in drawn]
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_NUM_WARMUPS):
            function(*inputs)
    torch.cuda.current_stream(device).wait_stream(side)
    for generator, state in zip(drawn, states, strict=True):
        generator.set_state(state)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        outputs = function(*inputs)
    return outputs, graph.replay
