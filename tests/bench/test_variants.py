import pytest

from deepseek.bench.variants import DOCUMENTED, Subject, subjects_of_generations, subjects_of_pairs
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
