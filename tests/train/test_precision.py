"""Precision that a run is asked for: levels, and the choice by layer with its events and its checkpoint."""

import pytest

from deepseek.core.errors import ConfigError
from deepseek.train import train
from tests.train.test_loop import assert_bit_equal, make_config, write_corpus

DYNAMIC = {"precision": "dynamic", "num_steps": 12}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "text"
    write_corpus(folder)
    return folder


def test_a_dynamic_run_tells_its_plans_and_learns_like_fp32(corpus, tmp_path):
    losses = {}
    for precision in ("dynamic", "fp32"):
        events = list(train(make_config(corpus, tmp_path / precision, precision=precision)))
        (started,) = (event for event in events if event.kind == "run_started")
        assert started.precision == precision
        plans = [event for event in events if event.kind == "precision_planned"]
        assert [plan.step for plan in plans] == ([4, 8] if precision == "dynamic" else [])
        losses[precision] = [event for event in events if event.kind == "evaluated"][-1].heldout_loss
    assert losses["dynamic"] == pytest.approx(losses["fp32"], rel=0.06)  # a dozen steps of a mixture of experts


def test_a_dynamic_run_that_was_stopped_ends_bit_equal(corpus, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for _ in train(make_config(corpus, whole, **DYNAMIC)):
        pass
    for stop in (2, 6):  # in the middle of a window, and after one
        for event in (run := train(make_config(corpus, stopped, **DYNAMIC))):
            if event.kind == "step_done" and event.step == stop:
                run.close()
                break
    for _ in train(make_config(corpus, stopped, **DYNAMIC)):
        pass
    assert_bit_equal(whole, stopped)


def test_auto_is_measured_once_for_a_run_however_often_it_is_stopped(corpus, tmp_path, monkeypatch):
    """The first process finds bf16 faster, the second, on another machine, does not; the whole run computes in bf16."""
    for _ in train(make_config(corpus, tmp_path / "whole", precision="bf16")):
        pass
    stopped = []
    for is_faster in (True, False):
        monkeypatch.setattr(
            "deepseek.mixed_precision.forward_precision.is_bf16_faster", lambda device, is_=is_faster: is_
        )
        for event in (run := train(make_config(corpus, tmp_path / "auto"))):
            if event.kind == "run_started":
                stopped.append((event.first_step, event.precision))
            if event.kind == "step_done" and event.step == 5:
                run.close()
                break
    assert stopped == [(0, "bf16"), (5, "bf16")]
    assert_bit_equal(tmp_path / "whole", tmp_path / "auto")
    assert started_in(corpus, tmp_path / "new", num_steps=1) == "fp32"
    monkeypatch.setenv("DS_AMP_LEVEL", "O0")  # an explicit wish for FP32 is granted
    assert started_in(corpus, tmp_path / "auto") == "fp32"


def started_in(corpus, folder, **changes):
    run = train(make_config(corpus, folder, **changes))
    (precision,) = (event.precision for event in run if event.kind == "run_started")
    return precision


@pytest.mark.parametrize(("level", "precision"), [("O0", "fp32"), ("O1", "bf16")])
def test_a_level_from_the_config_or_the_environment_decides(corpus, tmp_path, monkeypatch, level, precision):
    wanted = {"precision": "bf16", "num_steps": 1}
    assert started_in(corpus, tmp_path / "config", ds_amp_level=level, **wanted) == precision
    monkeypatch.setenv("DS_AMP_LEVEL", level)
    assert started_in(corpus, tmp_path / "environment", **wanted) == precision


def test_o2_is_refused_with_what_to_use_instead(corpus, tmp_path):
    with pytest.raises(ConfigError, match="choose O1, or use PrecisionManager"):
        list(train(make_config(corpus, tmp_path, ds_amp_level="O2")))
