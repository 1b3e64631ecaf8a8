"""ONNX's own tests of its operators: a model of one node or of few, inputs, and the outputs that numpy gave.

Every one of them is right or refused with a reason, and the refused ones are those of `refused_examples.txt`; to write
that list anew, run `python -m tests.onnx.operators.test_official_examples`. Two contradict the text of the definition
(`AGAINST_THE_TEXT`); of these the text's answer is expected, which is ONNX Runtime's.
"""

import warnings
from functools import cache
from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from deepseek.core.errors import ConfigError
from deepseek.onnx.files import MIN_OPSET, to_torch
from deepseek.onnx.importing import import_onnx
from deepseek.onnx.operators import OPERATORS

TOLERANCE = {"rtol": 1e-3, "atol": 1e-5, "equal_nan": True}
# Answers of half precision differ in the last bits between libraries.
NARROW = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
REFUSED = Path(__file__).with_name("refused_examples.txt")
NUM_PARTS = 8  # so that several workers share them
# Operators whose answer is random: nothing to compare with.
RANDOM = {"Bernoulli", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial"}

# They divide by a length that is no whole number, where the text has that of the result; see deepseek/onnx/resizing.py.
AGAINST_THE_TEXT = {
    "test_resize_downsample_scales_cubic_align_corners",
    "test_resize_downsample_scales_linear_align_corners",
}


@cache
def collect_cases():
    """The cases that say what is right, at an opset that is read here."""
    with warnings.catch_warnings(), numpy.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    cases = [case for case in cases if not RANDOM & {node.op_type for node in case.model.graph.node}]
    for case in cases:
        raise_opset(case.model)
    return sorted(cases, key=lambda case: case.name)


def raise_opset(model):
    """Take a model of an opset that is too old to be read to the first that is, where its operators stay the same."""
    entry = next((opset for opset in model.opset_import if opset.domain == "" and opset.version < MIN_OPSET), None)
    known = [node for node in model.graph.node if entry and onnx.defs.has(node.op_type)]
    versions = [
        {onnx.defs.get_schema(node.op_type, opset).since_version for opset in (MIN_OPSET, entry.version)}
        for node in known
    ]
    if entry and all(len(pair) == 1 for pair in versions):
        entry.version = MIN_OPSET


def bake(model, tensors, *, with_reals):
    """Small inputs become constants, as they are in any exported model: shapes, axes, bounds; reals where asked for."""
    baked = onnx.ModelProto()
    baked.CopyFrom(model)
    del baked.graph.input[:]
    kept = []
    for index, (value, tensor) in enumerate(zip(model.graph.input, tensors, strict=True)):
        is_baked = with_reals or not tensor.is_floating_point()
        if (index or with_reals) and tensor.dim() < 2 and is_baked and tensor.dtype is not torch.bfloat16:
            baked.graph.initializer.append(numpy_helper.from_array(tensor.numpy(), value.name))
        else:
            baked.graph.input.append(value)
            kept.append(tensor)
    return baked, kept


def find_refusal(case):
    """The reason of a refusal, or `None` where the answer is right; inputs become constants where they must."""
    inputs, expected = case.data_sets[0]
    if case.name in AGAINST_THE_TEXT:
        expected = onnxruntime.InferenceSession(case.model.SerializeToString()).run(
            None, {value.name: array for value, array in zip(case.model.graph.input, inputs, strict=True)}
        )
    try:
        tensors, answers = [[read_value(value) for value in values] for values in (inputs, expected)]
    except ConfigError as error:
        return shorten(error)
    for with_reals in (None, False, True):
        model, kept = (case.model, tensors) if with_reals is None else bake(case.model, tensors, with_reals=with_reals)
        try:
            converted = import_onnx(model, sample_inputs=kept)
        except ConfigError as error:
            refusal = shorten(error)
            continue
        answer = converted(*kept)
        compare(answer if isinstance(answer, tuple) else (answer,), answers)
        return None
    return refusal


def read_value(value):
    """A tensor of whatever a case holds: arrays, numbers, tensors of types that numpy does not have."""
    if isinstance(value, onnx.TensorProto):
        return to_torch(value)
    if isinstance(value, numpy.ndarray | numpy.generic):
        return to_torch(numpy_helper.from_array(numpy.asarray(value)))
    raise ConfigError("a sequence or an optional value is no tensor")


def shorten(error):
    """The reason alone, on one line."""
    return " ".join(
        str(error).rpartition("PyTorch: ")[2].partition("; run the file")[0].partition("; export")[0].split()
    )


def compare(answers, expected):
    assert len(answers) >= len(expected)
    for ours, theirs in zip(answers, expected, strict=False):
        assert ours.dtype is theirs.dtype
        atol = NARROW.get(theirs.dtype)
        torch.testing.assert_close(
            ours, theirs, **(TOLERANCE if atol is None else {**TOLERANCE, "rtol": atol, "atol": atol})
        )


def read_refused():
    rows = (line.partition(": ") for line in REFUSED.read_text(encoding="utf-8").splitlines())
    return {name: reason for name, _, reason in rows}


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_official_example_is_right_or_refused_for_the_reason_in_the_list(part):
    found = {case.name: find_refusal(case) for case in collect_cases()[part::NUM_PARTS]}
    refused = {name: reason for name, reason in found.items() if reason is not None}
    assert refused == {name: reason for name, reason in read_refused().items() if name in found}


def test_of_each_operator_in_the_table_some_official_example_is_right():
    refused, right, tested = read_refused(), set(), set()
    for case in collect_cases():
        names = {node.op_type for node in case.model.graph.node}
        if len(names) == 1:
            tested |= names
            right |= names if case.name not in refused else set()
    assert set(OPERATORS) & tested <= right


def test_most_official_examples_are_right():
    names = {case.name for case in collect_cases()}
    refused = set(read_refused())
    assert refused <= names  # nothing is listed that is no example any more
    assert len(refused) <= len(names) / 3


if __name__ == "__main__":
    rows = ((case.name, find_refusal(case)) for case in collect_cases())
    REFUSED.write_text("".join(f"{name}: {reason}\n" for name, reason in rows if reason is not None), encoding="utf-8")
