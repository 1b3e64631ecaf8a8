import pytest
from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.distributed.parallel.legality import check_plan_runs
from deepseek.distributed.plan import Plan
from deepseek.models.parallelizing import list_model_rows
from tests.distributed.parallel.cases import build_model


@pytest.mark.parametrize(("name", "blocks"), [("llama", "layers.*"), ("vit", "encoder.layers.*"), ("own", "")])
def test_the_rows_of_a_model_are_found_by_its_class(name, blocks):
    rows = list_model_rows(build_model(name))
    assert rows.blocks == blocks and bool(rows.tensor) == rows.parts.has_tensor_rows == (name != "own")


def test_rows_of_a_user_replace_those_that_are_known_and_cut_no_sequences():
    rows = list_model_rows(build_model("llama"), {"head": "outputs"})
    assert list(rows.tensor) == [("head", "outputs")]
    with pytest.raises(ConfigError, match="no rows say where Decoder has them"):
        check_plan_runs(Plan(tp=2, sequence_parallel=True), rows.parts)


def test_a_model_without_rows_runs_data_parallel_alone():
    parts = list_model_rows(nn.Linear(2, 2)).parts
    check_plan_runs(Plan(dp=8, zero_stage=3), parts)
    with pytest.raises(ConfigError, match=r"give rows, or use tp=1; the nearest plan that runs on 2 ranks is dp=2"):
        check_plan_runs(Plan(tp=2), parts)
