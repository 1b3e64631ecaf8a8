import torch
from torch import nn

from deepseek.mixed_precision.costs import assume_saving, measure_saving

BF16 = torch.bfloat16


def test_bytes_are_those_of_the_input_and_the_result_less_the_narrow_weight():
    saving = measure_saving(nn.Linear(64, 32), (128, 64), BF16)
    assert saving.num_bytes == (128 * 64 + 128 * 32) * (4 - 2) - 64 * 32 * 2 and saving.is_measured
    picture = measure_saving(nn.Conv2d(3, 8, 3), (2, 3, 10, 10), BF16)
    assert picture.num_bytes == (2 * 3 * 100 + 2 * 8 * 64) * (4 - 2) - 8 * 3 * 9 * 2


def test_a_wide_product_is_faster_where_the_processor_has_the_instructions():
    seconds = [measure_saving(nn.Linear(512, 2048), (512, 512), BF16).seconds for _ in range(3)]
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        assert max(seconds) > 0


def test_measuring_leaves_no_trace():
    layer = nn.Linear(8, 8)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    measure_saving(layer, (4, 8), BF16)
    assert torch.equal(torch.rand(1), expected)
    assert layer.weight.grad is None and layer.weight.dtype == torch.float32


def test_a_layer_that_takes_more_than_one_tensor_is_assumed_and_says_so():
    layer = nn.Bilinear(4, 4, 2)
    assert measure_saving(layer, (3, 4), BF16) is None
    saving = assume_saving(layer, (3, 4))
    assert saving.seconds > 0 and saving.num_bytes == 2 * 12 and not saving.is_measured
