import json

import pytest

from tests.cli.commands import assert_one_sentence
from tests.cli.verbs.measured_machine import save_machine


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path))
    save_machine(tmp_path)


def test_check_holds_predicted_against_measured(call, machine, corpus, monkeypatch):
    from deepseek.recipes import load_recipe

    small = load_recipe("decoder_tiny").override(
        {
            "model": {"vocab_size": 300, "num_layers": 1, "hidden_size": 32, "num_heads": 2, "max_length": 64},
            "data": {"sources": [str(corpus)], "heldout_fraction": 0.2, "vocab_size": 300, "sequence_length": 32,
                     "batch_size": 4},
        }
    )  # fmt: skip
    monkeypatch.setattr("deepseek.recipes.load_recipe", lambda name: small)
    values = json.loads(call("plan", "check", "decoder_tiny", "--steps", 6, "--json").out)
    assert values["num_steps"] == 6
    assert values["measured_s"] > 0
    assert values["measured_bytes"] >= 0
    assert values["time_ratio"] == pytest.approx(values["predicted_s"] / values["measured_s"])


def test_too_few_steps_to_check_are_refused(call, machine):
    result = call("plan", "check", "quickstart", "--steps", 2)
    assert_one_sentence(result, 2, "give at least 4")


def test_only_recipes_are_trained(call, machine):
    assert_one_sentence(call("plan", "check", "Llama3-8B"), 2, "unknown recipe 'Llama3-8B'")


def test_plans_on_ranks_are_asked_for_with_their_number(call):
    assert_one_sentence(call("plan", "check", "decoder_tiny", "--plans", 3), 2, "add --ranks 4, or leave it out")
    assert_one_sentence(call("plan", "check", "decoder_tiny", "--ranks", 1), 2, "give 2 to 64")
    assert_one_sentence(call("plan", "check", "decoder_tiny", "--ranks", 4, "--steps", 1), 2, "give at least 3")


def test_plans_on_ranks_are_shown_with_both_correlations(call, monkeypatch):
    from deepseek.bench.plan_ranking import PlanRanking, RankedPlan

    asked = {}

    def rank_plans(config, shape, **settings):
        asked.update(settings)
        return PlanRanking(4, 2, tuple(RankedPlan({}, f"dp={n}", n, n / 2, 1e9 * n, 1e9) for n in (1.0, 2.0)))

    monkeypatch.setattr("deepseek.bench.plan_ranking.rank_plans", rank_plans)
    answer = call("plan", "check", "decoder_tiny", "--ranks", 4)
    assert "Plans on 4 ranks that share 2 cores" in answer.out and "1.00 of step times" in answer.out
    assert asked == {"num_ranks": 4, "num_plans": 12, "num_steps": 4, "global_batch": 16}
    values = json.loads(call("plan", "check", "decoder_tiny", "--ranks", 4, "--plans", 2, "--json").out)
    assert values["time_correlation"] == 1.0 and len(values["rows"]) == asked["num_plans"] == 2
