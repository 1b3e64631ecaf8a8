"""ONNX's own tests of its operators: a model of one node, inputs, and the outputs that numpy gave."""

import warnings
from collections import Counter, defaultdict

import numpy
import onnx
import pytest
import torch
from onnx import numpy_helper

from deepseek.core.errors import ConfigError
from deepseek.onnx.files import MAX_OPSET, MIN_OPSET
from deepseek.onnx.importing import import_onnx
from deepseek.onnx.operators import OPERATORS

NODE_TOLERANCE = {"rtol": 1e-3, "atol": 1e-5, "equal_nan": True}
# Answers of half precision differ in the last bit between libraries.
HALF_TOLERANCE = {"rtol": 2e-3, "atol": 2e-3, "equal_nan": True}
TORCH_TYPES = {numpy.dtype(name) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")}


def collect_cases():
    """Operator -> the cases that test it, at an opset that is read here and means the same."""
    with warnings.catch_warnings(), numpy.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    found = defaultdict(list)
    for case in cases:
        operators = {node.op_type for node in case.model.graph.node}
        arrays = [each for values in case.data_sets[0] for each in values]
        has_twins = all(isinstance(each, numpy.ndarray) and each.dtype in TORCH_TYPES for each in arrays)
        if has_twins and move_to_known_opset(case.model):
            found[operators.pop() if len(operators) == 1 else "several"].append(case)
    return found


def move_to_known_opset(model):
    """Rewrite the opset of `model` to one that is read here; False where an operator means something else there."""
    entry = next((each for each in model.opset_import if each.domain == ""), None)
    if entry is None:
        return False
    target = min(max(entry.version, MIN_OPSET), MAX_OPSET)
    for node in model.graph.node:
        if node.domain or not onnx.defs.has(node.op_type):
            return False
        try:
            versions = {onnx.defs.get_schema(node.op_type, each).since_version for each in (target, entry.version)}
        except onnx.defs.SchemaError:
            return False
        if len(versions) > 1:
            return False
    entry.version = target
    return not model.functions


def bake(model, inputs, *, with_reals):
    """Small inputs after the first become constants, as they are in any exported model: shapes, axes, bounds."""
    baked = onnx.ModelProto()
    baked.CopyFrom(model)
    del baked.graph.input[:]
    kept = []
    for place, (value, array) in enumerate(zip(model.graph.input, inputs, strict=True)):
        kinds = "iubf" if with_reals else "iub"
        if place and array.ndim < 2 and array.dtype.kind in kinds:
            baked.graph.initializer.append(numpy_helper.from_array(array, value.name))
        else:
            baked.graph.input.append(value)
            kept.append(array)
    return baked, kept


def run_case(case):
    """The answer to a case, or the refusal; inputs become constants only where they must be."""
    inputs, expected = case.data_sets[0]
    ways = [(case.model, inputs), *(bake(case.model, inputs, with_reals=each) for each in (False, True))]
    refusal = None
    for model, arrays in ways:
        tensors = [torch.from_numpy(numpy.array(each)) for each in arrays]
        try:
            answer = import_onnx(model, sample_inputs=tensors)(*tensors)
        except ConfigError as error:
            refusal = error
            continue
        compare(answer if isinstance(answer, tuple) else (answer,), expected)
        return None
    return refusal


def compare(answers, expected):
    for ours, theirs in zip(answers, expected, strict=True):
        tolerance = HALF_TOLERANCE if theirs.dtype == numpy.float16 else NODE_TOLERANCE
        torch.testing.assert_close(ours, torch.from_numpy(numpy.array(theirs)), **tolerance)


@pytest.fixture(scope="module")
def official_cases():
    return collect_cases()


@pytest.mark.parametrize("name", [*sorted(OPERATORS), "several"])
def test_every_official_example_of_an_operator_is_right_or_refused(name, official_cases):
    refused = [str(refusal) for refusal in map(run_case, official_cases[name]) if refusal is not None]
    assert all("cannot be converted to PyTorch" in each for each in refused), refused
    if official_cases[name] and name != "several":
        assert len(refused) < len(official_cases[name]), refused


def test_few_official_examples_of_known_operators_are_refused(official_cases):
    counts = Counter(run_case(case) is None for name in OPERATORS for case in official_cases[name])
    assert counts[True] >= 560 and counts[False] <= 60, counts


def test_what_onnx_defines_by_other_operators_is_written_out(official_cases):
    """Attention and rotary embedding are in no row of the table and still run."""
    for name in ("Attention", "RotaryEmbedding", "MeanVarianceNormalization"):
        assert name not in OPERATORS
        counts = Counter(run_case(case) is None for case in official_cases[name])
        assert counts[True] > counts[False], (name, counts)
