"""The picture's numbers, and a page that needs nothing but itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from deepseek.train.allocations import KINDS
from deepseek.train.events import MemoryLeakSuspected
from deepseek.train.memory_page import draw_areas, render_memory
from deepseek.train.step_memory import MemoryHolder, StepMemory


def measure(num_points: int = 3) -> StepMemory:
    points = tuple((0.1 * index, (100, 0, 0, 50 * index, 0, 0)) for index in range(num_points))
    peak = points[-1][1]
    return StepMemory(
        step=3,
        duration_s=0.1 * num_points,
        peak_bytes=sum(peak),
        peak_s=points[-1][0],
        peak_by_kind=dict(zip(KINDS, peak, strict=True)),
        holders=(MemoryHolder("layers.0<b>", "activations", 100, 2, 0.1), MemoryHolder("", "parameters", 100, 1, 0.3)),
        points=points,
        phases=(("forward", 0.0), ("backward", 0.2)),
        allocator_peak_bytes=None,
    )


def heights(path: str) -> list[float]:
    """The height of an area in its corners, upper edge minus lower edge."""
    corners = [float(corner.split(",")[1]) for corner in re.findall(r"[\d.]+,[\d.]+", path)]
    half = len(corners) // 2
    return [lower - upper for upper, lower in zip(corners[:half], reversed(corners[half:]), strict=True)]


def test_areas_are_as_high_as_their_bytes() -> None:
    measured = measure()
    areas = {area.kind: heights(area.path) for area in draw_areas(measured, top_bytes=200)}
    scale = max(areas["parameters"]) / 100
    assert areas["parameters"] == pytest.approx([100 * scale] * 6, abs=0.11)
    assert areas["activations"] == pytest.approx([0, 0, 50 * scale, 50 * scale, 100 * scale, 100 * scale], abs=0.11)
    assert max(areas["temporary"]) == 0


def test_a_step_of_many_operators_is_still_a_small_page_that_shows_the_peak() -> None:
    measured = measure(20_000)
    assert len(render_memory(measured, [], [])) < 200_000
    top = max(max(heights(area.path)) for area in draw_areas(measured, measured.peak_bytes))
    assert top == pytest.approx(278 * (1 - 100 / measured.peak_bytes), abs=0.2)


class Tags(HTMLParser):
    """Counts tags that are open at the end, and collects addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_escapes_names_and_needs_nothing_else() -> None:
    leak = MemoryLeakSuspected(9, 5, 4096, ("float32[4] left by each step",), ("layers.1",))
    page = render_memory(measure(), [(5, 1000), (9, 5096)], [leak])
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and tags.addresses == [] and "http" not in page
    assert "layers.0&lt;b&gt;" in page and "outside of the model" in page
    assert "Suspected leak, steps 5 to 9: float32[4] left by each step" in page and "5.1 kB" in page
    assert "No leak was seen" in render_memory(measure(), [], [])
