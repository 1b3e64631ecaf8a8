import pytest

from deepseek.compiler.dynamic_shapes.buckets import SYMBOLIC, Cost
from deepseek.compiler.dynamic_shapes.length_policy import CompilationState, LengthPlanner, Piece

COST = Cost(overhead=1e-3, token=1e-4, pair=0.0)


def arrive(planner, lengths, *, num_calls=1):
    for _ in range(num_calls):
        planner.counts.calls += 1
        planner.counts.pieces += 1
        planner.count(lengths, len(lengths) * max(lengths))


def look(seconds=1.0, num_left=6, ways=()):
    return lambda: CompilationState(num_left, frozenset(ways), seconds)


def play_trial(planner, *, static_s, symbolic_s, compiled):
    """Run pieces of one row until the trial ends; returns the ways that were run."""
    ways = []
    while planner.trial is not None:
        longest = planner.trial.boundary
        length, way = planner.find_way(longest)
        ways.append(way)
        seconds = symbolic_s if way == SYMBOLIC else static_s
        planner.note(Piece(1, length, longest, way), seconds, compiled)
    return ways


def start_trial(*, piece_s=0.5, compile_s=1.0):
    """A planner that has seen enough, ran long enough and is trying a boundary."""
    planner = LengthPlanner("auto", cost=COST)
    arrive(planner, [10, 30, 60], num_calls=80)
    for length in (10, 30, 60):
        planner.note(Piece(1, length, length, SYMBOLIC), piece_s, look())
    planner.plan(look(compile_s))
    return planner


def test_given_boundaries_stay_and_longer_pieces_run_with_symbols():
    planner = LengthPlanner("bucketed", boundaries=(16, 8))
    arrive(planner, [5, 12], num_calls=600)
    planner.plan(look())
    assert planner.boundaries == (8, 16)
    assert [planner.find_way(length) for length in (1, 8, 9, 17)] == [(8, 8), (8, 8), (16, 16), (17, SYMBOLIC)]


def test_symbols_never_become_boundaries_and_a_length_of_one_is_avoided():
    planner = LengthPlanner("symbolic", cost=COST)
    arrive(planner, [5, 12], num_calls=600)
    planner.plan(look())
    assert planner.boundaries == ()
    assert planner.find_way(1) == (2, SYMBOLIC)


def test_bucketed_plans_after_some_calls_and_moves_when_lengths_do():
    planner = LengthPlanner("bucketed", cost=COST)
    arrive(planner, [50], num_calls=15)
    planner.plan(look(1e-3))
    assert planner.boundaries == ()
    arrive(planner, [50])
    planner.plan(look(1e-3))
    assert planner.boundaries == (50,)
    arrive(planner, [10], num_calls=200)
    planner.plan(look(1e-3, ways=(50,)))
    assert planner.boundaries == (50,)  # a plan stays for a while
    arrive(planner, [10], num_calls=5000)
    planner.plan(look(1e-3, ways=(50,)))
    assert planner.boundaries == (10, 50)


def test_without_room_for_compilations_nothing_is_planned():
    planner = LengthPlanner("bucketed", cost=COST)
    arrive(planner, [10], num_calls=50)
    planner.plan(look(num_left=0))
    assert planner.boundaries == ()


def test_a_trial_waits_until_compiling_is_cheap_beside_running():
    assert start_trial(piece_s=0.01, compile_s=5.0).trial is None
    assert start_trial(piece_s=0.5, compile_s=1.0).trial is not None


def test_a_trial_takes_turns_and_adopts_a_boundary_that_is_faster():
    planner = start_trial()
    boundaries = planner.trial.boundaries
    ways = play_trial(planner, static_s=0.5, symbolic_s=1.0, compiled=look(1e-6))
    assert [way == SYMBOLIC for way in ways[:4]] == [True, False, True, False]
    assert planner.boundaries == boundaries
    assert "2.00 times" in planner.reason


@pytest.mark.parametrize(("static_s", "compile_s", "words"), [(0.95, 1e-6, "1.05 times"), (0.5, 1e6, "would win")])
def test_a_boundary_that_does_not_pay_is_given_up_for_good(static_s, compile_s, words):
    planner = start_trial(compile_s=1e-6)
    assert len(planner.trial.boundaries) == 3
    play_trial(planner, static_s=static_s, symbolic_s=1.0, compiled=look(compile_s))
    assert planner.boundaries == ()
    assert words in planner.reason
    arrive(planner, [10, 30, 60], num_calls=100)
    planner.plan(look(1e-6))
    assert planner.trial is None


def test_the_cost_is_fitted_to_what_pieces_took():
    planner = LengthPlanner("symbolic")
    assert not planner.has_cost
    for index in range(64):
        rows, length = 1 + index % 4, 8 + 8 * (index % 7)
        planner.note(Piece(rows, length, length, SYMBOLIC), COST(rows, length), look())
    planner.plan(look())
    assert planner.has_cost
    assert planner.group_cost(4, 64) == pytest.approx(COST(4, 64), rel=0.02)


def test_positions_are_counted():
    planner = LengthPlanner("symbolic")
    arrive(planner, [3, 5])
    assert (planner.counts.real, planner.counts.arrived, dict(planner.counts.lengths)) == (8, 10, {3: 1, 5: 1})
