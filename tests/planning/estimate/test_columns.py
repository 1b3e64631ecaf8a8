import numpy as np
import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import RECOMPUTATIONS, SCHEDULES, Plan
from deepseek.planning.estimate import columns
from deepseek.planning.estimate.columns import Columns, describe_case, describe_operators, spread_plans, stack_cases
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.machines.software import ATTENTIONS, SOFTWARE, Software
from deepseek.planning.models.model_shape import OperatorCost, OperatorList, get_model_shape

LLAMA = get_model_shape("Llama3-8B")
NODE = Cluster.of("H100-SXM-80GB")


def test_words_are_stored_as_what_formulas_compare_with():
    for index, word in enumerate(RECOMPUTATIONS):
        assert describe_case(LLAMA, NODE, Plan(dp=8, recomputation=word), 8)["recomputation"] == index
    for index, word in enumerate(SCHEDULES):
        plan = Plan(pp=8, schedule=word)
        assert describe_case(LLAMA, NODE, plan, 8)["schedule"] == index
    for index, word in enumerate(ATTENTIONS):
        assert describe_case(LLAMA, NODE, Plan(dp=8), 8, Software(word))["attention"] == index
    assert RECOMPUTATIONS[int(columns.SELECTIVE)] == "selective" and RECOMPUTATIONS[int(columns.FULL)] == "full"
    assert SCHEDULES[int(columns.GPIPE)] == "gpipe" and SCHEDULES[int(columns.ZERO_BUBBLE)] == "zero_bubble"
    assert SCHEDULES[int(columns.INTERLEAVED)] == "interleaved"
    assert ATTENTIONS[int(columns.UNFUSED)] == "unfused" and ATTENTIONS[int(columns.FLASH_3)] == "flash3"


def test_a_case_fills_every_column_but_that_of_traced_networks():
    case = describe_case(LLAMA, NODE, Plan(dp=8), 8)
    assert set(case) == columns._KNOWN_COLUMNS - {"num_parameters"}
    traced = OperatorList("net", (OperatorCost("a", 1.0, 1.0, 5),))
    operators = describe_operators(traced, NODE, Plan(dp=8), 8)
    assert set(operators) == columns._KNOWN_COLUMNS - set(columns.MODEL_COLUMNS)
    assert operators["num_parameters"] == 5


def test_every_trait_of_a_program_has_its_column():
    traits = set(Software.__dataclass_fields__) - {"attention"}
    assert set(columns.SOFTWARE_COLUMNS) == traits
    assert set(columns.PLAN_COLUMNS) <= set(Plan.__dataclass_fields__)


def test_rows_are_taken_where_columns_vary_and_constants_stay():
    table = stack_cases([describe_case(LLAMA, NODE, Plan(dp=8), batch) for batch in (8, 16, 24)])
    varied = spread_plans(LLAMA, NODE, Plan(), 8, {"tp": np.array([1.0, 2.0, 4.0])}, SOFTWARE["NeMo"])
    assert table.take(np.array([2, 0])).global_batch.tolist() == [24.0, 8.0]
    assert (varied.take(np.array([False, True, False])).tp.tolist(), len(varied.dp)) == ([2.0], 1)
    assert varied.with_columns(dp=np.array([7.0])).dp.tolist() == [7.0]
    assert varied.records_layers.tolist() == [float(SOFTWARE["NeMo"].records_layers)]


def test_a_column_that_nobody_reads_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'tp'"):
        spread_plans(LLAMA, NODE, Plan(), 8, {"tpp": np.array([1.0])})
    with pytest.raises(AssertionError, match="unknown columns"):
        Columns({"hiden": np.array([1.0])})
