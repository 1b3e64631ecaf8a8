from dataclasses import replace

import pytest

from deepseek.bench.baselines import Row
from deepseek.bench.variants import DOCUMENTED, Subject, explain_slower, subjects_of_generations, subjects_of_pairs
from deepseek.core.errors import ConfigError

EVERYTHING = {"fp32", "tf32", "fp16", "bf16", "int8", "int4", "dynamic"}


def test_a_generation_runs_with_the_arithmetic_and_the_compilation_of_its_profile():
    old, quantized, cloud = subjects_of_generations(["v1.2", "v2.3", "v4.2"], EVERYTHING)
    assert (old.backend, old.precision) == ("eager", "fp32")
    assert (quantized.backend, quantized.precision) == ("inductor", "int8")
    assert (cloud.backend, cloud.precision) == ("inductor", "fp16")
    assert not any(each.note for each in (old, quantized, cloud))


def test_what_the_device_lacks_runs_as_the_nearest_it_has_and_says_so():
    (subject,) = subjects_of_generations(["v4.2"], {"fp32", "int8"})
    assert subject.precision == "fp32"
    assert subject.note == "fp16 of that generation runs as fp32 here"


def test_the_newest_documented_generation_chooses_by_measurement():
    assert subjects_of_generations(DOCUMENTED, EVERYTHING)[-1].backend == "auto"


def test_an_unknown_generation_is_an_error_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"v9\.9"):
        subjects_of_generations(["v9.9"], EVERYTHING)


def test_pairs_are_all_combinations():
    pairs = subjects_of_pairs(["eager", "openvino"], ["fp32", "int8"])
    assert pairs[1] == Subject("eager int8", "eager", "int8")
    assert {(each.backend, each.precision) for each in pairs} == {
        (backend, precision) for backend in ("eager", "openvino") for precision in ("fp32", "int8")
    }


REPORT = """openvino latency bf16: 12 ms a call, 2.00 times eager FP32 (24 ms); measured in 30 s, 3 candidates ran

candidate                  ms    speed-up  error  cosine   top-1
openvino latency bf16      12    2.00      0.01   0.99990  1.00
inductor static fp32       13.5  1.78      0      1.00000  1.00

openvino latency bf16: calibrated on nothing

refused: inductor static int8: its answers differ in 4 % of the rows
refused: inductor dynamic int8: most of the model is convolutions
refused: tvm fp16: its schedules for a CPU know no fp16 matmuls
"""


def row(name: str, backend: str, precision: str, latency_ms: float | None) -> Row:
    return Row(name, backend, precision, 1, latency_ms)


@pytest.mark.parametrize(
    ("faster", "said"),
    [
        (
            row("v2.3", "inductor", "int8", 8.0),
            "inductor static int8 was refused: its answers differ in 4 %",
        ),
        (row("v1.2", "inductor", "fp32", 8.0), "measured as well, and lost (13.5 ms) when the choice was made"),
        (row("v1.2", "openvino", "bf16", 8.0), "measured as well, and lost (12 ms) when the choice was made"),
        (row("v2.3", "openvino", "int8", 8.0), "give --data"),
        (row("v4.2", "tvm", "fp32", 8.0), "not among what was tried"),
    ],
)
def test_the_newest_generation_is_never_slower_without_a_reason(faster: Row, said: str) -> None:
    why = explain_slower(row("v5.0", "auto", "auto", 12.0), [row("v3.1", "eager", "fp32", 20.0), faster], REPORT)
    assert why.startswith(f"1.50 times as slow as {faster.name}, which is {faster.backend} {faster.precision}: ")
    assert said in why


def test_a_row_that_is_the_fastest_or_made_no_choice_has_nothing_to_excuse() -> None:
    slower, refused = row("v2.3", "inductor", "int8", 13.0), row("v3.1", "inductor", "bf16", None)
    assert explain_slower(row("v5.0", "auto", "auto", 12.0), [slower, refused], REPORT) == ""
    assert explain_slower(row("v5.0", "auto", "auto", 12.0), [], REPORT) == ""
    assert explain_slower(slower, [row("v5.0", "auto", "auto", 12.0)], REPORT) == ""
    assert explain_slower(replace(slower, backend="auto", latency_ms=None), [slower], REPORT) == ""
