"""What a stage holds, and what stands where others are. Numbers are in test_parity.py."""

import torch

from deepseek.distributed.parallel.pipeline import PipelineStage, Received, TakenOut


def test_a_stage_knows_its_layers_and_its_place():
    stage = PipelineStage(1, 3, 2, 4, 6)
    assert [layer for layer in range(6) if stage.holds(layer)] == [2, 3]
    assert not stage.is_first and not stage.is_last


def test_what_stands_for_a_layer_hands_its_input_on():
    x = torch.ones(2)
    received = Received()
    received.value = x
    assert TakenOut()(x, None, key=1) is x and received(torch.zeros(1), key=1) is x
