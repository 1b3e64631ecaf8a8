import torch

from deepseek.distributed.parallel.pipeline import split_layers
from deepseek.distributed.parallel.tensor_parallel import match_modules
from deepseek.models.vit.model import ViT
from deepseek.models.vit.plan import keep_stage, list_rows
from tests.distributed.parallel.cases import CONFIGS


def test_every_row_matches_a_module():
    model = ViT(CONFIGS["vit"])
    assert all(match_modules(model, pattern) for pattern, _ in list_rows(model).tensor)
    assert len(match_modules(model, list_rows(model).blocks)) == 3


def test_the_stages_hold_every_parameter_once_and_compute_the_model():
    whole = ViT(CONFIGS["vit"]).eval()
    images_BCHW = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    names, x = [], None
    for stage in split_layers(3, 3):
        part = ViT(CONFIGS["vit"]).eval()
        part.load_state_dict(whole.state_dict())
        received = keep_stage(part, stage)
        if received is not None:
            received.value = x
        x = part(images_BCHW)
        names += [path for path, _ in part.named_parameters()]
    assert sorted(names) == sorted(path for path, _ in whole.named_parameters())
    torch.testing.assert_close(x, whole(images_BCHW), rtol=0, atol=0)
