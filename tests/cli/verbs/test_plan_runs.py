import csv
import json

from tests.cli.commands import assert_one_sentence

RUN = "model,seq_len,accel,n_accel,tp,pp,gbs,mbs\nLlama3-8B,8192,H100,8,2,1,16,1\n"


def test_runs_are_predicted_into_a_file_as_by_the_option_of_plan(call, tmp_path):
    runs, one, two = tmp_path / "runs.csv", tmp_path / "one.csv", tmp_path / "two.csv"
    runs.write_text(RUN, encoding="utf-8")
    assert call("plan", "runs", runs, "--out", one).status == 0
    assert call("plan", "--predict", runs, "--out", two).status == 0
    assert one.read_bytes() == two.read_bytes()
    with one.open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert 1 < float(row["predicted_iter_time_s"]) < 60


def test_json_counts_the_runs(call, tmp_path):
    runs, out = tmp_path / "runs.csv", tmp_path / "out.csv"
    runs.write_text(RUN + "Nobody-9B,8192,H100,8,2,1,16,1\n", encoding="utf-8")
    assert json.loads(call("plan", "runs", runs, "--out", out, "--json").out) == {"predicted": 1, "out": str(out)}


def test_a_file_for_the_answers_is_needed(call):
    assert_one_sentence(call("plan", "runs", "runs.csv"), 2, "--out is missing")
