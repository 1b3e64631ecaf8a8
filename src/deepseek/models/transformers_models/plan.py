"""Where parallelism takes hold of models of `transformers`: BERT's layers are cut, others are sharded whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from deepseek.distributed.parallel.legality import ModelParts
from deepseek.distributed.parallel.parallel_model import ModelRows
from deepseek.distributed.parallel.pipeline import PipelineStage, Received, TakenOut
from deepseek.distributed.parallel.tensor_parallel import Rows, columns, logits, rows, vocabulary
from deepseek.models.transformers_models.model import TransformersModel

_LAYERS = "encoder.layer"
# Heads that pass one tensor on from part to part, so that a stage without them answers with hidden states.
_PIPELINED = ("BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification")


def list_rows(model: TransformersModel) -> ModelRows:
    """List the rows of a BERT encoder with any head; a model of another kind has none."""
    name, config = type(model.model).__name__, model.config
    layers = _find_layers(model)
    if layers is None or config.get("model_type") != "bert":
        return ModelRows(ModelParts(name), blocks=f"{layers}.*" if layers else "")
    can_be_split = name in _PIPELINED
    return ModelRows(
        parts=ModelParts(
            name,
            num_layers=config["num_hidden_layers"] if can_be_split else 0,
            head_counts=(("num_heads", config["num_attention_heads"]),),
            has_tensor_rows=True,
        ),
        tensor=_list_bert_rows(model, layers),
        blocks=f"{layers}.*",
        keep_stage=keep_stage if can_be_split else None,
        head_cost=_measure_head(config) if name == "BertForMaskedLM" else 0.0,
    )


def keep_stage(model: nn.Module, stage: PipelineStage) -> Received | None:
    """Take out of a BERT encoder and its head what `stage` does not hold."""
    assert isinstance(model, TransformersModel)
    headed: Any = model.model
    bert = headed.base_model
    for index in range(stage.num_layers):
        if not stage.holds(index):
            bert.encoder.layer[index] = TakenOut()
    if not stage.is_last:
        if bert.pooler is not None:
            bert.pooler = TakenOut()
        for name, part in headed.named_children():
            if headed is not bert and part is not bert:
                setattr(headed, name, TakenOut())
    if stage.is_first:
        return None
    bert.embeddings = received = Received()
    return received


def _measure_head(config: Mapping[str, Any]) -> float:
    """Return the multiply-adds of a token in the head of a masked language model over those in a layer."""
    hidden, ffn, vocabulary = (int(config[name]) for name in ("hidden_size", "intermediate_size", "vocab_size"))
    return (hidden + vocabulary) / (4 * hidden + 2 * ffn)


def _list_bert_rows(model: TransformersModel, layers: str) -> Rows:
    encoder = layers.removesuffix(_LAYERS)
    table = [(f"{encoder}embeddings.word_embeddings", vocabulary)]
    table += [(f"{layers}.*.attention.self.{name}", columns) for name in ("query", "key", "value")]
    table += [(f"{layers}.*.attention.output.dense", rows)]
    table += [(f"{layers}.*.intermediate.dense", columns), (f"{layers}.*.output.dense", rows)]
    head = "model.cls.predictions.decoder"
    return [*table, (head, logits)] if head in dict(model.named_modules()) else table


def _find_layers(model: nn.Module) -> str | None:
    """Return the name of the list of a model's layers."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return next((name for name in names if name.endswith(_LAYERS)), None)
