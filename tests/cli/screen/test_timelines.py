from xml.etree import ElementTree

import pytest

from deepseek.cli.screen.timelines import plot_plan, plot_svg
from deepseek.core.errors import ConfigError
from deepseek.planning.estimate.simulation import StageWork, simulate
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.model_shape import get_model_shape
from deepseek.planning.search.planner import plan_request
from deepseek.planning.search.request import Request, Space

SVG = "{http://www.w3.org/2000/svg}"
REQUEST = Request(get_model_shape("Llama3-8B"), Cluster.of("A100-SXM-80GB"), 16, space=Space(pp=(2,)))


def test_every_pass_is_a_box_as_long_as_it_takes_at_its_time():
    timeline = simulate("zero_bubble", [StageWork(1.0, 2.0, 1.0)] * 3, 4)
    drawing = ElementTree.fromstring(plot_svg(timeline, "a < b"))
    boxes = [box for box in drawing.iter(f"{SVG}rect") if box.find(f"{SVG}title") is not None]
    assert len(boxes) == len(timeline.events)
    widths = {round(float(box.get("width")), 1) for box in boxes}
    assert len(widths) == 1  # forward, input gradient and weight gradient take one second each
    ends = max(float(box.get("x")) + float(box.get("width")) for box in boxes)
    starts = min(float(box.get("x")) for box in boxes)
    assert (ends - starts) / widths.pop() == pytest.approx(timeline.step_time_s, rel=0.01)
    assert "a < b" in [text.text for text in drawing.iter(f"{SVG}text")]


def test_a_plan_is_plotted_by_the_ending_of_the_file(tmp_path):
    result = plan_request(REQUEST)
    for ending, start in ((".png", b"\x89PNG"), (".html", b"<!doctype html>"), (".svg", b"<svg")):
        path = tmp_path / f"plan{ending}"
        plot_plan(REQUEST, result, path)
        assert path.read_bytes().startswith(start)
    with pytest.raises(ConfigError, match="choose one of these endings"):
        plot_plan(REQUEST, result, tmp_path / "plan.gif")
