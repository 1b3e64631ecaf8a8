"""Recipes: complete runs, each a function that returns one config. Variants are overrides of one of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from deepseek.core.registry import Registry

if TYPE_CHECKING:
    from deepseek.train.config import TrainConfig

# What each is for, in one line; it is the function of that name in the module of that name.
RECIPES: Registry[str] = Registry("recipe")
RECIPES.add("quickstart", "A 6.6 M mixture of experts on Python's own source code, minutes on two cores.")
RECIPES.add("decoder_tiny", "A 2.4 M dense Llama-shaped decoder, for trying things out.")
RECIPES.add("decoder_120m", "The 120 M decoder of the first generation, with the dynamic local/global mask.")
RECIPES.add("resnet_digits", "A 0.7 M ResNet that reads the digits of scikit-learn, a minute on two cores.")
RECIPES.add("mobilenet_emoji", "A MobileNetV3-small that groups the emoji of the npm package emoji-datasource-google.")
RECIPES.add("yolov7_tiny_scenes", "A YOLOv7-tiny on scenes composed of your own pictures and photographs.")
RECIPES.add(
    "bert_small", "A 5.4 M BERT by masked language modeling on text of your own, a quarter of an hour on two cores."
)
RECIPES.add("bert_answers", "Answers to questions about Python's library, from the model of bert_small or another.")
RECIPES.add("bert_topics", "Topics of passages of the Brown corpus, from the model of bert_small.")


def load_recipe(name: str) -> TrainConfig:
    """Load the config of a recipe; an unknown name raises `ConfigError` with the known ones."""
    RECIPES[name]
    config: TrainConfig = getattr(importlib.import_module(f"deepseek.recipes.{name}"), name)()
    return config
