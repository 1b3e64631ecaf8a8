"""`select`: the fastest correct candidate wins, all others are refused with a reason, and nothing is answered wrong.

Most tests run on backends made of a few lines each, whose speed is a sleep and whose errors are known; the last ones
run on the real ones.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from deepseek.compiler.runtimes import accuracy, decisions, selection
from deepseek.compiler.runtimes.accuracy import check_numbers, compare
from deepseek.compiler.runtimes.backends import BACKENDS, Backend, BackendError, Missing, Variant
from deepseek.compiler.runtimes.backends.flat_signature import flatten_model
from deepseek.compiler.runtimes.backends.interface import Built, Job
from deepseek.compiler.runtimes.fallbacks import Fallback
from deepseek.compiler.runtimes.selection import BackendSelector, select
from deepseek.compiler.runtimes.selection_policy import Candidate, Tolerance, judge_numbers
from deepseek.core.errors import ConfigError
from deepseek.core.registry import Registry
from tests.compiler.models import Tagger, small_mlp, small_resnet
from tests.processors import needs_avx512

LOOSE = Tolerance(relative_error=1.0, cosine=-1.0, agreement=0.0)


class Slow(nn.Module):
    """(B, 4) to (B, 3) in at least three milliseconds."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        time.sleep(0.003)
        return self.head(x)


def variant(name, run=None, *, precision="fp32", sleep_s=0.0, scale=1.0, findings=(), prior=50, fails=None, **more):
    """A candidate that answers `scale` times the truth after `sleep_s`, and counts how often it was built."""
    built = []

    def build(job):
        built.append(job)
        if fails:
            raise RuntimeError(fails)

        def call(*inputs):
            time.sleep(sleep_s)
            return [each * scale for each in map(job.flattened.model.model.head, inputs)]

        return Built(run or call, findings)

    made = Variant(name, precision, name, build, prior, **more)
    object.__setattr__(made, "built", built)
    return made


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path))
    return tmp_path / "decisions"


@pytest.fixture
def offer(monkeypatch):
    """Replaces all backends but eager by one that has the variants given."""

    def offer(*variants, missing=None, name="openvino"):
        registry = Registry("backend")
        registry.add("eager", Backend("eager", "", lambda: None, BACKENDS["eager"].variants[:1]))
        registry.add(name, Backend(name, "", lambda: missing, variants, {"fp16": "it has none"}))
        monkeypatch.setattr(selection, "BACKENDS", registry)

    return offer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Slow().eval()


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def reasons(chosen):
    return {each.candidate.removeprefix("openvino "): each.reason for each in chosen.decision.rejections}


# ---- who wins


def test_the_fastest_correct_candidate_wins_and_every_other_has_its_reason(offer, model):
    offer(
        variant("slow", sleep_s=0.002),
        variant("fast"),
        variant("wrong", scale=1.1),
        variant("nan", lambda *x: [torch.full((2, 3), math.nan)]),
        variant("shape", lambda *x: [torch.zeros(3, 2)]),
        variant("fails", fails="out of paper\nand ink"),
        variant("falls", lambda *x: 1 / 0),
        variant("lies", findings=(Fallback("nothing runs in fp32", is_serious=True),)),
        variant("useless", find_obstacle=lambda traits: f"no use for {traits.num_linears} linear layer"),
    )
    chosen = select(model, X, time_budget_s=5, remember=False)
    assert str(chosen.decision.chosen) == "openvino fast fp32"
    assert torch.equal(chosen.model(X), model.head(X))
    found = reasons(chosen)
    assert "relative error 0.1 is above" in found["wrong fp32"]
    assert "NaN or infinity" in found["nan fp32"]
    assert "shapes [(3, 2)] instead of [(2, 3)]" in found["shape fp32"]
    assert found["fails fp32"] == "fails in fp32: RuntimeError: out of paper"
    assert "fails on the samples: ZeroDivisionError" in found["falls fp32"]
    assert found["lies fp32"] == "it is not what it says: nothing runs in fp32"
    assert found["useless fp32"] == "no use for 1 linear layer"
    assert found["fp16"] == "it has none"
    assert {str(each.candidate) for each in chosen.decision.measurements} == {
        "openvino fast fp32",
        "openvino slow fp32",
        "eager plain fp32",
    }


def test_a_named_precision_tries_nothing_else(offer, model):
    offer(variant("fast"), variant("rounded", precision="int8", scale=1.01))
    chosen = select(model, X, precision="int8", time_budget_s=2, remember=False)
    assert chosen.decision.chosen.precision == "int8"
    assert {each.candidate.precision for each in chosen.decision.measurements} == {"int8"}
    assert chosen.decision.baseline_ms >= 3  # eager FP32 is measured all the same


def test_a_named_backend_tries_nothing_else(offer, model):
    offer(variant("slow", sleep_s=0.01))
    chosen = select(model, X, backend=BackendSelector.OPENVINO, time_budget_s=2, remember=False)
    assert chosen.decision.chosen.backend == "openvino"
    assert {each.candidate.backend for each in chosen.decision.measurements} == {"openvino"}


def test_the_bound_is_the_users(offer, model):
    offer(variant("wrong", scale=1.1))
    strict = select(model, X, time_budget_s=2, remember=False)
    assert strict.decision.chosen.backend == "eager"
    loose = select(model, X, time_budget_s=2, remember=False, tolerance=0.2)
    assert loose.decision.chosen.backend == "openvino"


def test_the_time_budget_ends_the_search_and_says_so(offer, model):
    offer(variant("first", sleep_s=0.1, prior=1), variant("second", prior=2))
    chosen = select(model, X, time_budget_s=0.2, remember=False)
    assert "time budget of 0.2 s was used up" in reasons(chosen)["second fp32"]


def test_a_refinement_of_something_far_behind_is_not_built(offer, model):
    refined = variant("refined", prior=9, refines="slow")
    offer(variant("fast", prior=1), variant("slow", sleep_s=0.05, prior=2), refined)
    chosen = select(model, X, time_budget_s=5, remember=False)
    assert "which it refines, takes" in reasons(chosen)["refined fp32"]
    assert refined.built == []


def test_a_harmless_finding_of_the_winner_is_a_warning(offer, model):
    offer(variant("fast", findings=(Fallback("1 of 9 products does not run in fp32"),)))
    with pytest.warns(UserWarning, match="openvino fast fp32: 1 of 9"):
        chosen = select(model, X, time_budget_s=2, remember=False)
    assert chosen.decision.winner.findings == ("1 of 9 products does not run in fp32",)
    assert "1 of 9" in chosen.explain()


def test_events_tell_the_story_in_order(offer, model):
    offer(variant("fast"), variant("wrong", scale=2.0, prior=60))
    events = []
    select(model, X, time_budget_s=2, remember=False, on_event=events.append)
    kinds = [each.kind for each in events if each.kind != "final_started"]
    assert kinds == ["candidate_started", "candidate_measured"] * 2 + [
        "candidate_started",
        "candidate_rejected",
        "decision_made",
    ]
    assert events[-1].candidate == "openvino fast fp32" and not events[-1].is_remembered
    assert [each.spent_s for each in events] == sorted(each.spent_s for each in events)


# ---- what is refused


@pytest.mark.parametrize("samples", [None, (), {}, "text"])
def test_missing_samples_are_said(model, samples):
    with pytest.raises(ConfigError, match="sample inputs"):
        select(model, samples)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_answers_no_numbers_is_no_reference(model, value):
    with torch.no_grad():
        model.head.bias[1] = value
    with pytest.raises(ConfigError, match="NaN or infinity"):
        select(model, X)


def test_a_model_in_bf16_is_no_reference(model):
    with pytest.raises(ConfigError, match=r"weights are bfloat16.*precision="):
        select(model.bfloat16(), X.bfloat16())


def test_a_model_in_training_is_refused(model):
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        select(model.train(), X)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "openvin"}, "did you mean 'openvino'"),
        ({"precision": "int7"}, "did you mean 'int8'"),
        ({"time_budget_s": 0}, "time_budget_s is 0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"calibration": [torch.ones(5, 4)]}, r"float32\[5, 4\]"),
    ],
)
def test_settings_that_cannot_be_are_refused(model, options, said):
    with pytest.raises(ConfigError, match=said):
        select(model, X, **options)


def test_a_backend_that_is_not_installed_says_how_it_would_be(offer, model):
    offer(missing=Missing("tensorrt", "pip install it"), name="tensorrt")
    with pytest.raises(BackendError, match="'tensorrt' cannot be used here: it needs tensorrt: pip install it"):
        select(model, X, backend="tensorrt")
    assert "pip install it" in reasons(select(model, X, time_budget_s=1, remember=False))["tensorrt"]


def test_nothing_correct_is_an_error_with_all_reasons(offer, model):
    offer(variant("wrong", precision="int8", scale=3.0), variant("fails", precision="int8", fails="no"))
    with pytest.raises(BackendError, match="nothing that is allowed") as raised:
        select(model, X, precision="int8", remember=False)
    for said in ("wrong int8: relative error 2 is above", "fails int8: fails in int8: RuntimeError: no"):
        assert said in str(raised.value)


def test_the_speed_that_is_quoted_and_the_table_are_of_the_same_rounds(offer, model, monkeypatch):
    rounds = []
    measure = selection.measure_in_turns

    def remember(sides, *args, **options):
        rounds.append(measure(sides, *args, **options))
        return rounds[-1]

    monkeypatch.setattr(selection, "measure_in_turns", remember)
    offer(variant("fast"), variant("near", sleep_s=0.0001), variant("slow", sleep_s=0.02))
    decision = select(model, X, time_budget_s=1, remember=False).decision
    (own,) = [each for each in rounds if list(decision.winner.times_ms) == each.get(decision.chosen)][-1:]
    assert decision.baseline_ms == statistics.median(own[selection.BASELINE])
    plain = next(each for each in decision.measurements if each.candidate == selection.BASELINE)
    assert plain.median_ms == decision.baseline_ms


# ---- the model that is returned


def test_answers_carry_no_gradient(offer, model):
    offer(variant("fast"))
    answer = select(model, X, time_budget_s=1, remember=False).model(X.requires_grad_())
    assert not answer.requires_grad


def test_keywords_and_nested_answers_come_through():
    tagger = Tagger().eval()
    inputs = {"tokens": torch.arange(6).reshape(2, 3), "mask": torch.ones(2, 3)}
    answer = select(tagger, inputs, backend="eager", remember=False).model(**inputs)
    assert answer["kind"] == "tags" and torch.equal(answer["scores"], tagger(**inputs)["scores"])


# ---- memory


def test_a_decision_is_made_once(offer, model):
    fast, slow = variant("fast"), variant("slow", sleep_s=0.002)
    offer(fast, slow)
    first = select(model, X, time_budget_s=2, name="mine")
    again = select(model, X, time_budget_s=2)
    assert again.decision.is_remembered and again.decision.chosen == first.decision.chosen
    assert (len(fast.built), len(slow.built)) == (2, 1)
    assert torch.equal(again.model(X), model.head(X))
    assert [name for name, _ in decisions.list_decisions()] == ["mine"]
    assert "remembered" in again.explain()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.head.weight.data.mul_(2),
        lambda model: torch.set_num_threads(torch.get_num_threads() + 1),
    ],
    ids=["weights", "threads"],
)
def test_what_a_decision_depends_on_makes_a_new_one(offer, model, change):
    fast = variant("fast")
    offer(fast)
    threads = torch.get_num_threads()
    try:
        select(model, X, time_budget_s=1)
        change(model)
        assert not select(model, X, time_budget_s=1).decision.is_remembered
    finally:
        torch.set_num_threads(threads)


def test_another_shape_precision_or_bound_makes_a_new_decision(offer, model):
    offer(variant("fast"))
    select(model, X, time_budget_s=1)
    for samples, options in ((torch.ones(3, 4), {}), (X, {"precision": "fp32"}), (X, {"tolerance": 0.5})):
        assert not select(model, samples, time_budget_s=1, **options).decision.is_remembered


def test_a_corrupted_entry_is_measured_again_and_replaced(offer, model, folder):
    offer(variant("fast"))
    select(model, X, time_budget_s=1)
    (path,) = folder.iterdir()
    path.write_text("{")
    with pytest.warns(UserWarning, match="measured again"):
        assert not select(model, X, time_budget_s=1).decision.is_remembered
    assert select(model, X, time_budget_s=1).decision.is_remembered


def test_a_winner_that_no_longer_runs_is_measured_again(offer, model):
    offer(variant("fast"))
    select(model, X, time_budget_s=1)
    offer(variant("fast", scale=2.0), variant("other"))
    with pytest.warns(UserWarning, match="no longer runs"):
        chosen = select(model, X, time_budget_s=1)
    assert torch.equal(chosen.model(X), model.head(X))


def test_a_cache_that_cannot_be_written_costs_a_warning(offer, model, tmp_path, monkeypatch):
    offer(variant("fast"))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not remembered"):
        assert torch.equal(select(model, X, time_budget_s=1).model(X), model.head(X))


def test_two_processes_decide_at_once(tmp_path):
    code = """
import torch
from deepseek.compiler.runtimes.selection import select
torch.manual_seed(0)
chosen = select(torch.nn.Linear(4, 2).eval(), torch.ones(1, 4), backend="eager", precision="fp32", time_budget_s=1)
print(chosen.decision.chosen)
"""
    environment = os.environ | {"DEEPSEEK_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [each.communicate(timeout=120)[0].strip() for each in both] == ["eager plain fp32"] * 2
    assert len(list((tmp_path / "decisions").iterdir())) == 1


# ---- numbers


def test_errors_are_those_of_the_formulas():
    rng = np.random.default_rng(0)
    reference, answer = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    numbers = compare([torch.tensor(reference)], [torch.tensor(answer)], LOOSE)
    assert numbers.relative_error == pytest.approx(np.linalg.norm(answer - reference) / np.linalg.norm(reference))
    cosine = (answer * reference).sum() / np.linalg.norm(answer) / np.linalg.norm(reference)
    assert numbers.cosine == pytest.approx(cosine)
    assert numbers.raw_agreement == pytest.approx((answer.argmax(1) == reference.argmax(1)).mean())


def test_the_worst_output_counts():
    good, bad = torch.ones(2, 3), torch.ones(2, 3) * 2
    numbers = compare([good, good], [good, bad], LOOSE)
    assert numbers.relative_error == pytest.approx(1.0)


def test_rows_that_an_allowed_error_can_flip_do_not_count():
    reference = torch.tensor([[1.0, 0.999, -1.0], [1.0, -1.0, 0.0]])
    flipped = torch.tensor([[0.999, 1.0, -1.0], [1.0, -1.0, 0.0]])
    numbers = compare([reference], [flipped], Tolerance(0.1, 0.9, 1.0))
    assert (numbers.agreement, numbers.raw_agreement) == (1.0, 0.5)
    wrong = torch.tensor([[1.0, 0.999, -1.0], [-1.0, 1.0, 0.0]])
    assert compare([reference], [wrong], Tolerance(0.1, 0.9, 1.0)).agreement == 0.0


def test_zeros_agree_with_zeros_only():
    zeros = torch.zeros(2, 3)
    assert compare([zeros], [zeros], LOOSE).relative_error == 0
    assert compare([zeros], [zeros + 1], LOOSE).relative_error == math.inf


# ---- the real ones


@pytest.mark.skipif(not BACKENDS["openvino"].is_available(), reason="openvino is not installed")
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_avx512), "int8"])
def test_openvino_by_name_answers_within_the_bound(precision):
    pictures = small_resnet()
    chosen = select(pictures.model, pictures.samples, backend="openvino", precision=precision, time_budget_s=5)
    assert chosen.decision.chosen.backend == "openvino"
    assert chosen.decision.winner.numbers.cosine > 0.99


def test_auto_finds_something_at_least_as_fast_as_eager():
    mlp = small_mlp(batch_size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = select(mlp.model, mlp.samples, time_budget_s=3)
    plain = next((each for each in chosen.decision.measurements if str(each.candidate) == "eager plain fp32"), None)
    assert plain is not None and chosen.decision.winner.median_ms <= plain.median_ms * 1.02
    error = (chosen.model(mlp.samples) - mlp.model(mlp.samples)).norm() / mlp.model(mlp.samples).norm()
    assert error.detach() < 0.25


def test_answers_to_what_int8_is_calibrated_on_count_as_well(monkeypatch):
    model = nn.Linear(4, 2).eval()
    job = Job(flatten_model(model, torch.zeros(2, 4)), calibration=[(torch.ones(2, 4),), (-torch.ones(2, 4),)])
    loud = Built(lambda x: [model(x) * (2 if x.any() else 1)])  # right for the samples, twice too large for the rest
    tolerance = Tolerance(0.1, 0.9, 0.0)
    numbers = check_numbers(job, loud, tolerance)
    assert numbers.relative_error == pytest.approx(2 / 3) and judge_numbers(numbers, tolerance) is not None
    monkeypatch.setattr(accuracy, "CHECK_S", -1.0)
    assert check_numbers(job, loud, tolerance).relative_error == 0


def test_one_row_alone_does_not_refuse_what_is_right_in_the_mean_unless_it_is_far_off():
    model = nn.Linear(4, 2).eval()
    rest = [(torch.full((1, 4), float(index)),) for index in range(1, 10)]
    job = Job(flatten_model(model, torch.zeros(1, 4)), calibration=rest)
    tolerance = Tolerance(0.1, 0.9, 0.0)
    for error, is_refused in ((0.2, False), (0.5, True)):
        built = Built(lambda x, error=error: [model(x) * (1 if x.any() else 1 + error)])
        numbers = check_numbers(job, built, tolerance)
        assert (judge_numbers(numbers, tolerance) is not None) == is_refused


def test_a_precision_that_is_excluded_is_not_tried_and_says_why_unless_it_is_asked_for():
    model, samples = nn.Linear(64, 64).eval(), torch.randn(4, 64)
    excluded = {"int8": "it is not wanted", "bf16": "nor this", "fp16": "nor that"}
    found = select(model, samples, backend="eager", excluded=excluded, remember=False)
    assert {each.candidate.precision for each in found.decision.measurements} == {"fp32"}
    assert ("all of int8", "it is not wanted") in [(each.candidate, each.reason) for each in found.decision.rejections]
    asked = select(model, samples, backend="eager", precision="bf16", excluded=excluded, remember=False)
    assert asked.decision.chosen.precision == "bf16"


def test_where_one_eager_call_takes_much_of_the_budget_what_may_be_faster_goes_first(offer, model):
    offer(variant("fast"), variant("slow", sleep_s=0.01))
    began = []
    chosen = select(model, X, time_budget_s=0.05, remember=False, on_event=lambda event: began.append(event.candidate))
    assert began[0] == "openvino fast fp32" and str(chosen.decision.chosen) == "openvino fast fp32"
    assert chosen.decision.baseline_ms >= 3  # of the call that made the reference
    began.clear()
    select(model, X, time_budget_s=5, remember=False, on_event=lambda event: began.append(event.candidate))
    assert began[0] == "eager plain fp32"


def test_a_slow_call_is_timed_once_before_the_final(offer, model, monkeypatch):
    monkeypatch.setattr(selection.Search, "_run_final", lambda self: iter(()))
    monkeypatch.setattr(selection.Search, "_time_baseline", lambda self: self.baseline_ms.append(3.0))
    slow = variant("slow", sleep_s=0.1)
    offer(slow)
    chosen = select(model, X, backend="openvino", time_budget_s=1.0, remember=False)
    (measured,) = chosen.decision.measurements
    assert len(measured.times_ms) == 1 and measured.median_ms >= 100


def test_what_was_let_go_never_comes_back_when_the_fastest_turns_slow():
    fast, slow = Candidate("openvino", "fast", "fp32"), Candidate("openvino", "slow", "fp32")
    search = object.__new__(selection.Search)
    search.times_ms, search.let_go = {fast: [1.0], slow: [5.0]}, set()
    search.built = {candidate: Built(lambda *inputs: inputs) for candidate in (fast, slow)}
    search._let_go_of_the_slow()
    search.times_ms[fast] += [9.0, 9.0]
    assert search.medians_ms == {fast: 9.0, slow: 5.0}
    assert search._find_best() == fast and search.kept_ms == {fast: 9.0}
