import csv
from pathlib import Path

import pytest

from benchmarks.planner_fit import load_runs, select_timed
from deepseek.core.errors import ConfigError, StorageError
from deepseek.planning.published_runs import (
    MEASURED_COLUMNS,
    PREDICTED_COLUMNS,
    predict_file,
    predict_runs,
    read_run,
)

ROW = {
    "source_id": "somebody", "row_id": "1", "source_ref": "Megatron-LM, 2024", "model": "Llama3-8B", "arch": "dense",
    "seq_len": "8192", "accel": "H100-SXM-80GB", "n_accel": "16", "accel_per_node": "8", "tp": "2", "pp": "1",
    "cp": "1",
    "mbs": "1", "gbs": "64", "precision": "bf16", "iter_time_s": "3.0", "mem_gb": "60", "oom": "", "mfu_pct": "40",
}  # fmt: skip
DATA = Path(__file__).parents[2] / "benchmarks" / "data" / "planner_runs.csv"


def test_measured_columns_are_never_read():
    rows = [each.row for each in load_runs()][::7]
    blank = [{key: "" if key in MEASURED_COLUMNS else value for key, value in row.items()} for row in rows]
    wrong = [{key: "1e9" if key in MEASURED_COLUMNS else value for key, value in row.items()} for row in rows]
    answers = [
        [{name: row[name] for name in PREDICTED_COLUMNS} for row in predict_runs(each)] for each in (rows, blank, wrong)
    ]
    assert answers[0] == answers[1] == answers[2]
    assert sum(bool(row["predicted_iter_time_s"]) for row in answers[0]) > 200


def test_a_row_is_answered_with_time_memory_and_what_was_assumed():
    (answer,) = predict_runs([ROW])
    assert 1 < float(answer["predicted_iter_time_s"]) < 10
    assert 20 < float(answer["predicted_mem_gb"]) < 80
    assert answer["predicted_oom"] == "0"
    assert answer["note"].startswith("assumed: ")
    assert "none recomputation" in answer["note"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accel": "H100-SMX-80GB"}, "unknown accelerator 'H100-SMX-80GB'; did you mean 'H100-SXM-80GB'"),
        ({"gbs": ""}, "gbs is missing"),
        ({"n_accel": "zwei"}, "n_accel='zwei' is not a number"),
        ({"n_accel": "0"}, "n_accel='0' is not a positive whole number"),
        ({"tp": "3"}, "tp*pp*cp = 3 does not divide the 16 devices"),
        ({"model": "Nobody-9B"}, "the sizes of model 'Nobody-9B' are missing"),
        ({"arch": "cnn"}, "needs a traced operator list"),
    ],
)
def test_a_row_that_cannot_be_predicted_says_why(change, words):
    (answer,) = predict_runs([{**ROW, **change}])
    assert answer["predicted_iter_time_s"] == answer["predicted_mem_gb"] == answer["predicted_oom"] == ""
    assert answer["note"].startswith("not predicted: ")
    assert words in answer["note"]


def test_one_bad_row_leaves_the_others_alone():
    alone, beside = predict_runs([ROW])[0], predict_runs([{**ROW, "gbs": ""}, ROW])[1]
    assert alone == beside


def test_a_run_that_does_not_fit_is_called_out_of_memory():
    (answer,) = predict_runs([{**ROW, "model": "Llama3-70B", "act_ckpt": "full"}])
    assert answer["predicted_oom"] == "1"


def test_without_a_word_on_recomputation_the_least_that_fits_is_assumed():
    roomy, tight = (read_run({**ROW, "mbs": mbs}) for mbs in ("1", "8"))
    assert roomy.plan.recomputation == "none"
    assert tight.plan.recomputation in ("selective", "full")


def test_the_network_is_read_where_the_row_states_it():
    stated = read_run({**ROW, "notes": "inter-node 800 Gb/s per node (4xHDR)"})
    assert stated.cluster.network.bandwidth_bytes_per_s == 800e9 / 8 / 8
    assert read_run(ROW).cluster.network.bandwidth_bytes_per_s == 400e9 / 8


def test_recipes_overlap_the_exchange_of_experts_that_span_boxes():
    row = {"source_ref": "Megatron-Bridge, container 26.04", "model": "Qwen3_235B_a22B", "accel": "H100-SXM-80GB",
           "n_accel": "256", "gbs": "8192", "mbs": "1", "seq_len": "4096", "tp": "2", "pp": "8", "ep": "32", "vp": "4",
           "precision": "fp8", "arch": "moe"}  # fmt: skip
    overlaps = lambda **change: read_run({**row, **change}).software.overlaps_experts  # noqa: E731
    assert overlaps()
    assert not overlaps(ep="8") and not overlaps(vp="1") and not overlaps(source_ref="Megatron-Bridge, container 25.09")


def test_without_a_word_on_the_plan_the_fastest_number_of_tensor_ranks_is_assumed():
    row = {"source_ref": "MaxText", "model": "GPT3-175B", "accel": "TPU-v5p", "n_accel": "512", "gbs": "2048",
           "seq_len": "2048", "precision": "bf16", "vocab": "51200"}  # fmt: skip
    run = read_run(row)
    assert run.plan.zero_stage == 3 and run.plan.tp * run.plan.dp == 512 and run.plan.tp > 1
    assert f"{run.plan.tp} tensor ranks" in run.assumptions
    chosen, alone = (float(row["predicted_iter_time_s"]) for row in predict_runs([row, {**row, "tp": "1"}]))
    assert chosen < alone
    assert read_run({**row, "tp": "1"}).plan.tp == 1


def test_a_file_is_predicted_whole(tmp_path):
    target = tmp_path / "predicted.csv"
    count = predict_file(DATA, target)
    with target.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(DATA.read_text(encoding="utf-8").splitlines()) - 1
    assert count == sum(bool(row["predicted_iter_time_s"]) for row in rows) > 1700
    assert all(row["note"].startswith("not predicted: ") for row in rows if not row["predicted_iter_time_s"])


def test_a_file_without_rows_is_refused(tmp_path):
    empty = tmp_path / "empty.csv"
    empty.write_text("model,gbs\n")
    with pytest.raises(ConfigError, match="holds no runs"):
        predict_file(empty, tmp_path / "out.csv")
    with pytest.raises(StorageError):
        predict_file(tmp_path / "missing.csv", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_shipped_constants_predict_published_runs():
    runs = select_timed(load_runs())[::3]
    answers = predict_runs([each.row for each in runs])
    errors = sorted(
        abs(float(answer["predicted_iter_time_s"]) / float(each.row["iter_time_s"]) - 1)
        for each, answer in zip(runs, answers, strict=True)
    )
    assert errors[len(errors) // 2] < 0.08
    assert errors[int(0.9 * len(errors))] < 0.25


def test_a_file_that_is_not_there_is_not_called_unwritable(tmp_path):
    with pytest.raises(StorageError, match=r"runs\.csv does not exist; give a CSV file"):
        predict_file(tmp_path / "runs.csv", tmp_path / "out.csv")
