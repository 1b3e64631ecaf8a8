"""Every backend against FP32 eager, and against its own promise: the precision it says is the one it runs in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deepseek.compiler.runtimes.backends import BACKENDS
from deepseek.compiler.runtimes.backends.interface import build
from deepseek.compiler.runtimes.selection_policy import PRECISIONS, BackendSelector
from deepseek.core.errors import ConfigError
from tests.compiler.models import Tagger, small_mlp
from tests.compiler.runtimes.backends.offered import BOUNDS, HERE, relative_error, tagger_inputs, threads
from tests.processors import HAS_AVX512, NO_AVX512

ON_PICTURES = [
    (name, variant.name, variant.precision)
    for name in HERE
    for variant in BACKENDS[name].variants
    if "cpp" not in variant.name and "tuned" not in variant.name and variant.name not in ("dynamic", "session")
]


def test_every_selector_but_auto_has_a_backend_of_its_name():
    assert set(BACKENDS) == {str(each) for each in BackendSelector} - {"auto"}
    assert all(backend.name == name for name, backend in BACKENDS.items())


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_describes_itself_and_covers_every_precision_or_says_why_not(name):
    backend = BACKENDS[name]
    described = backend.describe()
    assert described["summary"] and backend.variants
    assert (described["missing"] is None) == backend.is_available()
    covered = {each.precision for each in backend.variants} | set(backend.unsupported)
    assert covered == set(PRECISIONS)
    assert len({(each.name, each.precision) for each in backend.variants}) == len(backend.variants)
    names = {(each.name, each.precision) for each in backend.variants}
    assert all((each.refines, each.precision) in names for each in backend.variants if each.refines)


def test_an_unknown_precision_or_variant_is_answered_with_what_there_is():
    with pytest.raises(ConfigError, match=r"widens fp16"):
        BACKENDS["onnxruntime"].find_variant("fp16")
    with pytest.raises(ConfigError, match=r"it has .*static \(int8\)"):
        BACKENDS["onnxruntime"].find_variant("int8", "nonesuch")


@pytest.mark.parametrize(("name", "variant", "precision"), ON_PICTURES, ids=lambda value: str(value))
def test_a_variant_answers_like_eager_and_is_what_it_says(name, variant, precision, pictures, job):
    if name == "openvino" and precision != "fp32" and not HAS_AVX512:
        pytest.skip(NO_AVX512)
    chosen = BACKENDS[name].find_variant(precision, variant)
    if chosen.find_obstacle(job.traits) is not None:
        pytest.skip(chosen.find_obstacle(job.traits))
    with threads(2 if variant == "streams" else 1):
        built = build(chosen, job)
    assert not any(each.is_serious for each in built.findings)
    reference = pictures.model(pictures.samples).detach()
    (answer,) = built.run(pictures.samples)
    assert answer.dtype == torch.float32
    assert relative_error(answer, reference) < BOUNDS[precision]
    if precision != "fp32":
        assert relative_error(answer, reference) > 0  # the same numbers would mean that nothing was rounded
    kept = answer.clone()
    again = torch.randn_like(pictures.samples)
    (other,) = built.run(again)
    assert relative_error(other, pictures.model(again).detach()) < 2 * BOUNDS[precision]
    assert torch.equal(answer, kept)


@pytest.mark.parametrize("name", [name for name in ("eager", "onnxruntime") if name in HERE])
def test_dynamic_int8_answers_like_eager(name):
    mlp = small_mlp()
    compiled = BACKENDS[name].compile(mlp.model, mlp.samples, "int8", variant="dynamic")
    error = relative_error(compiled(mlp.samples), mlp.model(mlp.samples).detach())
    assert 0 < error < 0.03
    assert not any(each.is_serious for each in compiled.findings)


def test_the_model_is_left_as_it_was(pictures, job):
    before = copy.deepcopy(pictures.model.state_dict())
    build(BACKENDS["eager"].find_variant("bf16", "cast"), job).run(pictures.samples)
    after = pictures.model.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert pictures.model.stem[0].weight.is_contiguous()


@pytest.mark.parametrize("name", HERE)
def test_keywords_flags_and_nested_answers_come_through(name):
    torch.manual_seed(0)
    model = Tagger().eval()
    compiled = BACKENDS[name].compile(model, tagger_inputs(is_scaled=True))
    answer, reference = compiled(**tagger_inputs(is_scaled=True)), model(**tagger_inputs(is_scaled=True))
    assert torch.allclose(answer["scores"], reference["scores"], atol=1e-5)
    assert answer["kind"] == "tags" and torch.equal(answer["hidden"][1], reference["hidden"][1])
    assert answer["hidden"][1].dtype == torch.int64


class Repeating(nn.Module):
    """Large answers: computed, computed and returned twice, and handed through."""

    def forward(self, x):
        y = x * 2
        return y, y, x, x + 1


@pytest.mark.parametrize("name", HERE)
def test_answers_that_are_inputs_or_repeat_are_right_and_their_own(name):
    x = torch.randn(1024, 512)
    compiled = BACKENDS[name].compile(Repeating().eval(), x)
    first = compiled(x)
    second = compiled(-x)
    for sign, answers in ((1, first), (-1, second)):
        for answer, expected in zip(answers, Repeating()(sign * x), strict=True):
            assert torch.equal(answer, expected)


@pytest.mark.parametrize("name", HERE)
def test_a_model_that_computes_nothing_answers_its_input(name):
    x = torch.randn(1024, 512)
    compiled = BACKENDS[name].compile(nn.Identity().eval(), x)
    assert torch.equal(compiled(x), x) and torch.equal(compiled(-x), -x)
