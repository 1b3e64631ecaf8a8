"""What a step allocates, against what autograd says it saves and what another counter sees at its peak."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn

from deepseek.compiler.passes.memory.peak_tracking import StorageTracker
from deepseek.train.allocations import AllocationRecorder, Recording
from deepseek.train.step_memory import summarize

ROWS = 64


def make(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Sequential(nn.Linear(16, 16), nn.Softplus()), nn.Linear(16, 4)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, torch.randn(ROWS, 8)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def record(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Recording:
    with AllocationRecorder(model, optimizer) as recorder:
        step(model, optimizer, x)
    return recorder.recording


def bytes_by_kind(recording: Recording) -> Counter[str]:
    counts: Counter[str] = Counter()
    for one in recording.allocations:
        if one.end_s is None or one.kind in ("activations", "temporary"):
            counts[one.kind] += one.num_bytes
    return counts


def test_weights_gradients_and_state_have_their_bytes() -> None:
    model, optimizer, x = make()
    step(model, optimizer, x)
    found = bytes_by_kind(record(model, optimizer, x))
    num_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert found["parameters"] == found["gradients"] == found["optimizer state"] == num_bytes


def test_activations_are_what_autograd_saves() -> None:
    model, optimizer, x = make()
    step(model, optimizer, x)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), x]}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().mean()
    expected = sum(num_bytes for pointer, num_bytes in saved.items() if pointer not in own)
    del loss
    found = [one for one in record(model, optimizer, x).allocations if one.kind == "activations"]
    scalars = [one for one in found if one.shape == "float32[]"]  # the loss itself is alive while it is differentiated
    assert sum(one.num_bytes for one in found) == expected + sum(one.num_bytes for one in scalars)
    assert {one.path for one in found} - {""} == {"1", "2.0", "2.1", "3"}


def test_the_peak_is_that_of_another_counter() -> None:
    model, optimizer, x = make()
    step(model, optimizer, x)
    optimizer.zero_grad()
    before_bytes = 4 * 2 * sum(parameter.numel() for parameter in model.parameters()) + 4 * x.numel()
    with StorageTracker() as tracker:
        step(model, optimizer, x)
    optimizer.zero_grad()
    recording = record(model, optimizer, x)
    seen = [one for one in recording.allocations if one.kind != "other"]
    measured = summarize(1, Recording(seen, recording.phases, recording.duration_s), None)
    assert measured.peak_bytes + 4 * x.numel() - before_bytes == tracker.peak_bytes


def test_temporaries_of_the_backward_pass_belong_to_the_module_that_is_differentiated() -> None:
    model, optimizer, x = make()
    step(model, optimizer, x)
    paths = {one.path for one in record(model, optimizer, x).allocations if one.phase == "backward"}
    assert {"0", "1", "2.0", "2.1", "3"} <= paths


def test_recording_changes_no_bit_and_leaves_no_hook() -> None:
    model, optimizer, x = make()
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        record(model, optimizer, x)
        step(twin, twin_optimizer, x)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Keeping(nn.Module):
    """Keeps what it was called with, changed."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(x.detach() * 2)
        return x


def test_what_is_left_of_a_step_is_named_and_forgotten_when_it_goes() -> None:
    model, _, x = make()
    keeping = Keeping()
    model.append(keeping)
    optimizer = torch.optim.AdamW(model.parameters())
    recording = record(model, optimizer, x)  # the state is new in this step, and no leak
    assert [(one.path, one.shape) for one in recording.survivors()] == [("4", f"float32[{ROWS}, 4]")]
    keeping.kept.clear()
    assert recording.survivors() == []


def test_blocks_that_are_recomputed_keep_the_names_in_order() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
            self.last = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False))

    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = record(model, optimizer, torch.randn(ROWS, 8)).allocations
    again = [one for one in found if one.phase == "backward" and one.path.startswith("block")]
    assert again and all(one.path == "" for one in found if one.phase == "optimizer" and one.kind == "temporary")
    assert [one.path for one in found if one.kind == "activations" and one.shape != "float32[]"] == ["block.1", "last"]
