import json
from dataclasses import asdict

import pytest

from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import Plan
from deepseek.distributed.plan_files import read_plan, read_plan_settings
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search.planner import plan as search


def test_settings_on_a_line_are_a_plan():
    assert read_plan("tp=2, dp=4,zero_stage=3") == Plan(tp=2, dp=4, zero_stage=3)
    assert read_plan("sequence_parallel=true,tp=2,schedule=gpipe") == Plan(
        tp=2, sequence_parallel=True, schedule="gpipe"
    )


def test_what_is_written_is_told_from_what_is_usual(tmp_path):
    assert read_plan_settings("tp=2,precision=bf16") == {"tp": 2, "precision": "bf16"}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"best": {"plan": Plan(pp=2).as_dict()}}))
    assert read_plan_settings(str(path)) == Plan(pp=2).as_dict()


@pytest.mark.parametrize("wrap", [lambda plan: plan, lambda plan: {"plan": plan}])
def test_a_file_of_settings_is_a_plan(tmp_path, wrap):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(wrap(Plan(pp=2).as_dict())))
    assert read_plan(str(path)) == Plan(pp=2)


def test_what_a_search_prints_is_read_as_its_best_plan(tmp_path):
    found = search(get_model_shape("Llama3-8B"), Cluster.of("A100-SXM-80GB"), global_batch=16)
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found.to_dict()))
    assert asdict(read_plan(str(path))) == asdict(found.best.plan)


def test_an_unknown_setting_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown setting of a plan 'zero'; did you mean 'zero_stage'"):
        read_plan("zero=3")
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        read_plan("tp")
