"""`ds.parallelize`: a model under a plan, by the rows that are known of it or those that a user gives.

    plan = ds.Plan(tp=2, dp=2, zero_stage=3)
    parallel = ds.parallelize(model, plan)
    optimizer = torch.optim.AdamW(parallel.parameter_groups())
    totals = parallel.accumulate_gradients(task, micro_batches)

Models know nothing of parallelism. Their rows stand beside them, in `models/<name>/plan.py`; for a model of one's own
they are a mapping: `{"blocks.*.fc1": "columns", "blocks.*.fc2": "rows"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from deepseek.distributed.parallel.legality import ModelParts
from deepseek.distributed.parallel.mesh import PlanMesh, build_mesh
from deepseek.distributed.parallel.parallel_model import ModelRows, ParallelModel, cut
from deepseek.distributed.parallel.tensor_parallel import Rows, read_rows
from deepseek.distributed.plan import Plan
from deepseek.models.decoder.model import Decoder
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.models.vit.model import ViT


def parallelize(
    model: nn.Module, plan: Plan, mesh: PlanMesh | None = None, *, rows: Mapping[str, str] | Rows | None = None
) -> ParallelModel:
    """Cut `model` by `plan`, in place, so that this rank holds its part; weights and the random seed are rank 0's.

    Every rank calls it, with the process group there. Without a `mesh` one is made on the device of the model. `rows`
    replace those known of the model. Raises `ConfigError` for a plan that cannot run on such a model or on so many
    ranks, with the nearest one that can.

    >>> list_model_rows(nn.Linear(2, 2), {"": "columns"}).parts.has_tensor_rows
    True
    """
    found = list_model_rows(model, rows)
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    return cut(model, found, plan, mesh or build_mesh(plan, device))


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
