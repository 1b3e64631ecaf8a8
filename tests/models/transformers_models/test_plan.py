"""BERT under tensor, pipeline and data parallelism, against itself in one process and in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.layer_costs import split_layers
from deepseek.distributed.parallel.legality import check_plan_runs
from deepseek.distributed.parallel.mesh import build_mesh
from deepseek.distributed.parallel.parity import compare_steps, record_steps
from deepseek.distributed.plan import Plan
from deepseek.models.parallelizing import list_model_rows, parallelize
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.models.transformers_models.plan import keep_stage
from tests.distributed.parallel.cases import sgd
from tests.distributed.ranks import run_ranks

SHAPE = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 12}
SHAPE |= {"max_position_embeddings": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


ZERO_BUBBLE = {"pp": 2, "schedule": "zero_bubble"}
INTERLEAVED = {"pp": 2, "schedule": "interleaved", "virtual_stages": 2}
CASES = [
    ("BertForMaskedLM", {"tp": 2}),
    ("BertForMaskedLM", {"dp": 2, "zero_stage": 3}),
    ("BertForMaskedLM", {"pp": 2}),
    ("BertForMaskedLM", ZERO_BUBBLE),
    ("BertForSequenceClassification", INTERLEAVED),
    ("BertForTokenClassification", {"pp": 2}),
]


class Units:
    """Tokens or rows, of which those with a target count."""

    def forward(self, model, batch):
        return model(*batch[0])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten(), ignore_index=-100, reduction="sum")

    def count_units(self, batch):
        return int((batch[1] != -100).sum())


def build_bert(kind, **settings):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(**(SHAPE | settings))
    return TransformersModel(getattr(transformers, kind)(config)).double().train()


def build_steps(kind):
    """Two steps of four rows of tokens, some of them padded, with targets of some tokens or of each row."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(31, (2, 6), generator=generator) for _ in range(4)]
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    num_classes = 31 if kind == "BertForMaskedLM" else 2
    targets = [(batch % num_classes).masked_fill(batch % 3 > 0, -100) for batch in tokens]
    if kind == "BertForSequenceClassification":
        targets = [batch[:, 0] % 2 for batch in tokens]
    return [[((batch, mask), target) for batch, target in zip(tokens, targets, strict=True)]] * 2


def compare_bert(rank):
    found = []
    for kind, settings in CASES:
        plan, steps = Plan(**settings), build_steps(kind)
        model = build_bert(kind, num_hidden_layers=2 * plan.virtual_stages)
        records = record_steps(copy.deepcopy(model), Units(), steps, sgd)
        parity = compare_steps(parallelize(model, plan, build_mesh(plan)), Units(), steps, records, sgd)
        found.append([parting.describe() for parting in parity.partings[:1]])
    return found


def test_bert_learns_under_a_plan_as_in_one_process():
    assert run_ranks(compare_bert, 2) == [[[]] * len(CASES)] * 2


@pytest.mark.parametrize("kind", ["BertModel", *dict.fromkeys(kind for kind, _ in CASES)])
def test_the_stages_hold_every_parameter_once_and_compute_the_model(kind):
    whole = build_bert(kind).eval()
    inputs = build_steps(kind)[0][0][0]
    names, x = [], None
    for stage in split_layers([1, 1], 2):
        part = copy.deepcopy(whole)
        received = keep_stage(part, stage)
        if received is not None:
            received.value = x
        x = part(*inputs)
        names += [name for name, _ in part.named_parameters(remove_duplicate=False)]
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters(remove_duplicate=False))
    torch.testing.assert_close(x, whole(*inputs), rtol=0, atol=0)


def test_the_head_of_a_masked_language_model_costs_what_its_multiply_adds_are_in_layers():
    model = build_bert("BertForMaskedLM")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 6, dtype=torch.int64))
    by_module = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    encoder = "TransformersModel.model.bert.encoder.layer.0"
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    layer = sum(by_module[f"{encoder}.{part}"] for part in (*parts, "intermediate.dense", "output.dense"))
    assert list_model_rows(model).head_cost == pytest.approx(by_module["TransformersModel.model.cls"] / layer)


def test_a_head_that_no_stage_can_leave_out_and_another_kind_of_model_are_refused():
    rows = list_model_rows(build_bert("BertForQuestionAnswering"))
    with pytest.raises(ConfigError, match="pp=2 needs to know the layers of BertForQuestionAnswering"):
        check_plan_runs(Plan(pp=2), rows.parts)
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=31, dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    other = list_model_rows(TransformersModel(transformers.DistilBertModel(config)))
    with pytest.raises(ConfigError, match="tp=2 needs to know which layers of DistilBertModel to cut"):
        check_plan_runs(Plan(tp=2), other.parts)
