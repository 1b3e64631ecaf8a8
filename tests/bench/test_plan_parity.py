"""The small model of a run, and what is refused. That ranks are compared is in tests/cli/verbs/test_verify.py."""

import pytest
import torch
from torch import nn

from deepseek.bench.plan_parity import NARROW_TOLERANCE, build_subject, settle_randomness_, shrink, verify_plans
from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.parity import RELATIVE_TOLERANCE
from deepseek.distributed.plan import Plan
from deepseek.models.decoder.model import DecoderConfig
from deepseek.nn.lora import LoRAConfig
from deepseek.nn.moe import MoEConfig
from deepseek.recipes import RECIPES, load_recipe
from deepseek.train.config import TrainConfig
from deepseek.train.task import Task, TaskData


class Pairs(Task):
    """Points whose batches are counted out by a loader that has no end."""

    narrow = False

    def open_data(self, folder):
        return TaskData(loader=Counting(), num_train_units=8)

    def build_model(self, data):
        return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))

    def inputs(self, batch):
        return (batch,)

    def loss(self, outputs, batch):
        return (outputs.float() if self.narrow else outputs).square().sum()

    def count_units(self, batch):
        return len(batch)


class NarrowPairs(Pairs):
    narrow = True


class Counting:
    def __init__(self):
        self.count = 0

    def next_batch(self):
        self.count += 1
        return torch.full((2, 3), float(self.count))


@pytest.mark.parametrize("name", [name for name in RECIPES if load_recipe(name).init is None])
def test_a_small_model_keeps_what_plans_divide(name):
    config = load_recipe(name)
    small = shrink(config, num_stages=4)
    for setting in ("num_heads", "kv_heads", "vocab_size", "moe"):
        whole, kept = getattr(config.model, setting), getattr(small.model, setting)
        assert kept == whole or (setting == "moe" and kept.num_experts == whole.num_experts)
    assert small.model.hidden_size <= 8 * config.model.num_heads and small.model.num_layers <= 4


def test_what_depends_on_chance_or_company_is_off():
    model = nn.ModuleList([nn.Dropout(0.1)])
    model.router = nn.Module()
    model.router.balance_rate, model.router.capacity_factor = 0.5, 1.0
    settle_randomness_(model)
    assert (model[0].p, model.router.balance_rate, model.router.capacity_factor) == (0.0, 0.0, None)


@pytest.mark.parametrize(("task", "tolerance"), [(Pairs, RELATIVE_TOLERANCE), (NarrowPairs, NARROW_TOLERANCE)])
def test_batches_differ_and_a_loss_in_float32_is_allowed_its_rounding(tmp_path, task, tolerance):
    config = TrainConfig(folder=str(tmp_path))
    subject, batches = build_subject(config, task, [Plan(dp=4)], num_ranks=2, num_steps=2)
    assert subject.tolerance == tolerance
    assert [[int(batch[0, 0]) for batch in step] for step in batches] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert all(weight.dtype == torch.float64 for weight in subject.model.parameters())


def test_what_cannot_be_verified_is_refused(tmp_path):
    config = TrainConfig(folder=str(tmp_path))
    with pytest.raises(ConfigError, match="tp=2 needs to know which layers of Sequential to cut"):
        list(verify_plans(config, [Plan(tp=2)], task=Pairs))
    with pytest.raises(ConfigError, match="0 steps compare nothing"):
        list(verify_plans(config, num_steps=0, task=Pairs))
    adapted = TrainConfig(folder=str(tmp_path), init="resnet18", adapter=LoRAConfig())
    with pytest.raises(ConfigError, match="adapter is set; leave it out"):
        list(verify_plans(adapted, task=Pairs))


def test_a_rotated_share_of_a_head_stays_a_pair():
    model = DecoderConfig(rope_fraction=0.25, moe=MoEConfig())
    small = shrink(TrainConfig(model=model), num_stages=2).model
    assert small.num_rotated >= 2 and small.num_rotated % 2 == 0
