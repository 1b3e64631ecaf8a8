"""Where parallelism takes hold of models of `transformers`: BERT's layers are cut, others are sharded whole."""

from __future__ import annotations

from torch import nn

from deepseek.distributed.parallel.legality import ModelParts
from deepseek.distributed.parallel.parallel_model import ModelRows
from deepseek.distributed.parallel.tensor_parallel import Rows, columns, logits, rows, vocabulary
from deepseek.models.transformers_models.model import TransformersModel

_LAYERS = "encoder.layer"


def list_rows(model: TransformersModel) -> ModelRows:
    """List the rows of a BERT encoder with any head; a model of another kind has none."""
    name, config = type(model.model).__name__, model.config
    layers = _find_layers(model)
    if layers is None or config.get("model_type") != "bert":
        return ModelRows(ModelParts(name), blocks=f"{layers}.*" if layers else "")
    return ModelRows(
        parts=ModelParts(name, head_counts=(("num_heads", config["num_attention_heads"]),), has_tensor_rows=True),
        tensor=_list_bert_rows(model, layers),
        blocks=f"{layers}.*",
    )


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
