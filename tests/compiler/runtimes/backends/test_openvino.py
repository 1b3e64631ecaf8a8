"""OpenVINO: streams, whole operators, hints that it ignored, and that it reports nothing of its use."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from deepseek.compiler.runtimes.backends import BACKENDS, BackendError
from deepseek.compiler.runtimes.backends import openvino as openvino_backend
from deepseek.compiler.runtimes.backends.flat_signature import flatten_model
from deepseek.compiler.runtimes.backends.interface import Job, build
from tests.compiler.runtimes.backends.offered import HERE


def test_a_missing_library_is_an_instruction(monkeypatch):
    monkeypatch.setattr(openvino_backend, "has_library", lambda name: False)
    with pytest.raises(BackendError, match=r"pip install 'deepseek-engine\[compile\]'"):
        BACKENDS["openvino"].compile(nn.Linear(2, 2).eval(), torch.ones(1, 2))


def test_streams_answer_each_row_in_its_place(pictures, job):
    built = build(BACKENDS["openvino"].find_variant("fp32", "streams"), job)
    (answer,) = built.run(pictures.samples)
    assert torch.allclose(answer, pictures.model(pictures.samples), atol=1e-5)
    assert "4 parts of 1 rows" in " ".join(built.notes)


def test_a_batch_that_has_no_equal_parts_is_refused():
    flattened = flatten_model(nn.Linear(3, 2).eval(), torch.randn(7, 3))
    assert len(openvino_backend.split_batch(Job(flattened), 8)) == 7
    with pytest.raises(BackendError, match="no 2 or fewer equal parts"):
        openvino_backend.split_batch(Job(flattened), 2)


def test_openvino_reports_nothing_and_leaves_no_trace():
    with openvino_backend.without_telemetry(), pytest.raises(ImportError):
        import openvino_telemetry  # noqa: F401
    assert sys.modules.get("openvino_telemetry", "absent") == "absent"


class Attending(nn.Module):
    """Causal attention of a batch with itself."""

    def forward(self, x_BNTH):
        return nn.functional.scaled_dot_product_attention(x_BNTH, x_BNTH, x_BNTH, is_causal=True)


@pytest.mark.skipif("openvino" not in HERE, reason="OpenVINO is not installed")
def test_openvino_gets_attention_whole_and_in_parts_where_that_fails(monkeypatch):
    samples = torch.randn(2, 2, 8, 4)
    whole = Job(flatten_model(Attending().eval(), samples))
    model, notes = openvino_backend.convert(whole)
    names = {each.get_type_name() for each in model.get_ops()}
    assert notes == ()
    assert "ScaledDotProductAttention" in names

    real, programs = openvino_backend._convert_program, []

    def fail_once(library, program):
        programs.append(program)
        if len(programs) == 1:
            raise RuntimeError("no such operator")
        return real(library, program)

    monkeypatch.setattr(openvino_backend, "_convert_program", fail_once)
    parts = Job(flatten_model(Attending().eval(), samples))
    model, _ = parts.once("openvino", lambda: openvino_backend.convert(parts))
    names = {each.get_type_name() for each in model.get_ops()}
    assert "ScaledDotProductAttention" not in names and "MatMul" in names
    for each, said in ((whole, ""), (parts, "no such operator")):
        built = build(BACKENDS["openvino"].find_variant("fp32", "latency"), each)
        (answer,) = built.run(samples)
        torch.testing.assert_close(answer, Attending()(samples))
        assert said in " ".join(built.notes) and bool(said) == bool(built.notes)


def test_openvino_that_ignored_a_hint_is_found(job):
    library = openvino_backend.require_openvino()
    model, _ = job.once("openvino", lambda: openvino_backend.convert(job))
    compiled = library.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    findings = openvino_backend._judge(compiled, "bf16")
    assert [each.is_serious for each in findings] == [True]
