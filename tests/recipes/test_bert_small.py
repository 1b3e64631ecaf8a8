"""The small BERT is as large as it says, and its topics begin where its pretraining ends."""

from __future__ import annotations

from deepseek.data.config import DataConfig, TableConfig
from deepseek.models import text_zoo
from deepseek.models.transformers_models.model import build_transformers
from deepseek.recipes import RECIPES, load_recipe


def test_the_small_bert_has_as_many_parameters_as_it_says() -> None:
    config = load_recipe("bert_small")
    vocab_size = config.data_of(DataConfig).vocab_size
    values = text_zoo.configure("bert-base", **config.init_settings, vocab_size=vocab_size)
    assert isinstance(values, dict)
    model = build_transformers(values | {"architectures": ["BertForMaskedLM"]})
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{num_parameters / 1e6:.1f} M" in RECIPES["bert_small"]


def test_the_topics_go_on_from_where_the_small_bert_ends() -> None:
    pretraining, config = load_recipe("bert_small"), load_recipe("bert_topics")
    assert config.init == f"{pretraining.folder}/model"
    assert config.data_of(TableConfig).max_len <= int(str(pretraining.init_settings["max_position_embeddings"]))
