"""Inductor: the settings of the process stay as they were, and fallbacks of int8 are found."""

from __future__ import annotations

import shutil

import torch
from torch import nn

from deepseek.compiler.runtimes.backends import BACKENDS
from deepseek.compiler.runtimes.backends import inductor as inductor_backend
from deepseek.compiler.runtimes.backends.interface import Variant, build
from tests.compiler.runtimes.backends.offered import BOUNDS, relative_error


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in str(BACKENDS["inductor"].find_missing())


def test_inductor_leaves_its_settings_as_they_were(job):
    import torch._inductor.config as settings

    before = settings.save_config_portable()
    build(BACKENDS["inductor"].find_variant("int8", "static"), job)
    assert settings.save_config_portable() == before
    assert settings.pre_grad_custom_pass is None


def test_a_reset_of_dynamo_changes_nothing(job, pictures):
    built = build(BACKENDS["inductor"].find_variant("int8", "static"), job)
    before = built.run(pictures.samples)[0].clone()
    torch._dynamo.reset()
    assert torch.equal(built.run(pictures.samples)[0], before)


def test_without_freezing_the_int8_fallback_is_found(job, pictures):
    """Inductor without freezing computes int8 graphs in FP32, silently; the counters say so."""
    variant = Variant("unfrozen", "int8", "", inductor_backend.compile_static_int8({}, glue=torch.float32))
    built = build(variant, job)
    assert relative_error(built.run(pictures.samples)[0], pictures.model(pictures.samples).detach()) < BOUNDS["int8"]
    assert [each.is_serious for each in built.findings] == [True]


def test_activations_are_inlined_and_what_has_weights_stays():
    relu, linear = nn.ReLU(), nn.Linear(2, 2)
    model = inductor_backend.inline_activations_(nn.Sequential(relu, linear, nn.Sequential(relu, nn.PReLU())))
    assert [type(each).__name__ for each in (model[0], model[2][0])] == ["Inlined", "Inlined"]
    assert model[1] is linear and isinstance(model[2][1], nn.PReLU)
    assert model[0](torch.tensor([-1.0, 1.0])).tolist() == [0.0, 1.0]
