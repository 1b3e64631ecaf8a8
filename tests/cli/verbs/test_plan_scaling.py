import json

import pytest

from tests.cli.commands import assert_one_sentence


def test_a_scaling_curve_prints_its_assumptions(call):
    result = call("plan", "scaling", "hierarchical-all-reduce")
    assert result.status == 0
    assert "predicted:" in result.out
    assert "latencies" in result.out
    assert json.loads(call("plan", "scaling", "bert-large", "--json").out)["name"] == "bert-large"


def test_several_curves_are_printed_in_their_order_for_the_cluster_that_is_asked_for(call):
    result = call("plan", "scaling", "bert-large", "hierarchical-all-reduce", "--cluster", "dgx-h100", "--json")
    curves = [json.loads(line) for line in result.out.splitlines()]
    assert [curve["name"] for curve in curves] == ["bert-large", "hierarchical-all-reduce"]
    assert all("H100-SXM-80GB" in curve["assumptions"][0] for curve in curves)


def test_a_curve_that_does_not_exist_is_refused_before_any_is_printed(call):
    result = call("plan", "scaling", "bert-large", "strong")
    assert result.out == ""
    assert_one_sentence(result, 2, "unknown scaling curve")


def test_a_model_is_scaled_itself_and_drawn(call, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "scaling.png"
    arguments = ("--cluster", "v100", "--nodes", "4, 1", "--picture", str(picture), "--json")
    curve = json.loads(call("plan", "scaling", "meta-llama/Llama-3-8B", *arguments).out)
    assert [row[:2] for row in curve["rows"]] == [[1, 8], [4, 32]]
    assert any("precision: fp16" in sentence for sentence in curve["assumptions"])  # Volta has no bf16
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("weak-scaling", "--picture", "a.png"), "are for models; name one"),
        (("Llama3-8B", "--picture", "a.bmp"), "a.bmp is no .png file"),
        (("Llama3-8B", "--nodes", "1-8"), "write for example 1,2,4,8"),
        (("Llama3-8B", "--nodes", "0"), "write for example 1,2,4,8"),
    ],
)
def test_what_a_curve_cannot_follow_is_refused(call, arguments, said):
    assert_one_sentence(call("plan", "scaling", *arguments), 2, said)
