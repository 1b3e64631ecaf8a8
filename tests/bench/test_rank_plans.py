"""What `--plan auto` chooses on a machine that was measured before."""

import pytest

from deepseek.bench.rank_plans import choose_rank_plan, share_machine
from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.legality import ModelParts, explain_illegal
from deepseek.distributed.topology import LinkClass
from deepseek.planning.machines.cluster import Accelerator, Cluster, Node
from deepseek.planning.machines.constants import get_constants
from deepseek.recipes import load_recipe
from deepseek.train.parallel_run import split_step

LINK = LinkClass(1e-5, 1e9)
DEVICE = Accelerator(
    "a box", 16e9, 2e10, {"fp32": 5e10, "bf16": 1e11}, LINK, LINK, scale_up_size=1, processors=2,
    shares=get_constants("other"),
)  # fmt: skip
MACHINE = Cluster((Node(DEVICE, 1),), LINK)
TINY = load_recipe("decoder_tiny").override({"precision": "fp32"})


@pytest.fixture
def ranks(monkeypatch):
    """Set the ranks of this machine, and all ranks."""

    def set_ranks(here, everywhere=None):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(everywhere or here))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        monkeypatch.setenv("MASTER_ADDR", "localhost")

    return set_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_plan_is_for_the_ranks_and_can_run(ranks, num_ranks):
    ranks(num_ranks)
    plan = choose_rank_plan(TINY, num_ranks, MACHINE)
    assert plan.num_devices == num_ranks
    parts = ModelParts("Decoder", 4, (("num_heads", 6), ("num_kv_heads", 2)), 0, True, True)
    assert explain_illegal(plan, parts) is None
    assert split_step(TINY, plan).sequences_per_step == TINY.sequences_per_step


def test_ranks_share_what_they_are_more_than():
    shared = share_machine(MACHINE, 4)
    assert shared.num_devices == 4
    assert shared.accelerators[0].peak_flops["fp32"] == 5e10 / 4
    assert shared.accelerators[0].memory_bytes == 16e9 / 4
    own = share_machine(Cluster((Node(DEVICE, 8),), LINK), 4)
    assert own.num_devices == 4
    assert own.accelerators[0].peak_flops == DEVICE.peak_flops


def test_what_cannot_be_planned_is_refused(ranks):
    ranks(2, 4)
    with pytest.raises(ConfigError, match="4 ranks are on several of 2; search with"):
        choose_rank_plan(TINY, 4, MACHINE)
    ranks(2)
    with pytest.raises(ConfigError, match="trains for image_classification"):
        choose_rank_plan(load_recipe("resnet_digits"), 2, MACHINE)
