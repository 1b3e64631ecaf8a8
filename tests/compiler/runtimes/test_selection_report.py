"""A decision in words and rows, against numbers worked out by hand."""

import dataclasses

from deepseek.compiler.runtimes.selection_policy import Candidate, Decision, Measurement, Numbers, Rejection
from deepseek.compiler.runtimes.selection_report import (
    COLUMNS,
    describe_key,
    explain,
    list_notes,
    list_refusals,
    list_rows,
    list_untried,
    summarize,
)

EAGER = Candidate("eager", "plain", "fp32")
FROZEN = Candidate("inductor", "freezing", "bf16")
FOLDED = Candidate("openvino", "latency", "fp32")
DECISION = Decision(
    chosen=FOLDED,  # within the noise of the fastest, and exact
    baseline_ms=8.0,
    measurements=(
        Measurement(EAGER, Numbers(0.0, 1.0, 1.0, 1.0), (9.0, 8.0, 7.0), 0.1),
        Measurement(FROZEN, Numbers(0.0125, 0.99985, 1.0, 0.875), (2.0, 1.0, 3.0), 2.0, findings=("fell back",)),
        Measurement(FOLDED, Numbers(2e-7, 1.0, None), (2.01,), 1.0, notes=("first", "second")),
    ),
    rejections=(Rejection("tvm", "not installed"), Rejection("openvino latency int8", "relative error 0.3")),
    spent_s=12.4,
)


def test_the_sentence_names_the_winner_its_speed_and_the_search():
    assert summarize(DECISION) == (
        "openvino latency fp32: 2.01 ms a call, 3.98 times eager FP32 (8 ms); measured in 12 s, 3 candidates ran,"
        " 2 were refused"
    )
    remembered = summarize(dataclasses.replace(DECISION, is_remembered=True, reference="the file"))
    assert "3.98 times the file (8 ms); remembered, 3" in remembered


def test_the_winner_is_the_first_row_and_the_others_follow_by_their_median():
    assert list_rows(DECISION) == [
        ("openvino latency fp32", "2.01", "3.98", "2e-07", "1.00000", ""),
        ("inductor freezing bf16", "2", "4.00", "0.013", "0.99985", "0.88"),
        ("eager plain fp32", "8", "1.00", "0", "1.00000", "1.00"),
    ]


def test_notes_and_refusals_have_a_row_each():
    assert list_notes(DECISION) == [
        ("inductor freezing bf16", "fell back"),
        ("openvino latency fp32", "first"),
        ("openvino latency fp32", "second"),
    ]
    assert list_refusals(DECISION) == [
        ("tvm", "not installed"),
        ("openvino latency int8", "relative error 0.3"),
    ]


def test_the_text_has_every_row_in_columns_that_align():
    lines = explain(DECISION).splitlines()
    assert lines[0] == summarize(DECISION)
    table = lines[2:6]
    starts = [table[0].index(name) for name in COLUMNS]
    for line, row in zip(table[1:], list_rows(DECISION), strict=True):
        ends = [*starts[1:], None]
        assert [line[start:end].strip() for start, end in zip(starts, ends, strict=True)] == list(row)
    assert "inductor freezing bf16: fell back" in lines
    assert lines[-2:] == ["refused: tvm: not installed", "refused: openvino latency int8: relative error 0.3"]


def test_a_decision_without_refusals_ends_with_what_it_has():
    alone = dataclasses.replace(DECISION, chosen=EAGER, measurements=DECISION.measurements[:1], rejections=())
    assert explain(alone).splitlines()[-1].startswith("eager plain fp32")


def test_a_key_is_described_by_inputs_precision_threads_and_processor():
    key = {
        "inputs": [([2, 3], "float32"), ([2], "int64")],
        "precisions": ("fp32", "bf16"),
        "num_threads": 2,
        "machine": {"processor": "a processor"},
    }
    assert describe_key(key) == "float32[2, 3], int64[2]; fp32 or bf16; 2 threads of a processor"


def test_what_was_not_tried_is_not_called_refused():
    late = Rejection("inductor tuned fp32", "not tried: the time budget of 10 s was used up")
    decision = dataclasses.replace(DECISION, rejections=(*DECISION.rejections, late))
    assert summarize(decision).endswith("3 candidates ran, 2 were refused, 1 not tried")
    assert list_refusals(decision) == list_refusals(DECISION)
    assert list_untried(decision) == [("inductor tuned fp32", "the time budget of 10 s was used up")]
    assert explain(decision).splitlines()[-1] == "not tried: inductor tuned fp32: the time budget of 10 s was used up"
