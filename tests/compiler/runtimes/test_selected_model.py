"""A model that a backend runs is called as the model is: any spelling, any shape, and no other answers in silence."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

from deepseek.compiler.runtimes import selected_model
from deepseek.compiler.runtimes.backends import BACKENDS, BackendError
from deepseek.compiler.runtimes.backends.flat_signature import flatten_model
from deepseek.compiler.runtimes.backends.interface import Built
from deepseek.compiler.runtimes.selected_model import SelectedModel
from deepseek.compiler.runtimes.selection import select
from deepseek.compiler.runtimes.selection_policy import Candidate
from deepseek.core.errors import ConfigError


class Scorer(nn.Module):
    """(B, T, 4) and (B, T) to scores (B, 3), and how many rows there were."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x, mask=None, scale=2.0):
        weights = torch.ones(x.shape[:2]) if mask is None else mask
        return self.head((x * weights[..., None]).sum(1)) * scale, x.shape[0]


class Backend:
    """Builds what answers ten times the truth, so that one sees who answered, and counts what it built."""

    def __init__(self, *, fails=False, takes_any_shape=False):
        self.shapes, self.fails, self.takes_any_shape = [], fails, takes_any_shape

    def build(self, job):
        self.shapes.append([tuple(each.shape) for each in job.inputs])
        if self.fails and len(self.shapes) > 1:
            raise BackendError("it cannot")
        flat = job.flattened.model
        return Built(lambda *inputs: [10 * each for each in flat(*inputs)], takes_any_shape=self.takes_any_shape)


def select_by(backend, samples, model=None):
    from deepseek.compiler.runtimes.backends.interface import Job

    torch.manual_seed(0)
    model = model or Scorer().eval()
    flattened = flatten_model(model, samples)
    fast = SelectedModel(backend.build(Job(flattened)), flattened, Candidate("test", "x", "fp32"), backend.build)
    return model, fast


def inputs(rows=2, length=5):
    generator = torch.Generator().manual_seed(rows + length)
    return torch.randn(rows, length, 4, generator=generator), torch.ones(rows, length)


def check_right(fast, model, *args, **kwargs):
    scores, rows = fast(*args, **kwargs)
    expected, num_rows = model(*args, **kwargs)
    torch.testing.assert_close(scores, 10 * expected)
    assert rows == num_rows


@pytest.mark.parametrize("is_named", [False, True])
def test_arguments_are_bound_by_name_however_the_samples_were_given(is_named):
    x, mask = inputs()
    model, fast = select_by(Backend(), {"x": x, "mask": mask} if is_named else (x, mask))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_right(fast, model, x, mask)
        check_right(fast, model, x, mask=mask)
        check_right(fast, model, mask=mask, x=x)


def test_other_lengths_run_on_the_backend_and_are_built_once_each():
    backend = Backend()
    model, fast = select_by(backend, inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows, length in [(2, 5), (2, 7), (3, 5), (2, 7), (3, 5)]:
            check_right(fast, model, *inputs(rows, length))
    assert [shapes[0][:2] for shapes in backend.shapes] == [(2, 5), (2, 7), (3, 5)]


def test_what_takes_any_shape_is_built_once_where_its_answers_are_tensors():
    class Plain(Scorer):
        def forward(self, x, mask):
            return super().forward(x, mask)[0]

    backend = Backend(takes_any_shape=True)
    torch.manual_seed(0)
    model, fast = select_by(backend, inputs(), Plain().eval())
    torch.testing.assert_close(fast(*inputs(3, 9)), 10 * model(*inputs(3, 9)))
    assert len(backend.shapes) == 1
    backend = Backend(takes_any_shape=True)
    model, fast = select_by(backend, inputs())
    check_right(fast, model, *inputs(3, 9))  # the number of rows is another one, and no runtime tells it
    assert len(backend.shapes) == 2


def test_a_shape_that_the_backend_cannot_run_is_answered_by_the_model_with_one_warning():
    model, fast = select_by(Backend(fails=True), inputs())
    with pytest.warns(
        UserWarning, match=r"\[3, 5, 4\].* run in eager FP32, since test x fp32 does not: it cannot"
    ) as seen:
        for _ in range(3):
            torch.testing.assert_close(fast(*inputs(3, 5)), model(*inputs(3, 5)))
    assert [each.filename for each in seen] == [__file__]


def test_after_many_shapes_no_more_are_built_and_it_is_said_once(monkeypatch):
    monkeypatch.setattr(selected_model, "MAX_SHAPES", 2)
    backend = Backend()
    model, fast = select_by(backend, inputs())
    with pytest.warns(UserWarning, match="2 shapes beside that of the samples") as seen:
        for length in (6, 7, 8, 9):
            answer = fast(*inputs(2, length))[0]
            expected = model(*inputs(2, length))[0]
            torch.testing.assert_close(answer, expected if length > 7 else 10 * expected)
    assert len(seen) == 1 and len(backend.shapes) == 3


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, r"the call has no arguments, and the samples had the arguments float32\[2, 5, 4\], float32\[2, 5\]"),
        (inputs()[:1], {}, r"the call has the arguments float32\[2, 5, 4\], and the samples had"),
        (inputs(), {"scale": 3.0}, r"float32\[2, 5\], scale=3\.0, and the samples had"),
    ],
)
def test_another_call_is_answered_by_the_model_and_explained_in_a_sentence(args, kwargs, said):
    model, fast = select_by(Backend(), inputs())
    with pytest.warns(UserWarning, match=said) as seen:
        if args:
            torch.testing.assert_close(fast(*args, **kwargs), model(*args, **kwargs))
        else:
            with pytest.raises(TypeError):
                fast()
    assert "TreeSpec" not in str(seen[0].message) and len(str(seen[0].message)) < 250


def test_a_copy_shares_what_cannot_change():
    _, fast = select_by(Backend(), inputs())
    assert copy.deepcopy(fast) is fast
    assert copy.copy(fast) is fast


def test_a_program_of_this_process_is_not_pickled():
    _, fast = select_by(Backend(), inputs())
    with pytest.raises(ConfigError, match=r"cannot be pickled.*ds\.save_model"):
        pickle.dumps(fast)


def test_two_threads_build_a_shape_once():
    backend = Backend()
    _, fast = select_by(backend, inputs())
    threads = [threading.Thread(target=fast, args=inputs(4, 4)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(backend.shapes) == 2


@pytest.mark.parametrize("name", [each for each in ("onnxruntime", "openvino") if BACKENDS[each].is_available()])
def test_a_real_backend_answers_other_lengths_like_the_model(name):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).eval()
    fast = select(model, torch.randn(2, 3, 4), backend=name, precision="fp32", time_budget_s=1, remember=False).model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((2, 3, 4), (2, 6, 4), (1, 3, 4)):
            x = torch.randn(shape)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
