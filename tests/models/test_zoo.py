import pytest
import torch
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.models import zoo

# Published: torchvision's model pages; for YOLOv7, what its authors' code prints in training.
PUBLISHED = {
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "vit_b_16": 86_567_656,
    "yolov7": 37_622_682,
    "yolov7-tiny": 6_228_762,
}
NUM_BOXES = 3 * (80**2 + 40**2 + 20**2)


def test_names_are_sorted():
    assert tuple(PUBLISHED) == zoo.NAMES


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_every_model_has_the_parameters_that_were_published(name, count):
    description = zoo.describe(name)
    assert description.num_parameters == description.published_parameters == count
    assert description.name == name and description.architecture in {"ResNet", "MobileNetV3", "ViT", "YOLOv7"}
    assert description.input_shape == ((3, 640, 640) if name.startswith("yolov7") else (3, 224, 224))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_model_takes_its_sample_inputs(name):
    with torch.device("meta"):  # shapes only: no values are computed
        model = zoo.build(name)
    (inputs,) = zoo.sample_inputs(name, 2)
    assert model(inputs.to("meta")).shape == ((2, NUM_BOXES, 85) if name.startswith("yolov7") else (2, 1000))


def test_a_seed_gives_the_same_weights():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(zoo.build("mobilenet_v3_small", width_multiple=0.25).state_dict())
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=0)
    assert not torch.equal(models[0]["classifier.3.weight"], models[2]["classifier.3.weight"])


def test_sample_inputs_are_the_same_each_time_and_leave_the_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = zoo.sample_inputs("resnet50", 3), zoo.sample_inputs("resnet50", 3)
    assert torch.equal(first[0], second[0]) and torch.equal(torch.get_rng_state(), state)
    assert first[0].shape == (3, 3, 224, 224)


def test_overrides_change_the_model_and_its_inputs():
    changes = {"image_size": 32, "patch_size": 8, "in_channels": 1, "num_classes": 4, "num_layers": 1}
    (inputs,) = zoo.sample_inputs("vit_b_16", 2, **changes)
    assert inputs.shape == (2, 1, 32, 32)
    assert zoo.build("vit_b_16", **changes)(inputs).shape == (2, 4)


@pytest.mark.parametrize("function", [zoo.build, zoo.describe, lambda name: zoo.sample_inputs(name, 1)])
def test_an_unknown_name_is_answered_with_the_nearest(function):
    with pytest.raises(ConfigError, match=r"unknown model 'resnet51'; did you mean 'resnet\d+'"):
        function("resnet51")


def test_an_unknown_setting_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="num_classes"):
        zoo.build("resnet50", num_clases=10)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(batch_size):
    with pytest.raises(ConfigError, match="batch_size"):
        zoo.sample_inputs("resnet50", batch_size)


# ---- settling


def test_settled_norms_have_the_statistics_of_the_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
    x = torch.randn(8, 2, 9, 9)
    zoo.settle_(model, x)
    first = model[0](x)
    normed = (first - first.mean((0, 2, 3), keepdim=True)) / (first.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()
    second = model[3](normed.relu())
    for norm, values in ((model[1], first), (model[4], second)):
        torch.testing.assert_close(norm.running_mean, values.mean((0, 2, 3)))
        torch.testing.assert_close(norm.running_var, values.var((0, 2, 3)))


@pytest.mark.parametrize("is_training", [True, False])
def test_settling_leaves_everything_else_as_it_was(is_training):
    model = zoo.build("mobilenet_v3_small", width_multiple=0.25, dropout=0.9).train(is_training)
    model.features[3].eval()
    modes = [module.training for module in model.modules()]
    weights = [parameter.clone() for parameter in model.parameters()]
    zoo.settle_(model, torch.randn(4, 3, 64, 64))
    assert [module.training for module in model.modules()] == modes
    assert all(map(torch.equal, weights, model.parameters()))
    assert {each.momentum for each in model.modules() if isinstance(each, nn.BatchNorm2d)} == {0.01}


def test_settling_on_inputs_that_do_not_fit_leaves_momentum_and_mode():
    model = zoo.build("resnet18", width=8)
    with pytest.raises(RuntimeError, match="channels"):
        zoo.settle_(model, torch.randn(4, 1, 64, 64))
    assert model.training and model.bn1.momentum == 0.1


def test_a_settled_resnet_152_fits_into_16_bits():
    torch.manual_seed(0)
    model, pictures = zoo.build("resnet152", width=16), torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        before = model.eval()(pictures).abs().max().item()
        after = zoo.settle_(model, pictures)(pictures).abs().max().item()
    assert before > torch.finfo(torch.float16).max > 100 > after
