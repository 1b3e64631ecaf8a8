"""A subject answers orders over a pipe; here in a thread of this process, so that its answers can be compared."""

import multiprocessing
import threading

import numpy
import pytest
import torch

from deepseek.bench.variants import Subject
from deepseek.bench.worker import native_precisions, work
from deepseek.mixed_precision.forward_precision import has_native_bf16
from deepseek.models import zoo
from deepseek.models.loading import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    network = zoo.build("resnet18", width=8, num_classes=4).eval()
    folder = tmp_path_factory.mktemp("worker") / "model"
    save_model(network, folder)
    return network, str(folder)


class Asked:
    """The process above: sends orders and waits for answers, a minute at most."""

    def __init__(self, subject, model, settings):
        self.ours, theirs = multiprocessing.Pipe()
        self.thread = threading.Thread(target=work, args=(theirs, subject, model, settings), daemon=True)
        self.thread.start()

    def receive(self):
        assert self.ours.poll(60), "no answer"
        return self.ours.recv()

    def ask(self, *order):
        self.ours.send(order)
        return self.receive()

    def end(self):
        self.ours.send(None)
        self.thread.join(60)
        return not self.thread.is_alive()


def test_orders_are_answered_until_the_end(model, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path))
    network, path = model
    settings = {"batch_size": 2, "time_budget_s": 1.0, "shapes": {"images": (2, 3, 32, 32)}}
    asked = Asked(Subject("row", "eager", "fp32", "as it was"), path, settings)
    state, note = asked.receive()
    assert state == "ready"
    assert note.startswith("as it was; eager")
    latencies_s = asked.ask("time", 3)
    assert len(latencies_s) == 3
    assert min(latencies_s) > 0
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(images)
    numpy.testing.assert_allclose(asked.ask("answers", images.numpy()), expected.numpy(), rtol=1e-3, atol=1e-3)
    own = asked.ask("answers", None)
    assert own.shape == (2, 4)
    numpy.testing.assert_array_equal(own, asked.ask("answers", None))
    assert asked.ask("memory") > 50e6  # a process with torch in it
    assert "eager" in asked.ask("reason")
    assert asked.ask("warnings") == []
    assert asked.end()


def test_a_subject_that_cannot_run_sends_the_reason_and_ends(model):
    asked = Asked(Subject("row", "tensorrt", "fp32"), model[1], {"batch_size": 1})
    state, reason = asked.receive()
    assert state == "refused"
    assert "tensorrt" in reason.lower()
    asked.thread.join(60)
    assert not asked.thread.is_alive()


def test_what_a_process_is_warned_of_is_told_above(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path))
    asked = Asked(Subject("row", "eager", "fp32"), "resnet18", {"batch_size": 1, "shapes": {"images": (1, 3, 32, 32)}})
    assert asked.receive()[0] == "ready"
    (message,) = asked.ask("warnings")
    assert "random weights" in message
    assert asked.end()


def test_native_precisions_are_those_of_the_device():
    found = native_precisions()
    assert {"fp32", "int8"} <= found <= {"fp32", "int8", "bf16", "fp16", "tf32"}
    is_gpu = torch.cuda.is_available()
    assert ("bf16" in found) == has_native_bf16(torch.device("cuda" if is_gpu else "cpu"))
    assert ("fp16" in found) == ("tf32" in found) == is_gpu
