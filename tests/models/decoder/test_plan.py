"""Where parallelism takes hold of decoders of every shape. Numbers are in tests/distributed/parallel/test_parity.py."""

import pytest
import torch

from deepseek.distributed.parallel.layer_costs import split_layers
from deepseek.distributed.parallel.tensor_parallel import match_modules
from deepseek.models.decoder.model import Decoder
from deepseek.models.decoder.plan import keep_stage, list_rows
from tests.distributed.parallel.cases import CONFIGS

DECODERS = [name for name in CONFIGS if name != "vit"]


@pytest.mark.parametrize("name", DECODERS)
def test_every_row_matches_and_no_layer_with_weights_is_forgotten(name):
    model = Decoder(CONFIGS[name])
    rows = list_rows(model)
    matched = {found for pattern, _ in rows.tensor for found in match_modules(model, pattern)}
    assert all(match_modules(model, pattern) for pattern, _ in rows.tensor)
    bare = {path for path, module in model.named_modules() if list(module.parameters(recurse=False))}
    inside = {path for path in bare if not any(path == found or path.startswith(f"{found}.") for found in matched)}
    assert inside == set()
    assert rows.parts.num_layers == CONFIGS[name].num_layers


@pytest.mark.parametrize("name", DECODERS)
def test_the_stages_hold_every_parameter_once_and_compute_the_model(name):
    whole = Decoder(CONFIGS[name]).eval()
    tokens_BT = torch.arange(6)[None] % 29
    names, x = [], None
    for stage in split_layers([1] * CONFIGS[name].num_layers, 2):
        part = Decoder(CONFIGS[name]).eval()
        part.load_state_dict(whole.state_dict())
        received = keep_stage(part, stage)
        if received is not None:
            received.value = x
        x = part(tokens_BT)
        names += [path for path, _ in part.named_parameters(remove_duplicate=False)]
    assert sorted(names) == sorted(path for path, _ in whole.named_parameters(remove_duplicate=False))
    torch.testing.assert_close(x, whole(tokens_BT), rtol=0, atol=0)
