"""What `load_model` returns is used like the module it loaded, whatever people do with modules."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

import deepseek as ds
from deepseek.core.errors import ConfigError
from deepseek.models import zoo
from deepseek.models.loaded_model import LoadedModel, LoadedModule, RunModel, plain_module
from deepseek.models.loading import load_model, save_model

SETTINGS = {"overrides": {"width": 8, "num_classes": 10}, "shapes": {"images": (2, 3, 64, 64)}}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path / "cache"))


def load(config=None):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights
        return load_model("resnet18", SETTINGS | (config or {}))


@pytest.fixture
def loaded():
    return load()


@pytest.fixture(scope="module")
def run_model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return load({"backend": "openvino", "precision": "fp32", "time_budget_s": 1})


# ---- a face of the module


def test_it_is_one_kind_of_thing_with_a_module_and_an_explanation(loaded, run_model):
    for model in (loaded, run_model):
        assert isinstance(model, LoadedModel) and isinstance(model, nn.Module)
        assert isinstance(model.module, zoo.ResNet)
        assert "resnet18, from the zoo, with random weights" in model.explain()
        assert "sample inputs: (2, 3, 64, 64)" in model.explain()
        torch.testing.assert_close(model(IMAGES), model.module(IMAGES), rtol=1e-3, atol=1e-3)


def test_names_of_weights_and_children_are_those_of_the_module(loaded):
    module = loaded.module
    assert list(loaded.state_dict()) == list(module.state_dict())
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert [name for name, _ in loaded.named_modules()] == [name for name, _ in module.named_modules()]
    assert list(loaded.children()) == list(module.children())
    assert loaded.get_submodule("layer1.0") is module.layer1[0]
    assert list(loaded.modules()) == list(module.modules())
    assert loaded.config is module.config


def test_inside_another_module_names_go_on_as_they_would_with_the_module(loaded):
    whole = nn.Sequential(loaded, nn.ReLU())
    plain = nn.Sequential(loaded.module, nn.ReLU())
    assert list(whole.state_dict()) == list(plain.state_dict())
    other = {name: torch.zeros_like(tensor) for name, tensor in plain.state_dict().items()}
    whole.load_state_dict(other)
    assert not any(tensor.any() for tensor in loaded.module.state_dict().values())


def test_the_usual_feature_extractor_of_its_children_computes_what_the_module_does(loaded):
    features = nn.Sequential(*list(loaded.children())[:-1])
    assert features(IMAGES).shape == nn.Sequential(*list(loaded.module.children())[:-1])(IMAGES).shape
    assert not torch.equal(features(IMAGES), IMAGES)


def test_a_layer_that_is_replaced_is_replaced_in_the_module(loaded):
    loaded.fc = nn.Linear(loaded.fc.in_features, 3)
    assert loaded.module.fc is loaded.fc
    assert loaded(IMAGES).shape == loaded.module(IMAGES).shape == (2, 3)
    loaded.note = "mine"
    assert loaded.module.note == "mine"
    del loaded.note
    assert not hasattr(loaded.module, "note")


def test_training_and_evaluation_reach_the_module_and_are_read_from_it(loaded):
    assert loaded.train() is loaded
    assert loaded.training and loaded.module.training and loaded.module.bn1.training
    loaded.module.eval()
    assert not loaded.training
    nn.Sequential(loaded).train()
    assert loaded.module.training


def test_a_step_of_training_moves_the_weights_that_the_module_has(loaded):
    alone = copy.deepcopy(loaded.module)
    for model in (loaded, alone):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()(IMAGES).square().mean().backward()
        optimizer.step()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(loaded.module.state_dict()[name], tensor, msg=name)


def test_hooks_work_from_either_side(loaded):
    seen = []
    for model in (loaded, loaded.module):
        model.register_forward_hook(lambda *_: seen.append(1))
    loaded(IMAGES)
    loaded.module(IMAGES)
    assert len(seen) == 4


def test_casting_and_moving_reach_the_module(loaded):
    assert loaded.double() is loaded
    assert {each.dtype for each in loaded.module.parameters()} == {torch.float64}
    assert loaded(IMAGES.double()).dtype is torch.float64
    loaded.to("meta")
    assert all(each.is_meta for each in loaded.module.parameters())


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(loaded, make):
    other = make(loaded)
    assert isinstance(other, LoadedModule) and other.explain() == loaded.explain()
    expected = loaded(IMAGES)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(IMAGES), expected)
    other.fc = nn.Linear(other.fc.in_features, 4)
    assert other(IMAGES).shape == (2, 4) and loaded(IMAGES).shape == (2, 10)


def test_other_tools_of_torch_take_it(loaded):
    expected = loaded(IMAGES)
    compiled = torch.compile(loaded, backend="eager", fullgraph=True)
    exported = torch.export.export(loaded, (IMAGES,), strict=False)
    averaged = torch.optim.swa_utils.AveragedModel(loaded)
    for model in (compiled, exported.module(), averaged):
        torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-4)
    assert set(exported.state_dict) == set(loaded.module.state_dict())


def test_our_own_tools_take_it(loaded, tmp_path):
    expected = loaded(IMAGES)
    save_model(loaded, tmp_path / "model")
    torch.testing.assert_close(load_model(tmp_path / "model")(IMAGES), expected)
    jitted = ds.jit(loaded, backend="eager")
    torch.testing.assert_close(jitted(IMAGES), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(loaded, zoo.ResNet) and inspect.unwrap(loaded) is loaded.module
    assert inspect.signature(loaded.forward) == inspect.signature(loaded.module.forward)


def test_a_name_that_it_does_not_have_is_missed_in_the_name_of_the_module(loaded):
    with pytest.raises(AttributeError, match="'ResNet' object has no attribute 'layer9'"):
        _ = loaded.layer9


# ---- run by a backend


def test_a_change_of_the_module_never_shows_in_the_answers_of_a_backend():
    model = load({"backend": "openvino", "precision": "fp32", "time_budget_s": 1})
    before = model(IMAGES)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.5)
    torch.testing.assert_close(model(IMAGES), before, rtol=0, atol=0)
    assert not torch.allclose(model.module(IMAGES), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.half(),
        lambda model: model.to("meta"),
        lambda model: model.load_state_dict(model.module.state_dict()),
    ],
)
def test_what_would_change_the_weights_of_a_backend_is_refused_with_the_way_out(run_model, change):
    with pytest.raises(ConfigError, match=r"run by openvino .* use \.module"):
        change(run_model)
    assert run_model.eval() is run_model


def test_a_layer_of_a_model_that_a_backend_runs_is_reached_through_its_module_only(run_model):
    assert isinstance(run_model, RunModel)
    with pytest.raises(AttributeError, match=r"use \.module\.fc"):
        _ = run_model.fc
    assert list(run_model.state_dict()) == []


def test_the_plain_module_is_unwrapped_wherever_one_is_needed(loaded, run_model):
    assert plain_module(loaded) is loaded.module
    assert plain_module(run_model) is run_model.module
    linear = nn.Linear(2, 2)
    assert plain_module(linear) is linear
    with pytest.raises(ConfigError, match="has no module of torch"):
        plain_module(RunModel(linear, run_model.origin, None))
