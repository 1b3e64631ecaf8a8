"""`ds.parallelize`: a model under a plan, by the rows that are known of it or those that a user gives.

    plan = ds.Plan(tp=2, dp=2, zero_stage=3)
    parallel = ds.parallelize(model, plan)
    optimizer = torch.optim.AdamW(parallel.parameter_groups())
    totals = parallel.accumulate_gradients(task, micro_batches)

Models know nothing of parallelism. Their rows stand beside them, in `models/<name>/plan.py`; for a model of one's own
they are a mapping: `{"blocks.*.fc1": "columns", "blocks.*.fc2": "rows"}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.distributed.communicator import DeepSeekComm
from deepseek.distributed.parallel.layer_costs import measure_layers
from deepseek.distributed.parallel.legality import ModelParts
from deepseek.distributed.parallel.mesh import PlanMesh, build_mesh
from deepseek.distributed.parallel.parallel_model import ModelRows, ParallelModel, cut
from deepseek.distributed.parallel.pipeline import Learner
from deepseek.distributed.parallel.tensor_parallel import Rows, match_modules, read_rows
from deepseek.distributed.plan import Plan
from deepseek.models.decoder.model import Decoder
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.models.vit.model import ViT


def parallelize(
    model: nn.Module,
    plan: Plan,
    mesh: PlanMesh | None = None,
    *,
    rows: Mapping[str, str] | Rows | None = None,
    layer_costs: Sequence[float] = (),
    comm: DeepSeekComm | None = None,
) -> ParallelModel:
    """Cut `model` by `plan`, in place, so that this rank holds its part; weights and the random seed are rank 0's.

    Every rank calls it, with the process group there. Without a `mesh` one is made on the device of the model. `rows`
    replace those known of the model. The stages of a pipeline are split by `layer_costs` where they are given
    (`measure_layer_costs`; those of rank 0 count), else by an estimate. With a `comm`, gradients and shards travel by
    its algorithms, which know the hosts of the ranks. Raises `ConfigError` for a plan that cannot run on such a model
    or on so many ranks, with the nearest one that can.

    >>> list_model_rows(nn.Linear(2, 2), {"": "columns"}).parts.has_tensor_rows
    True
    """
    found = replace(list_model_rows(model, rows), layer_costs=tuple(layer_costs))
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return cut(model, found, plan, mesh or build_mesh(plan, device), comm)


def measure_layer_costs(model: nn.Module, learner: Learner, batch: Any) -> list[float]:
    """Measure the seconds of each layer of `model` for one batch, as `parallelize` splits a pipeline by.

    The model is whole, in the dtype and on the device that it will be trained with, and one process measures it. The
    first layer's seconds include the embedding's, the last one's those of the head and the loss. Raises `ConfigError`
    for a model that has no stages described.
    """
    known = list_model_rows(model)
    if known.keep_stage is None:
        raise ConfigError(f"{known.parts.name} has no stages described, so its layers need no costs; leave them out")
    return measure_layers(model, list(match_modules(model, known.blocks).values()), learner, batch)


def list_model_rows(model: nn.Module, rows: Mapping[str, str] | Rows | None = None) -> ModelRows:
    """List where parallelism takes hold of `model`, with the tensor parallel `rows` of a user where there are any."""
    known = _list_known_rows(model)
    if rows is None:
        return known
    parts = replace(known.parts, has_tensor_rows=True, has_sequence_rows=False)
    return replace(known, parts=parts, tensor=read_rows(rows))


def _list_known_rows(model: nn.Module) -> ModelRows:
    if isinstance(model, Decoder):
        from deepseek.models.decoder.plan import list_rows as list_decoder_rows

        return list_decoder_rows(model)
    if isinstance(model, ViT):
        from deepseek.models.vit.plan import list_rows as list_vit_rows

        return list_vit_rows(model)
    if isinstance(model, TransformersModel):
        from deepseek.models.transformers_models.plan import list_rows as list_transformers_rows

        return list_transformers_rows(model)
    return ModelRows(ModelParts(type(model).__name__))
