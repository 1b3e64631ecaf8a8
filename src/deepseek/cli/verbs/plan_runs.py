"""`deepseek plan runs`: predicted time and memory for a table of runs that somebody else measured."""

from __future__ import annotations

from pathlib import Path

from deepseek.core.errors import ConfigError


def plan_runs(runs: Path, *, out: Path | None = None, json: bool = False) -> None:
    """Predict time and memory of every run in the CSV file RUNS; the measured columns are never read.

    One run a line. Needed columns: model (or layers, hidden, heads), seq_len, accel, n_accel, gbs. Read where they are
    there: kv_heads, ffn, vocab, accel_per_node, tp, pp, cp, ep, etp, vp, mbs, zero_stage, fsdp, act_ckpt, seq_parallel,
    schedule, precision, arch, notes, source_ref. Added: predicted_iter_time_s, predicted_mem_gb, predicted_oom, note.

    Example: deepseek plan runs runs.csv --out predicted.csv

    Parameters
    ----------
    runs
        CSV file with a header and one run a line.
    out
        CSV file for the same rows with the predictions added.
    json
        Print JSON.
    """
    predict_into(runs, out, as_json=json)


def predict_into(runs: Path, out: Path | None, *, as_json: bool = False) -> None:
    """Predict the runs of one file into another, and say how many were."""
    from deepseek.cli.screen.plans import print_json
    from deepseek.planning.published_runs import predict_file

    if out is None:
        raise ConfigError("--out is missing; say which CSV file the predictions go to")
    num_predicted = predict_file(runs, out)
    if as_json:
        print_json({"predicted": num_predicted, "out": str(out)})
    else:
        print(f"{num_predicted} runs predicted in {out}")
