import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek.checkpoint.restoring import DamagedCheckpointWarning, load, newest_valid
from deepseek.checkpoint.saving import save
from deepseek.core.errors import CheckpointError, UnsupportedSchemaError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_type_and_shape_come_back_bit_for_bit(tmp_path, dtype):
    torch.manual_seed(0)
    raw = torch.randint(0, 256, (6 * 4 * dtype.itemsize,), dtype=torch.uint8)
    whole = (raw & 1).bool().reshape(6, -1) if dtype is torch.bool else raw.view(dtype).reshape(6, 4)
    state = {"whole": whole, "scalar": whole[0, 0], "row": whole[2], "turned": whole.t(), "strided": whole[::2, 1:3]}
    save(tmp_path, 1, state | {"empty": whole[:0]})
    back = newest_valid(tmp_path).state
    assert back.pop("empty").shape == (0, whole.shape[1])
    for name, tensor in state.items():
        assert (back[name].dtype, back[name].shape) == (dtype, tensor.shape)
        assert bits(back[name]) == bits(tensor)


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)])
def test_a_resumed_optimizer_takes_the_same_steps(tmp_path, make):
    def build():
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        return model, make(model.parameters())

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()

    model, optimizer = build()
    step(model, optimizer)
    save(tmp_path, 1, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()})
    step(model, optimizer)

    resumed, resumed_optimizer = build()
    state = newest_valid(tmp_path).state
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    step(resumed, resumed_optimizer)
    for left, right in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert bits(left) == bits(right)


def test_restored_tensors_outlive_their_folder_and_do_not_share_it(tmp_path):
    path = save(tmp_path, 1, {"weight": torch.ones(1000)})
    weight = newest_valid(tmp_path).state["weight"]
    (path / "state.safetensors").write_bytes(b"\0" * (path / "state.safetensors").stat().st_size)
    assert weight.sum() == 1000


def test_without_checkpoints_there_is_none(tmp_path):
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "not-there") is None


def test_a_file_in_place_of_the_folder_is_explained(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        newest_valid(tmp_path / "checkpoints")


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, {"step": step})
    assert newest_valid(tmp_path).step == 100_000_000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    name=st.sampled_from(["state.json", "state.safetensors", "checksums.json"]),
    position=st.integers(min_value=0),
    bit=st.integers(0, 7),
)
def test_a_flipped_bit_anywhere_falls_back_to_the_checkpoint_before(tmp_path, name, position, bit):
    save(tmp_path, 1, {"value": 0.5, "weight": torch.arange(5)})
    path = save(tmp_path, 2, {"value": 1.5, "weight": torch.arange(7)}) / name
    damaged = bytearray(path.read_bytes())
    damaged[position % len(damaged)] ^= 1 << bit
    path.write_bytes(damaged)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = newest_valid(tmp_path)
    if caught:
        assert caught[0].category is DamagedCheckpointWarning and "step-00000002" in str(caught[0].message)
        assert (found.step, found.state["value"]) == (1, 0.5)
    else:  # the bit was in white space of the checksums
        assert name == "checksums.json" and found.state["value"] == 1.5


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "checksums.json"])
def test_a_missing_or_truncated_file_falls_back_and_is_named(tmp_path, name):
    save(tmp_path, 1, {"weight": torch.zeros(3)}, keep=3)
    path = save(tmp_path, 2, {"weight": torch.zeros(3)}, keep=3) / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(DamagedCheckpointWarning, match=name):
        assert newest_valid(tmp_path).step == 1
    path.unlink()
    with pytest.warns(DamagedCheckpointWarning, match=name):
        assert newest_valid(tmp_path).step == 1


def test_only_damaged_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step, {}) / "state.json").unlink()
    with (
        pytest.warns(DamagedCheckpointWarning),
        pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged"),
    ):
        newest_valid(tmp_path)


def test_a_checkpoint_of_a_newer_deepseek_is_not_skipped(tmp_path):
    save(tmp_path, 1, {})
    path = save(tmp_path, 2, {}) / "checksums.json"
    values = json.loads(path.read_text()) | {"schema_version": 2}
    del values["sha256"]  # a newer one brings its own; a table with the digest of this one would be damaged
    path.write_text(json.dumps(values))
    with pytest.raises(UnsupportedSchemaError, match="upgrade deepseek-engine"):
        newest_valid(tmp_path)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    path = save(tmp_path, 100, {})
    path.rename(tmp_path / "step-00000900")
    with pytest.raises(CheckpointError, match="holds step 100"):
        load(tmp_path / "step-00000900")


def test_any_flipped_bit_in_the_checksums_leads_to_the_older_checkpoint(tmp_path):
    save(tmp_path, 1, {"w": torch.ones(2)})
    path = save(tmp_path, 2, {"w": torch.zeros(2)}) / "checksums.json"
    content = path.read_bytes()
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << (at % 7)
        path.write_bytes(flipped)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = newest_valid(tmp_path)
        # A flip in white space changes nothing that is read.
        is_same = json_or_none(flipped) == json.loads(content)
        assert found.step == (2 if is_same else 1), bytes(flipped[max(0, at - 20) : at + 20])
        assert bool(caught) != is_same


def json_or_none(content):
    try:
        return json.loads(bytes(content))
    except ValueError:
        return None


def test_a_table_without_a_digest_of_its_own_is_still_read(tmp_path):
    path = save(tmp_path, 1, {"w": torch.ones(2)}) / "checksums.json"
    values = json.loads(path.read_bytes())
    del values["sha256"]
    path.write_text(json.dumps(values))
    assert newest_valid(tmp_path).step == 1
