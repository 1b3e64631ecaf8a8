"""Answers of models in pieces. That they are those of one process is in tests/models/test_parallel_loading.py."""

import pytest
import torch

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.inference import answer
from deepseek.distributed.plan import Plan
from deepseek.models.parallelizing import parallelize
from tests.distributed.parallel.cases import build_model
from tests.distributed.ranks import run_ranks


def answer_interleaved(rank):
    parallel = parallelize(build_model("deep"), Plan(pp=2, schedule="interleaved", virtual_stages=2))
    with pytest.raises(ConfigError, match="virtual_stages=2 interleaves training passes"):
        answer(parallel, torch.zeros(1, 2, dtype=torch.int64))
    return True


def test_interleaved_stages_are_refused():
    assert run_ranks(answer_interleaved, 2) == [True, True]
