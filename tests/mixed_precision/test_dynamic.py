import copy
import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from deepseek.checkpoint.structure import flatten, unflatten
from deepseek.core.errors import CheckpointError, ConfigError
from deepseek.mixed_precision import DynamicPrecision, GradScaler
from deepseek.mixed_precision.dynamic import PrecisionChanged, PrecisionPlanned, choose_low
from deepseek.mixed_precision.layer_precision import tally_of
from deepseek.mixed_precision.policy import Evidence, LayerState, Rules
from deepseek.models.decoder.model import Decoder, DecoderConfig
from tests.mixed_precision.ranks import run_on_ranks

SMALL = DecoderConfig(vocab_size=64, num_layers=2, hidden_size=32, num_heads=2, ffn_size=64, max_length=32)
QUICK = {"window": 2, "every": 4, "costs": "assumed"}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def batches(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        x = torch.randn(16, 8, generator=generator)
        yield x, x[:, :4].argmax(1)


def run(model, dynamic, num_steps, *, scaler=None, seed=0, lr=0.05, optimizer=None):
    """Plain training; returns the losses and the events."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses, events = [], []
    for x, y in batches(num_steps, seed):
        loss = F.cross_entropy(model(x).float(), y)
        losses.append(loss.item())
        if scaler is None:
            loss.backward()
            optimizer.step()
            events += dynamic.step()
        else:
            scaler.scale(loss).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            events += dynamic.step(is_skipped=scaler.get_scale() < before)
        optimizer.zero_grad()
    return losses, events


def assume(dynamic, **changes):
    """Evidence as it was measured, but for some values in some layers."""
    gather = dynamic._gather

    def changed():
        found = gather()
        return {
            name: dataclasses.replace(each, **changes[name]) if name in changes else each
            for name, each in found.items()
        }

    dynamic._gather = changed


def test_all_in_bf16_computes_what_autocast_computes_to_the_bit():
    model, reference = Decoder(SMALL), Decoder(SMALL)
    reference.load_state_dict(model.state_dict())
    dynamic = DynamicPrecision(model, low="bf16", narrow_storage=False)
    tokens = torch.randint(0, 64, (2, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = reference(tokens)
    assert torch.equal(model(tokens), expected)
    dynamic.remove()
    assert torch.equal(model(tokens), reference(tokens))


def test_narrow_storage_changes_no_forward_value_and_few_bits_of_gradients():
    tokens = torch.randint(0, 64, (2, 32))
    outputs, gradients = [], []
    for narrow in (False, True):
        torch.manual_seed(0)
        model = Decoder(SMALL)
        DynamicPrecision(model, low="bf16", narrow_storage=narrow)
        outputs.append(model(tokens))
        F.cross_entropy(outputs[-1].float().flatten(0, 1), tokens.flatten()).backward()
        gradients.append([each.grad for each in model.parameters()])
    assert torch.equal(*outputs)
    for exact, rounded in zip(*gradients, strict=True):
        assert (exact - rounded).norm() <= 0.02 * exact.norm()


def test_a_quiet_model_stays_in_bf16_and_says_so():
    model = build()
    dynamic = DynamicPrecision(model, low="bf16", **QUICK)
    losses, events = run(model, dynamic, 40)
    assert set(dynamic.precisions.values()) == {"bf16"} and losses[-1] < 0.7 * losses[0]
    assert [event for event in events if isinstance(event, PrecisionChanged)] == []
    assert [event.step for event in events] == [2, 4, 9, 17, 25, 33]
    assert json.dumps([event.to_dict() for event in events])
    table = dynamic.explain().splitlines()
    assert len(table) == 4 and "noise share" in table[0] and "gradient noise" in table[1]


def test_a_layer_whose_gradient_hardly_varies_goes_up_at_once_and_comes_down_slowly():
    model = build()
    dynamic = DynamicPrecision(model, low="bf16", rules=Rules(patience=2), **QUICK)
    gather = dynamic._gather
    assume(dynamic, **{"3": {"signal": 1e9}})
    _, events = run(model, dynamic, 3)
    changes = [event for event in events if isinstance(event, PrecisionChanged)]
    assert changes == [PrecisionChanged(2, "3", "bf16", "fp32", changes[0].reason)]
    assert "of the gradient noise" in changes[0].reason
    assert model[3](torch.ones(1, 32)).dtype == torch.float32 and model[0].compute.dtype == torch.bfloat16
    dynamic._gather = gather
    _, events = run(model, dynamic, 10)
    changes = [event for event in events if isinstance(event, PrecisionChanged)]
    assert [(event.layer, event.after) for event in changes] == [("3", "bf16")]
    assert changes[0].step > 4  # one good window was not enough


def test_the_same_batch_again_and_again_has_no_gradient_noise_to_hide_in():
    model = build()
    dynamic = DynamicPrecision(model, low="bf16", **QUICK)
    x, y = next(batches(1))
    for _ in range(2):
        F.cross_entropy(model(x).float(), y).backward()
        dynamic.step()
        model.zero_grad()
    assert set(dynamic.precisions.values()) == {"fp32"}


def test_operators_between_layers_run_as_most_layers_do():
    model = build()
    dynamic = DynamicPrecision(model, low="bf16", **QUICK)
    for num_wide, dtype in ((1, torch.bfloat16), (2, None)):
        states = {name: LayerState("fp32" if index < num_wide else "bf16") for index, name in enumerate(dynamic.layers)}
        dynamic._change(states)
        assert model.compute.dtype == dtype
        assert [model[index].compute.dtype for index in (0, 3, 5)].count(None) == num_wide
        assert model(torch.ones(1, 8)).dtype == torch.bfloat16


def test_a_part_whose_layers_are_all_wide_computes_wide_in_between():
    torch.manual_seed(0)
    model = Decoder(SMALL)
    dynamic = DynamicPrecision(model, low="bf16", **QUICK)
    wide = [name for name in dynamic.layers if name.startswith("layers.1.attention")]
    dynamic._change(dynamic.states | {name: LayerState("fp32") for name in wide})
    assert model.layers[1].attention.compute.dtype is None
    assert "compute" not in model.layers[0].attention.__dict__  # as around it
    seen = {}
    for index in (0, 1):
        model.layers[index].attention.register_forward_hook(
            lambda *hook, index=index: seen.update({index: hook[2].dtype})
        )
    model(torch.zeros(1, 8, dtype=torch.long))
    assert seen == {0: torch.bfloat16, 1: torch.float32}


def test_hooks_stand_only_on_sampled_steps():
    model = build()
    dynamic = DynamicPrecision(model, low="bf16", rules=Rules(patience=1), **QUICK)
    sampled = []
    for step, (x, y) in enumerate(batches(10)):
        sampled += [step] if model[0]._forward_hooks else []
        F.cross_entropy(model(x).float(), y).backward()
        dynamic.step()
        model.zero_grad()
    assert sampled == [0, 1, 4, 8]
    dynamic.remove()
    assert not model[0]._forward_hooks and "forward" not in model[0].__dict__ and "forward" not in model.__dict__


def test_a_sampled_step_changes_no_number():
    results = []
    for every in (1, 1000):
        model = build()
        dynamic = DynamicPrecision(model, low="bf16", window=2, every=every, costs="measured")
        torch.manual_seed(7)
        losses, _ = run(model, dynamic, 12)
        assert set(dynamic.precisions.values()) <= {"bf16", "fp32"}
        results.append((torch.rand(1).item(), losses[:2]))
    assert results[0] == results[1]


# FP16, in which a CPU computes slowly and with the right numbers

TEMPERATURE = 2e5  # makes logits too large for FP16, and their gradients too small


def build_breaking():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4, bias=False))
    with torch.no_grad():
        model[4].weight.mul_(TEMPERATURE)
    return model


def train_breaking(kind, *, start="auto", num_steps=300):
    model = build_breaking()
    groups = [
        {"params": [*model[0].parameters(), *model[2].parameters()]},
        {"params": model[4].parameters(), "lr": 0.05 * TEMPERATURE**2},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    scaler = GradScaler(enabled=kind != "fp32")
    dynamic = None
    if kind == "dynamic":
        dynamic = DynamicPrecision(model, low="fp16", scaler=scaler, start=start, every=10, costs="assumed")
    losses, events = [], []
    for x, y in batches(num_steps):
        with torch.autocast("cpu", dtype=torch.float16, enabled=kind == "plain"):
            logits = model(x)
        loss = F.cross_entropy(logits.float() / TEMPERATURE, y)
        losses.append(loss.item())
        before = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if dynamic:
            events += dynamic.step(is_skipped=scaler.get_scale() < before)
        optimizer.zero_grad()
    return sum(losses[-30:]) / 30, dynamic, events


def test_a_model_that_breaks_plain_fp16_trains_as_in_fp32():
    wide, _, _ = train_breaking("fp32")
    assert wide < 0.4
    plain, _, _ = train_breaking("plain", num_steps=50)
    assert math.isnan(plain)
    for start in ("fp32", "low"):
        loss, dynamic, _ = train_breaking("dynamic", start=start)
        assert loss == pytest.approx(wide, rel=0.1)
        assert dynamic.precisions == {"0": "fp16", "2": "fp16", "4": "fp32"}
        assert "fp16 ends below 2^16" in dynamic.explain()


def test_the_layer_where_infinities_begin_is_found_in_one_step():
    _, dynamic, events = train_breaking("dynamic", start="low", num_steps=1)
    assert events == [PrecisionChanged(1, "4", "fp16", "fp32", "activations became infinite or no numbers here")]
    assert dynamic.precisions == {"0": "fp16", "2": "fp16", "4": "fp32"}


def test_an_infinite_gradient_without_a_scaler_is_traced_to_its_first_layer():
    model = build()
    dynamic = DynamicPrecision(model, low="fp16", start="low", **QUICK)
    (model(torch.ones(2, 8)).float() * 1e9).sum().backward()
    (event,) = dynamic.step()
    assert (event.layer, event.after) == ("5", "fp32") and event.reason.startswith("gradients became infinite")


def test_a_skipped_step_makes_the_next_one_sampled():
    model = build()
    dynamic = DynamicPrecision(model, low="bf16", rules=Rules(patience=1), window=2, every=100, costs="assumed")
    run(model, dynamic, 5)
    assert not model[0]._forward_hooks
    dynamic.step(is_skipped=True)
    assert model[0]._forward_hooks


# Checkpoints, ranks, compilers


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped():
    def fresh():
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        dynamic = DynamicPrecision(model, low="bf16", **QUICK)
        assume(dynamic, **{"0": {"signal": 1e9}})
        return model, optimizer, dynamic

    whole = fresh()
    expected_losses, expected_events = [], []
    for seed in (0, 1):  # the first part ends in the middle of a window
        losses, events = run(whole[0], whole[2], (6, 16)[seed], seed=seed, optimizer=whole[1])
        expected_losses += losses
        expected_events += events
        if seed == 0:
            parts = {
                "model": whole[0].state_dict(),
                "optimizer": whole[1].state_dict(),
                "dynamic": whole[2].state_dict(),
            }
            structure, tensors = flatten(copy.deepcopy(parts))
    state = unflatten(structure, tensors)
    model, optimizer, dynamic = fresh()
    for part, name in ((model, "model"), (optimizer, "optimizer"), (dynamic, "dynamic")):
        part.load_state_dict(state[name])
    assert dynamic.precisions["0"] == "fp32"
    structure, tensors = flatten(dynamic.state_dict())
    saved_structure, saved_tensors = flatten(state["dynamic"])
    assert structure == saved_structure and tensors.keys() == saved_tensors.keys() and len(tensors) == 5
    assert all(torch.equal(tensors[name], saved_tensors[name]) for name in tensors)
    losses, events = run(model, dynamic, 16, seed=1, optimizer=optimizer)
    assert losses == expected_losses[6:]
    assert events == [event for event in expected_events if event.step > 6] and events
    assert dynamic.precisions == whole[2].precisions


def test_states_of_other_models_and_formats_are_refused():
    state = DynamicPrecision(build(), low="bf16").state_dict()
    with pytest.raises(CheckpointError, match=r"another model \(layers that differ: 1, 2, 3\)"):
        DynamicPrecision(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)), low="bf16").load_state_dict(
            state
        )
    with pytest.raises(CheckpointError, match="version 1 with bf16 and expected are version 1 with fp16"):
        DynamicPrecision(build(), low="fp16").load_state_dict(state)


def test_ranks_with_different_data_decide_the_same(tmp_path):
    answers = run_on_ranks(
        """
import torch.nn.functional as F
from torch import nn
from deepseek.mixed_precision import DynamicPrecision
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
dynamic = DynamicPrecision(model, low="fp16", start="low", window=2, every=4)
events = []
for step in range(8):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step * 2 + rank))
    if rank == 1 and step == 2:
        x = x * 1e6  # only this rank sees activations beyond FP16
    F.cross_entropy(model(x).float().clamp(-50, 50), torch.zeros(16, dtype=torch.long)).backward()
    events += [event.to_dict() for event in dynamic.step()]
    model.zero_grad()
seconds = {name: each.seconds for name, each in dynamic.savings.items()}
answer([events, dynamic.precisions, seconds, {name: each.share for name, each in dynamic.verdicts.items()}])
""",
        2,
        tmp_path,
    )
    assert answers[0] == answers[1]
    assert any(event["kind"] == "precision_changed" and event["layer"] == "0" for event in answers[0][0])


@pytest.mark.parametrize("compiled", ["whole", "method"])
def test_a_compiled_model_is_compiled_again_only_when_a_decision_changes(compiled):
    torch._dynamo.reset()
    model, counter = build(), CompileCounter()
    if compiled == "whole":
        run_model = torch.compile(model, backend=counter, fullgraph=True)
    else:
        model.compile(backend=counter, fullgraph=True)
        run_model = model
    dynamic = DynamicPrecision(run_model, low="bf16", **QUICK)
    assert list(dynamic.layers) == ["0", "3", "5"]
    run(run_model, dynamic, 12)
    assert counter.frame_count == 1 and set(dynamic.precisions.values()) == {"bf16"}
    assume(dynamic, **{"3": {"signal": 1e9}})
    run(run_model, dynamic, 6, seed=1)
    assert dynamic.precisions["3"] == "fp32" and counter.frame_count == 2
    run(run_model, dynamic, 6, seed=2)
    assert counter.frame_count == 2
    dynamic.remove()
    if compiled == "whole":  # by itself, torch does not compile a Sequential's own call
        run_model(torch.ones(16, 8))
        assert counter.frame_count == 3
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by torch's compiler itself
def test_equal_blocks_are_compiled_once_and_once_more_where_one_differs():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, counter = Decoder(SMALL.override({"num_layers": 10})), CompileCounter()
    for layer in model.layers:
        layer.compile(backend=counter, fullgraph=True)
    dynamic = DynamicPrecision(model, low="bf16", **QUICK)

    def take_steps(num_steps):
        for _ in range(num_steps):
            tokens = torch.randint(0, 64, (2, 17))
            F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
            dynamic.step()
            model.zero_grad()

    take_steps(8)
    assert counter.frame_count == 1
    assume(dynamic, **{f"layers.3.feedforward.{name}_proj": {"signal": 1e9} for name in ("gate", "up", "down")})
    take_steps(8)
    assert [name for name, each in dynamic.precisions.items() if each == "fp32"] and counter.frame_count == 2
    torch._dynamo.reset()


def test_compiled_code_that_no_hook_sees_into_is_not_taken_for_silence():
    torch._dynamo.reset()
    model = build()
    dynamic = DynamicPrecision(model, low="bf16")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.ones(2, 8)).float().sum().backward()
    with pytest.raises(ConfigError, match=r"run by compiled code.*compile with model.compile\(\)"):
        dynamic.step()
    torch._dynamo.reset()


def test_an_evaluation_between_two_steps_is_no_part_of_the_sample():
    model = build()
    dynamic = DynamicPrecision(model, low="bf16", **QUICK)
    F.cross_entropy(model(torch.ones(4, 8)).float(), torch.zeros(4, dtype=torch.long)).backward()
    with torch.no_grad():
        model(torch.full((4, 8), 3e38))  # would be infinite in the first layer
    assert dynamic.step() == () and set(dynamic.precisions.values()) == {"bf16"}


def test_eager_code_loads_no_compiler():
    code = """
import sys, torch
from deepseek.mixed_precision import DynamicPrecision
model = torch.nn.Linear(4, 4)
dynamic = DynamicPrecision(model, low="bf16", costs="assumed")
model(torch.ones(1, 4)).sum().backward()
dynamic.step()
print("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == [
        "False"
    ]


# Bad input


def test_a_step_without_gradients_is_explained():
    dynamic = DynamicPrecision(build(), low="bf16")
    with pytest.raises(ConfigError, match=r"after backward\(\) and before zero_grad\(\)"):
        dynamic.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": "fp8"}, "unknown 16-bit format 'fp8'"),
        ({"every": 0}, "every is 0"),
        ({"window": 1}, "window is 1 samples"),
        ({"start": "hot"}, "unknown start 'hot'"),
        ({"costs": "guessed"}, "unknown costs 'guessed'"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DynamicPrecision(build(), **options)


def test_a_model_without_products_is_refused():
    with pytest.raises(ConfigError, match="Sequential has no layer with a weight matrix"):
        DynamicPrecision(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))


def test_formats_by_device(monkeypatch):
    monkeypatch.setattr("deepseek.mixed_precision.dynamic.has_native_bf16", lambda device: False)
    assert choose_low("auto", torch.device("cpu")) == "bf16"
    assert choose_low("auto", torch.device("cuda")) == "fp16"


def test_evidence_and_events_are_plain_values():
    assert dataclasses.asdict(Evidence())["signal"] == 0.0
    assert PrecisionPlanned(1, 2, 3, 0.5).to_dict()["kind"] == "precision_planned"


def test_hooks_that_find_nothing_to_narrow_are_taken_off_until_the_next_look():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    dynamic = DynamicPrecision(model, low="bf16", window=2, every=6, costs="assumed")
    was_open = []
    for _ in range(8):
        was_open.append(tally_of(model).is_open)
        model(torch.randn(16, 1, 8, 8)).float().sum().backward()
        dynamic.step()
        model.zero_grad()
    assert was_open == [True] * 4 + [False, False, True, False]  # four early samples, one at the sixth step


def test_hooks_that_narrow_stay():
    model = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 64))
    dynamic = DynamicPrecision(model, low="bf16", window=2, every=100, costs="assumed")
    for _ in range(8):
        model(torch.randn(512, 64)).float().sum().backward()
        dynamic.step()
        model.zero_grad()
    assert tally_of(model).is_open
    dynamic.remove()
    dynamic.step()  # means nothing any more
