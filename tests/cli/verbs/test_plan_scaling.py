import json

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
