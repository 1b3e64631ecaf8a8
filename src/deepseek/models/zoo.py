"""The vision models by name: what a user may ask `load_model` for, with random weights until others are loaded.

A row of the zoo is a name, a config, the class that takes it, and the number of parameters that was published for it.

    zoo.NAMES                          every name, sorted
    zoo.build("resnet50")              the model; overrides are settings of its config: num_classes=10
    zoo.sample_inputs("resnet50", 16)  a batch that it takes
    zoo.describe("resnet50")           shape of an input, parameters counted and published
    zoo.settle_(model, *inputs)        sizes of values as in a trained model, for measurements without trained weights

`build` draws from torch's global generator, so that a caller who seeds it gets the same weights each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepseek.core.config import Config
from deepseek.core.errors import ConfigError
from deepseek.core.registry import Registry
from deepseek.models.decoder.model import count_parameters
from deepseek.models.mobilenet_v3.model import MobileNetV3, MobileNetV3Config
from deepseek.models.resnet.model import ResNet, ResNetConfig
from deepseek.models.vit.model import ViT, ViTConfig
from deepseek.models.yolov7.model import TINY_ANCHORS, YOLOv7, YOLOv7Config

SAMPLE_SEED = 0


@dataclass(frozen=True)
class PublishedModel:
    """One row of the zoo."""

    config: Config
    """Settings of the published model."""
    assemble: Callable[[Any], nn.Module]
    """The class of the model, which takes the config."""
    image_size: int
    """Height and width of an image, in pixels."""
    published_parameters: int
    """Parameters as its authors, or torchvision, count them."""


@dataclass(frozen=True)
class ModelDescription:
    """A summary of a model, as `describe` returns it."""

    name: str
    architecture: str
    """The class of the model."""
    config: Config
    """Its settings."""
    input_shape: tuple[int, ...]
    """Channels, height and width of one image."""
    num_parameters: int
    """Parameters counted in our model."""
    published_parameters: int
    """Parameters as its authors, or torchvision, count them."""


MODELS: Registry[PublishedModel] = Registry("model")


def build(name: str, **overrides: Any) -> nn.Module:
    """Build the model `name` with random weights, in training mode on the CPU; `overrides` are settings of its config.

    Raises `ConfigError` for an unknown name or setting, with the nearest known one.

    >>> build("resnet18", width=8, num_classes=10)(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 10])
    """
    return MODELS[name].assemble(configure(name, **overrides))


def configure(name: str, **overrides: Any) -> Config:
    """Return the settings of the model `name`, changed by `overrides`."""
    return MODELS[name].config.override(overrides)


def family_of(name: str) -> str:
    """Return the architecture of the model `name`, by which artifacts call it.

    >>> family_of("resnet50")
    'resnet'
    """
    return MODELS[name].assemble.__module__.split(".")[-2]


def sample_inputs(name: str, batch_size: int, **overrides: Any) -> tuple[Tensor, ...]:
    """Sample a batch of normal noise that the model takes: one tensor (batch_size, C, H, W), the same in every call.

    >>> [tuple(x.shape) for x in sample_inputs("resnet50", 2)]
    [(2, 3, 224, 224)]
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} makes no batch; give 1 or more")
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    return (torch.randn(batch_size, *_input_shape(name, configure(name, **overrides)), generator=generator),)


def describe(name: str) -> ModelDescription:
    """Describe the model `name`; it is built without weights, so this takes milliseconds.

    >>> describe("resnet50").num_parameters
    25557032
    """
    entry = MODELS[name]
    with torch.device("meta"):
        model = build(name)
    return ModelDescription(
        name=name,
        architecture=type(model).__name__,
        config=entry.config,
        input_shape=_input_shape(name, entry.config),
        num_parameters=count_parameters(model),
        published_parameters=entry.published_parameters,
    )


def settle_(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Give the batch norms of an untrained `model` the statistics of `inputs`, in place, and return it.

    Random weights with statistics that nothing was measured for let values grow or vanish from layer to layer: a
    ResNet-152 answers with logits of 1e8, which no 16 bit hold. Settled, it computes with the sizes of a trained one.
    Two images or more; nothing else of the model changes.

    >>> model = settle_(build("resnet152", width=8), *sample_inputs("resnet152", 2, width=8))
    >>> bool(model.eval()(torch.randn(1, 3, 64, 64)).abs().max() < 1e3)
    True
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    were_training = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train().momentum = None  # which averages over all that it sees
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, was_training in were_training.items():
            module.training = was_training
    return model


def _input_shape(name: str, config: Any) -> tuple[int, ...]:
    image_size = getattr(config, "image_size", MODELS[name].image_size)
    return config.in_channels, image_size, image_size


# ---- the rows

_PUBLISHED = {
    "resnet18": PublishedModel(ResNetConfig(block="basic", depths=(2, 2, 2, 2)), ResNet, 224, 11_689_512),
    "resnet34": PublishedModel(ResNetConfig(block="basic", depths=(3, 4, 6, 3)), ResNet, 224, 21_797_672),
    "resnet50": PublishedModel(ResNetConfig(depths=(3, 4, 6, 3)), ResNet, 224, 25_557_032),
    "resnet101": PublishedModel(ResNetConfig(depths=(3, 4, 23, 3)), ResNet, 224, 44_549_160),
    "resnet152": PublishedModel(ResNetConfig(depths=(3, 8, 36, 3)), ResNet, 224, 60_192_808),
    "mobilenet_v3_large": PublishedModel(MobileNetV3Config(variant="large"), MobileNetV3, 224, 5_483_032),
    "mobilenet_v3_small": PublishedModel(MobileNetV3Config(variant="small"), MobileNetV3, 224, 2_542_856),
    "vit_b_16": PublishedModel(ViTConfig(), ViT, 224, 86_567_656),
    "yolov7": PublishedModel(YOLOv7Config(), YOLOv7, 640, 37_622_682),
    "yolov7-tiny": PublishedModel(YOLOv7Config(variant="tiny", anchors=TINY_ANCHORS), YOLOv7, 640, 6_228_762),
}
for _name, _entry in _PUBLISHED.items():
    MODELS.add(_name, _entry)

NAMES = tuple(sorted(MODELS))
