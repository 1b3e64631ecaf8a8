import random
import warnings

import numpy
import pytest
import torch

from deepseek.checkpoint.restoring import newest_valid
from deepseek.checkpoint.rng_state import RandomStateWarning, capture_rng, restore_rng
from deepseek.checkpoint.saving import save
from deepseek.core.errors import CheckpointError


def draw():
    values = [random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.randn(), *torch.randn(5).tolist()]
    if torch.cuda.is_available():
        values += torch.randn(5, device="cuda").tolist()
    return values


def test_draws_continue_where_the_checkpoint_was(tmp_path):
    draw()
    random.gauss(0, 1), numpy.random.randn()  # an odd number, so that both hold a cached second value
    save(tmp_path, 1, {"rng": capture_rng()})
    expected = [draw(), draw()]
    restore_rng(newest_valid(tmp_path).state["rng"])
    assert [draw(), draw()] == expected


def test_another_number_of_cuda_devices_is_said():
    state = capture_rng() | {"cuda": [torch.get_rng_state()] * (torch.cuda.device_count() + 1)}
    if torch.cuda.is_available():
        state["cuda"][:-1] = torch.cuda.get_rng_state_all()
    expected = draw()
    restored = capture_rng()
    with pytest.warns(RandomStateWarning, match="will not be bit-equal"):
        restore_rng(state)
    assert draw() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore_rng(restored)


def test_a_state_with_a_generator_missing_is_refused():
    state = capture_rng()
    del state["numpy"]
    with pytest.raises(CheckpointError, match=r"lacks \['numpy'\]"):
        restore_rng(state)
