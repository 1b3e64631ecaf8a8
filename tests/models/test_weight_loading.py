"""Names of weights that wrappers of torch changed, and what is said where weights do not fit."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from deepseek.core.errors import ArtifactError
from deepseek.models import zoo
from deepseek.models.loading import load_model
from deepseek.models.weight_loading import fill_, strip_wrappers

SMALL = {"overrides": {"width": 8, "num_classes": 10}}
FILE = Path("weights.safetensors")


def small_resnet():
    torch.manual_seed(0)
    return zoo.build("resnet18", **SMALL["overrides"]).eval()


def wrapped(name):
    """A module, and around it what people save without taking it off."""
    model = small_resnet()
    if name == "compiled":
        return model, torch.compile(model)
    if name == "one layer compiled":
        model = copy.deepcopy(model)
        other = copy.deepcopy(model)
        other.layer1 = torch.compile(other.layer1)
        return model, other
    if name == "averaged":
        return model, torch.optim.swa_utils.AveragedModel(model)
    if name == "data parallel":
        return model, nn.DataParallel(model)
    return model, nn.DataParallel(torch.compile(model))


@pytest.mark.parametrize(
    "name", ["compiled", "one layer compiled", "averaged", "data parallel", "compiled, then data parallel"]
)
def test_weights_of_a_wrapped_model_load_as_those_of_the_model(tmp_path, name):
    model, around = wrapped(name)
    save_file({key: tensor.clone() for key, tensor in around.state_dict().items()}, tmp_path / FILE)
    loaded = load_model("resnet18", SMALL, weights=tmp_path / FILE)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_a_layer_that_is_called_module_keeps_its_name():
    known = {"module.weight", "head.module.bias"}
    tensors = dict.fromkeys(known, torch.ones(1))
    assert set(strip_wrappers(tensors, known, source=FILE)) == known


def test_a_tensor_with_and_without_its_wrapper_is_refused():
    tensors = {"weight": torch.zeros(1), "module.weight": torch.ones(1)}
    with pytest.raises(ArtifactError, match="holds 'weight' twice"):
        strip_wrappers(tensors, {"weight"}, source=FILE)


def test_weights_that_do_not_fit_are_named_and_counted_in_one_short_sentence():
    model = small_resnet()
    state = {f"other.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(ArtifactError) as caught:
        fill_(copy.deepcopy(model), state, None, source=FILE)
    assert len(str(caught.value)) < 500
    assert "conv1.weight, bn1.weight, bn1.bias and 119 more missing" in str(caught.value)
    assert "other.conv1.weight" in str(caught.value) and "left over" in str(caught.value)


def test_a_tensor_of_another_shape_is_named_with_both_shapes():
    model = small_resnet()
    state = dict(model.state_dict()) | {"fc.bias": torch.zeros(3)}
    with pytest.raises(ArtifactError, match=r"fc\.bias is \[3\] instead of \[10\]; give the weights"):
        fill_(model, state, None, source=FILE)


# ---- weights of other libraries, for a model by name


def test_a_resnet_of_hugging_face_is_the_weights_of_ours(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
    )
    theirs = ResNetForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "resnet")
    ours = load_model("resnet18", SMALL, weights=tmp_path / "resnet")
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-4, atol=1e-4)


def test_a_vit_of_hugging_face_is_the_weights_of_ours(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 48, "image_size": 32, "patch_size": 16}
    theirs = ViTForImageClassification(ViTConfig(num_attention_heads=3, num_labels=5, **shape)).eval()
    theirs.save_pretrained(tmp_path / "vit")
    overrides = {
        "hidden_size": 24,
        "num_layers": 2,
        "mlp_size": 48,
        "image_size": 32,
        "num_heads": 3,
        "num_classes": 5,
        "norm_eps": 1e-12,
    }
    ours = load_model("vit_b_16", {"overrides": overrides}, weights=tmp_path / "vit")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-4, atol=1e-4)


def test_the_names_of_old_files_of_torchvision_load(tmp_path):
    overrides = {"hidden_size": 24, "num_layers": 1, "mlp_size": 48, "image_size": 32, "num_heads": 3}
    model = zoo.build("vit_b_16", **overrides).eval()
    old = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for name, tensor in model.state_dict().items()
    }
    assert set(old) != set(model.state_dict())
    save_file(old, tmp_path / FILE)
    loaded = load_model("vit_b_16", {"overrides": overrides}, weights=tmp_path / FILE)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
