"""Orders of steps are the best there are, and writing in place is safe."""

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.compiler.passes.memory.ordering import (
    BufferGraph,
    GraphStep,
    arrange,
    find_peak,
    profile,
    reorder,
    reuse,
)
from deepseek.core.errors import ConfigError


@st.composite
def graphs(draw, max_steps=6):
    """Random graphs: each step makes a buffer and reads some that were made before."""
    num_steps = draw(st.integers(1, max_steps))
    steps, sizes = [], {"given": 50}
    for index in range(num_steps):
        reads = draw(st.sets(st.sampled_from(["given", *(f"b{each}" for each in range(index))]), max_size=2))
        follows = draw(st.sets(st.sampled_from([f"s{each}" for each in range(index)]), max_size=1)) if index else set()
        sizes[f"b{index}"] = draw(st.sampled_from([0, 1, 1, 5, 5, 13]))
        scratch = draw(st.integers(0, 10))
        overwrites = tuple(sorted(reads))
        steps.append(GraphStep(f"s{index}", frozenset(reads), (f"b{index}",), frozenset(follows), scratch, overwrites))
    kept = draw(st.sets(st.sampled_from(sorted(sizes)), min_size=1))
    return BufferGraph(tuple(steps), sizes, frozenset({"given"}), frozenset(kept))


def simulate(graph, reused=None):
    """The peak, by playing the steps through: a set of what is there, looked at after every step."""
    place, peak = {}, 0
    alive = set()
    for index, step in enumerate(graph.steps):
        for buffer in step.creates:
            source = (reused or {}).get(step.name)
            place[buffer] = place.get(source, source) if source else buffer
            alive.add(place[buffer])
        peak = max(peak, sum(graph.sizes_bytes[each] for each in alive) + step.scratch_bytes)
        later = {place.get(each, each) for rest in graph.steps[index + 1 :] for each in rest.reads}
        alive = {each for each in alive if each in later or each in {place.get(kept, kept) for kept in graph.kept}}
    return peak


def possible_orders(graph):
    names = [step.name for step in graph.steps]
    for order in permutations(names):
        try:
            yield arrange(graph, order)
        except ConfigError:
            continue


@given(graphs())
@settings(deadline=None, max_examples=150)
def test_the_order_found_is_the_best_of_all(graph):
    order = reorder(graph)
    assert order.is_optimal
    assert order.peak_bytes == min(simulate(each) for each in possible_orders(graph))
    assert simulate(arrange(graph, order.names)) == order.peak_bytes


@given(graphs(max_steps=8))
@settings(deadline=None, max_examples=150)
def test_a_search_cut_short_is_no_worse_than_the_order_given(graph):
    order = reorder(graph, max_states=1)
    assert simulate(arrange(graph, order.names)) == order.peak_bytes <= simulate(graph)


@given(graphs(max_steps=10))
@settings(deadline=None, max_examples=150)
def test_the_profile_is_what_playing_the_steps_gives(graph):
    assert find_peak(graph) == simulate(graph) == max(profile(graph))


@given(graphs(max_steps=10))
@settings(deadline=None, max_examples=150)
def test_a_buffer_is_overwritten_only_after_its_last_reader(graph):
    reused = reuse(graph)
    place = {step.name: index for index, step in enumerate(graph.steps)}
    for name, buffer in reused.items():
        assert buffer not in graph.given | graph.kept
        assert graph.sizes_bytes[buffer] == graph.sizes_bytes[graph.steps[place[name]].creates[0]]
        assert not any(buffer in step.reads for step in graph.steps[place[name] + 1 :])
    assert find_peak(graph, reused) == simulate(graph, reused) <= find_peak(graph)


def test_long_chains_with_branches_are_solved_exactly():
    steps, sizes = [GraphStep("start", creates=("x0",))], {"x0": 4}
    for index in range(200):
        wide, thin, out = f"wide{index}", f"thin{index}", f"x{index + 1}"
        sizes |= {wide: 100, f"other{index}": 100, thin: 1, f"slim{index}": 1, out: 4}
        source = frozenset({f"x{index}"})
        steps += [
            GraphStep(f"a{index}", source, (wide,)),
            GraphStep(f"b{index}", source, (f"other{index}",)),
            GraphStep(f"c{index}", frozenset({wide}), (thin,)),
            GraphStep(f"d{index}", frozenset({f"other{index}"}), (f"slim{index}",)),
            GraphStep(f"e{index}", frozenset({thin, f"slim{index}"}), (out,)),
        ]
    order = reorder(BufferGraph(tuple(steps), sizes, kept=frozenset({"x200"})))
    assert order.is_optimal
    assert find_peak(BufferGraph(tuple(steps), sizes)) == 204
    assert order.peak_bytes == 4 + 100 + 1


def test_an_order_that_breaks_a_dependence_is_refused():
    graph = BufferGraph((GraphStep("a", creates=("x",)), GraphStep("b", frozenset({"x"}))), {"x": 1})
    with pytest.raises(ConfigError, match="step b is put before a"):
        arrange(graph, ["b", "a"])
    with pytest.raises(ConfigError, match="1 steps were ordered and the graph has 2"):
        arrange(graph, ["a"])


def test_steps_in_a_circle_have_no_order():
    steps = (GraphStep("a", follows=frozenset({"b"})), GraphStep("b", follows=frozenset({"a"})))
    with pytest.raises(ConfigError, match="circle"):
        reorder(BufferGraph(steps, {}))
