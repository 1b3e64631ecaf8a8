"""Which recording serves a call, what goes in and out of it, and on a GPU that it draws and computes the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek.compiler.runtimes.cuda_graphs import (
    GraphedFunction,
    choose_bucket,
    list_buckets,
    make_key,
    record_on_gpu,
    refuse_without_cuda,
)
from deepseek.core.errors import ConfigError
from tests.compiler.runtimes.recorder import Recorder

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def test_each_size_goes_into_the_smallest_bucket_that_holds_it():
    assert [choose_bucket(size, (2, 4, 9)) for size in (1, 2, 3, 4, 5, 9)] == [2, 2, 4, 4, 9, 9]
    with pytest.raises(ConfigError, match="10 rows are more than the largest bucket, 9"):
        choose_bucket(10, (2, 4, 9))


@pytest.mark.parametrize("largest", [1, 2, 3, 17, 64])
def test_buckets_by_default_fill_up_less_than_half(largest):
    buckets = list_buckets(largest)
    assert buckets[-1] == largest
    assert all(size > choose_bucket(size, buckets) / 2 for size in range(1, largest + 1))


def test_keys_tell_apart_what_needs_its_own_recording():
    x = torch.ones(2, 3)
    others = [torch.ones(3, 2), x.double(), x.to("meta"), 2]
    assert make_key([x]) == make_key([torch.zeros(2, 3)])
    assert all(make_key([x]) != make_key([other]) for other in others)
    assert make_key([x], mode=(True,)) != make_key([x], mode=(False,))


def test_batches_of_one_bucket_share_a_recording_and_get_their_own_answers():
    recorder = Recorder()
    function = GraphedFunction(lambda x, scale: {"y": x * scale, "z": x.sum(1)}, buckets=(2, 8), record=recorder)
    answers = []
    for size in (1, 2, 5, 8, 3):
        x = torch.randn(size, 4)
        answers.append((x, function(x, 3.0)))
    assert recorder.num_recorded == function.num_recordings == 2
    for x, answer in answers:  # later calls did not write into earlier answers
        assert torch.equal(answer["y"], x * 3.0)
        torch.testing.assert_close(answer["z"], x.sum(1))


def test_rows_that_are_filled_up_are_zeros_and_not_an_earlier_batch():
    recorder = Recorder()
    function = GraphedFunction(lambda x: x + 1, buckets=(4,), record=recorder)
    function(torch.full((4, 2), 9.0))
    function(torch.full((1, 2), 5.0))
    (fixed,) = recorder.inputs[0]
    assert fixed.tolist() == [[5.0, 5.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_without_buckets_every_shape_has_its_own_recording():
    recorder = Recorder()
    function = GraphedFunction(lambda x: x.mean(), record=recorder)
    assert [float(function(torch.full((size,), 2.0))) for size in (3, 4, 3)] == [2.0, 2.0, 2.0]
    assert recorder.num_recorded == 2


def test_the_recordings_used_last_are_kept():
    recorder = Recorder()
    function = GraphedFunction(lambda x: x * 1, max_recordings=2, record=recorder)
    for size in (1, 2, 1, 3, 1, 2):
        function(torch.ones(size))
    assert recorder.num_recorded == 4  # 1, 2, 3, and 2 again
    assert function.num_recordings == 2


def test_warming_up_leaves_the_state_as_it_was():
    weight = torch.ones(2)

    def step(x):
        weight.add_(x)
        return weight * 1

    function = GraphedFunction(step, state=(weight,), record=Recorder())
    assert function(torch.ones(2)).tolist() == [2.0, 2.0]
    assert function(torch.ones(2)).tolist() == [3.0, 3.0]


def test_a_result_that_mixes_the_rows_is_refused_for_a_bucket_that_is_filled_up():
    function = GraphedFunction(lambda x: x.mean(), buckets=(4,), record=Recorder())
    assert float(function(torch.ones(4, 2))) == 1.0
    with pytest.raises(ConfigError, match=r"shape \(\) and no 4 rows .* call without buckets"):
        function(torch.ones(3, 2))


def test_bad_settings_and_inputs_are_refused():
    for buckets in ((), (4, 2), (2, 2), (0, 1)):
        with pytest.raises(ConfigError, match="do not ascend"):
            GraphedFunction(abs, buckets=buckets, record=Recorder())
    with pytest.raises(ConfigError, match="max_recordings=0"):
        GraphedFunction(abs, max_recordings=0, record=Recorder())
    function = GraphedFunction(torch.add, buckets=(4,), record=Recorder())
    with pytest.raises(ConfigError, match=r"\[2, 3\] rows in dim 0"):
        function(torch.ones(2), torch.ones(3))


@needs_none
def test_without_cuda_it_is_refused_in_one_sentence():
    with pytest.raises(ConfigError, match="torch sees no CUDA device; run on an NVIDIA GPU"):
        GraphedFunction(abs)
    with pytest.raises(ConfigError, match="no CUDA device"):
        record_on_gpu(abs, [torch.ones(1)])
    with pytest.raises(ConfigError, match="no CUDA device"):
        refuse_without_cuda()


@needs_gpu
def test_on_a_gpu_dropout_draws_what_it_draws_without_a_recording():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).cuda().train()
    x = torch.randn(8, 64, device="cuda")
    with torch.no_grad():
        torch.cuda.manual_seed(3)
        expected = [model(x) for _ in range(4)]
        torch.cuda.manual_seed(3)
        function = GraphedFunction(model)
        answers = [function(x) for _ in range(4)]
    assert not torch.equal(answers[0], answers[1])
    for one, two in zip(answers, expected, strict=True):
        assert torch.equal(one == 0, two == 0)
        torch.testing.assert_close(one, two)


@needs_gpu
def test_on_a_gpu_a_training_step_is_recorded():
    torch.manual_seed(0)
    x, y = torch.randn(16, 32, device="cuda"), torch.randn(16, 4, device="cuda")
    weights = []
    for is_recorded in (False, True):
        torch.manual_seed(1)
        weight = torch.randn(4, 32, device="cuda", requires_grad=True)

        def step(x, y, weight=weight):
            loss = F.mse_loss(F.linear(x, weight), y)
            (gradient,) = torch.autograd.grad(loss, weight)
            with torch.no_grad():
                weight.sub_(0.1 * gradient)
            return loss.detach()

        function = GraphedFunction(step, state=(weight,)) if is_recorded else step
        for _ in range(5):
            function(x, y)
        weights.append(weight)
    torch.testing.assert_close(*weights)
