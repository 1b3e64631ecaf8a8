import numpy as np
import pytest
import torch

from deepseek import load_model
from deepseek.compiler.runtimes.backends.interface import BackendError
from deepseek.core.errors import ConfigError
from deepseek.models import zoo
from deepseek.models.loading import save_model
from deepseek.models.sample_file import NUM_ROWS, read_samples

DRAWN = (torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, dtype=torch.int64))


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_arrays_become_batches_of_the_inputs_types_in_their_order(tmp_path):
    images, tokens = np.random.rand(7, 3, 16, 16), np.arange(35, dtype=np.int32).reshape(7, 5)
    path = write(tmp_path / "rows.npz", images=images, labels=np.zeros(7), tokens=tokens)
    batches = read_samples(path, DRAWN)
    assert len(batches) == 3 and [each.dtype for each in batches[0]] == [torch.float32, torch.int64]
    assert torch.equal(batches[1][1], torch.from_numpy(tokens[2:4]).long())
    assert torch.equal(batches[2][0], torch.from_numpy(images[4:6]).float())


def test_int8_is_calibrated_on_no_more_rows_than_it_needs(tmp_path):
    path = write(tmp_path / "rows.npz", images=np.zeros((500, 1)))
    assert len(read_samples(path, (torch.zeros(2, 1),))) == NUM_ROWS // 2
    assert len(read_samples(path, (torch.zeros(400, 1),))) == 1


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((4, 3, 8, 8))}, "1 arrays (images) and the model takes 2 inputs"),
        ({"images": np.zeros((4, 3, 8)), "tokens": np.zeros((4, 5))}, "images of shape"),
        ({"images": np.zeros((1, 3, 8, 8)), "tokens": np.zeros((1, 5))}, "at least 2 of them"),
        ({"images": np.array([{}]), "tokens": np.zeros((4, 5))}, "is no .npz file"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path, arrays, words):
    with pytest.raises(ConfigError) as caught:
        read_samples(write(tmp_path / "rows.npz", **arrays), DRAWN)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x93NUMPY"])
def test_what_is_no_file_of_arrays_is_refused(tmp_path, content):
    path = tmp_path / "rows.npz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"no .npz file"):
        read_samples(path, DRAWN)
    with pytest.raises(ConfigError, match=r"no .npz file.*No such file"):
        read_samples(tmp_path / "missing.npz", DRAWN)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    model = zoo.build("resnet18", width=8, num_classes=10)
    save_model(zoo.settle_(model, torch.randn(8, 3, 32, 32)).eval(), tmp_path / "model")
    return tmp_path / "model"


def test_drawn_inputs_leave_int8_alone(model):
    loaded = load_model(model, {"backend": "eager", "shapes": {"images": (2, 3, 32, 32)}, "time_budget_s": 5.0})
    assert "all of int8: it is calibrated on inputs, and these were drawn at random" in loaded.explain()
    with (
        pytest.warns(UserWarning, match="calibrated on inputs that were drawn at random"),
        pytest.raises(BackendError, match="convolutions"),  # which int8 in eager mode does not cover
    ):
        load_model(model, {"backend": "eager", "precision": "int8", "shapes": {"images": (2, 3, 32, 32)}})


def test_samples_are_what_a_backend_is_measured_with(model, tmp_path):
    images = np.random.default_rng(0).normal(3.0, 0.1, (5, 3, 40, 40))
    path = write(tmp_path / "rows.npz", images=images, labels=np.zeros(5))
    config = {"backend": "eager", "samples": path, "batch_size": 2, "time_budget_s": 5.0}
    loaded = load_model(model, config)
    assert torch.equal(loaded.sample_inputs[0], torch.from_numpy(images[:2]).float())
    assert "all of int8" not in loaded.explain()
