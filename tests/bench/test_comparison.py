import dataclasses

import numpy as np
import pytest
import torch

from deepseek.bench.comparison import BenchConfig, Compared, RoundDone, SubjectReady, compare, read_labelled
from deepseek.bench.variants import Subject
from deepseek.core.errors import ConfigError, StorageError
from deepseek.models import zoo
from deepseek.models.loading import save_model

EAGER = Subject("FP32 eager", "eager", "fp32")
NARROW = Subject("bf16 eager", "eager", "bf16")
AGAIN = Subject("FP32 eager again", "eager", "fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bench") / "model"
    network = zoo.build("resnet18", width=8, num_classes=4).eval()
    save_model(network, folder)
    return folder, network


@pytest.fixture(scope="module")
def labelled(model, tmp_path_factory):
    """Pictures whose labels are what the model itself says, except the last two of seven."""
    _, network = model
    inputs = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = network(inputs).argmax(1)
    labels[-2:] = (labels[-2:] + 1) % 4
    path = tmp_path_factory.mktemp("data") / "labelled.npz"
    np.savez(path, inputs=inputs.numpy(), labels=labels.numpy())
    return path


@pytest.fixture(scope="module")
def events(model, labelled):
    config = BenchConfig(model=str(model[0]), batch_sizes=(2,), num_rounds=2, data=str(labelled))
    subjects = [NARROW, Subject("nowhere", "tensorrt", "fp32")]
    return list(compare(config, subjects))


def test_every_subject_is_announced_and_every_round_is_counted(events):
    ready = [each for each in events if isinstance(each, SubjectReady)]
    assert [(each.name, each.is_refused) for each in ready] == [
        ("FP32 eager", False),
        ("bf16 eager", False),
        ("nowhere", True),
    ]
    assert [each.round for each in events if isinstance(each, RoundDone)] == [1, 2]


def test_a_row_has_its_figures_and_one_that_cannot_run_has_the_reason(events):
    (table,) = [each for each in events if isinstance(each, Compared)]
    narrow, nowhere = table.rows
    assert narrow.throughput_per_s == pytest.approx(2 / narrow.latency_ms * 1e3)
    assert narrow.latency_p95_ms >= narrow.latency_ms
    assert narrow.memory_bytes > 50e6  # a process with torch in it
    assert 0.99 < narrow.cosine < 1.0  # other arithmetic, and not the reference itself
    assert nowhere.latency_ms is None
    assert "tensorrt" in nowhere.note.lower()


def test_accuracy_counts_every_labelled_picture_once_also_where_they_fill_no_batch(events):
    assert events[-1].rows[0].accuracy == pytest.approx(5 / 7)


def test_the_peak_of_one_subject_is_not_that_of_another(model):
    small = BenchConfig(model=str(model[0]), batch_sizes=(1, 32), num_rounds=1)
    rows = list(compare(small, [EAGER]))[-1].rows
    assert rows[1].memory_bytes > rows[0].memory_bytes
    assert rows[0].agreement == rows[1].agreement == 1.0
    assert rows[0].cosine == pytest.approx(1.0)


def test_a_process_that_is_killed_is_a_row_that_says_so(model):
    import multiprocessing

    config = BenchConfig(model=str(model[0]), num_rounds=2)
    steps = compare(config, [EAGER, NARROW])
    for event in steps:
        if isinstance(event, SubjectReady) and event.name == "bf16 eager":
            newest = max(multiprocessing.active_children(), key=lambda each: each.pid)
            newest.kill()
        last = event
    eager, killed = last.rows
    assert eager.latency_ms is not None
    assert killed.latency_ms is None and "status -9" in killed.note


def test_nothing_to_compare_and_settings_that_make_no_round_are_refused(model):
    with pytest.raises(ConfigError, match="nothing to compare"):
        next(compare(BenchConfig(model="resnet18"), []))
    for change in ({"num_rounds": 0}, {"batch_sizes": (0,)}, {"batch_sizes": ()}):
        with pytest.raises(ConfigError, match="at least 1"):
            next(compare(BenchConfig(model="resnet18", **change), [EAGER]))


def test_a_warning_of_many_processes_is_said_once():
    config = BenchConfig(model="resnet18", num_rounds=1)
    with pytest.warns(UserWarning, match="random weights") as caught:
        list(compare(config, [EAGER, AGAIN]))
    assert len(caught) == 1


def test_a_model_that_is_not_there_is_refused_by_name():
    with pytest.raises(ConfigError, match="resnet18"):
        list(compare(BenchConfig(model="resnet1"), [EAGER]))


def test_data_that_is_no_labelled_data_is_refused(tmp_path):
    with pytest.raises(StorageError):
        read_labelled(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", inputs=np.array([{}], dtype=object), labels=np.zeros(1))
    for name in ("text.npz", "other.npz", "pickled.npz"):
        with pytest.raises(ConfigError, match=name):
            read_labelled(tmp_path / name)
    np.savez(tmp_path / "uneven.npz", inputs=np.zeros((3, 1)), labels=np.zeros(2))
    with pytest.raises(ConfigError, match="3 inputs and 2 labels"):
        read_labelled(tmp_path / "uneven.npz")


def test_rows_are_plain_values(events):
    assert dataclasses.asdict(events[-1])["rows"][0]["name"] == "bf16 eager"


def test_a_batch_larger_than_the_data_is_measured_with_drawn_pictures(model, labelled):
    config = BenchConfig(model=str(model[0]), batch_sizes=(9,), num_rounds=1, data=str(labelled))
    (row,) = list(compare(config, [EAGER]))[-1].rows
    assert row.accuracy == pytest.approx(5 / 7) and row.batch_size == 9
