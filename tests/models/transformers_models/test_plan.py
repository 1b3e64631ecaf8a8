"""BERT under tensor and data parallelism, against itself in one process and in float64."""

import pytest
import torch
import torch.nn.functional as F

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.legality import check_plan_runs
from deepseek.distributed.parallel.mesh import build_mesh
from deepseek.distributed.parallel.parity import compare_steps, record_steps
from deepseek.distributed.plan import Plan
from deepseek.models.parallelizing import list_model_rows, parallelize
from deepseek.models.transformers_models.model import TransformersModel
from tests.distributed.parallel.cases import sgd
from tests.distributed.ranks import run_ranks

SHAPE = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 12}
SHAPE |= {"max_position_embeddings": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class MaskedTokens:
    def forward(self, model, batch):
        return model(batch[0])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten(), ignore_index=-100, reduction="sum")

    def count_units(self, batch):
        return int((batch[1] != -100).sum())


def build_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return TransformersModel(transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE))).double().train()


def build_steps():
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(31, (2, 6), generator=generator) for _ in range(4)]
    return [[(batch, batch.masked_fill(batch % 3 > 0, -100)) for batch in tokens]] * 2


def compare_bert(rank):
    found = []
    for settings in ({"tp": 2}, {"dp": 2, "zero_stage": 3}):
        plan = Plan(**settings)
        records = record_steps(build_bert(), MaskedTokens(), build_steps(), sgd)
        parallel = parallelize(build_bert(), plan, build_mesh(plan))
        parity = compare_steps(parallel, MaskedTokens(), build_steps(), records, sgd)
        found.append([parting.describe() for parting in parity.partings[:1]])
    return found


def test_bert_learns_under_a_plan_as_in_one_process():
    assert run_ranks(compare_bert, 2) == [[[], []]] * 2


def test_a_pipeline_and_another_kind_of_model_are_refused():
    rows = list_model_rows(build_bert())
    with pytest.raises(ConfigError, match="pp=2 needs to know the layers of BertForMaskedLM"):
        check_plan_runs(Plan(pp=2), rows.parts)
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=31, dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    other = list_model_rows(TransformersModel(transformers.DistilBertModel(config)))
    with pytest.raises(ConfigError, match="tp=2 needs to know which layers of DistilBertModel to cut"):
        check_plan_runs(Plan(tp=2), other.parts)
