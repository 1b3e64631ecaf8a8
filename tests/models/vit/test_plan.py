import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepseek.distributed.parallel.layer_costs import split_layers
from deepseek.distributed.parallel.tensor_parallel import match_modules
from deepseek.models.vit.model import ViT
from deepseek.models.vit.plan import keep_stage, list_rows
from tests.distributed.parallel.cases import CONFIGS


def test_every_row_matches_a_module():
    model = ViT(CONFIGS["vit"])
    assert all(match_modules(model, pattern) for pattern, _ in list_rows(model).tensor)
    assert len(match_modules(model, list_rows(model).blocks)) == 3


def test_patches_and_head_cost_what_their_multiply_adds_are_in_blocks():
    config = CONFIGS["vit"]
    model, images_BCHW = ViT(config), torch.zeros(1, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model(images_BCHW)
    by_module = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    first = "ViT.encoder.layers.encoder_layer_0"
    block = by_module[f"{first}.mlp"] + 4 * by_module[f"{first}.self_attention.out_proj"]  # and three like it going in
    rows = list_rows(model)
    assert rows.embed_cost == pytest.approx(by_module["ViT.conv_proj"] / block)
    assert rows.head_cost == pytest.approx(by_module["ViT.heads"] / block)


def test_the_stages_hold_every_parameter_once_and_compute_the_model():
    whole = ViT(CONFIGS["vit"]).eval()
    images_BCHW = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    names, x = [], None
    for stage in split_layers([1, 1, 1], 3):
        part = ViT(CONFIGS["vit"]).eval()
        part.load_state_dict(whole.state_dict())
        received = keep_stage(part, stage)
        if received is not None:
            received.value = x
        x = part(images_BCHW)
        names += [path for path, _ in part.named_parameters()]
    assert sorted(names) == sorted(path for path, _ in whole.named_parameters())
    torch.testing.assert_close(x, whole(images_BCHW), rtol=0, atol=0)
