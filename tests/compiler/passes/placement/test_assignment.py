"""Placements are the best there are where that is claimed, and never worse than one device."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.compiler.passes.placement.assignment import Link, TimedOperation, Workload, place, time_s
from deepseek.core.errors import ConfigError


@st.composite
def workloads(draw, max_operations=6):
    devices = ["cpu", "gpu", "npu"][: draw(st.integers(1, 3))]
    times = st.integers(0, 100)
    names, operations = ["x"], []
    for index in range(draw(st.integers(1, max_operations))):
        reads = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
        runs_on = draw(st.lists(st.sampled_from(devices), unique=True, min_size=1))
        made = [name for name in reads if name != "x"]
        beside = draw(st.none() | st.sampled_from(made)) if made else None
        cost = {device: float(draw(times)) for device in (devices if beside else runs_on)}
        operations.append(TimedOperation(f"o{index}", cost, tuple(reads), draw(st.integers(0, 50)), beside))
        names.append(f"o{index}")
    links = {
        (one, two): Link(float(draw(st.integers(0, 20))), float(draw(st.integers(1, 10))))
        for one in devices
        for two in devices
        if one != two
    }
    outputs = draw(st.dictionaries(st.sampled_from(names), st.sampled_from(devices), max_size=2))
    return Workload(tuple(operations), links, {"x": (devices[0], draw(st.integers(0, 50)))}, outputs)


def play(workload, devices):
    """Time of a placement, by playing it through with the set of places that hold each value."""
    holders = {name: [device] for name, (device, _) in workload.inputs.items()}
    sizes = {name: size for name, (_, size) in workload.inputs.items()}
    total = 0.0

    def fetch(name, device):
        if device in holders[name]:
            return 0.0
        link = workload.links[holders[name][0], device]
        holders[name].append(device)
        return link.latency_s + sizes[name] / link.bandwidth_bytes_per_s

    for operation in workload.operations:
        device = devices[operation.name]
        total += sum(fetch(name, device) for name in operation.reads) + operation.times_s[device]
        holders[operation.name], sizes[operation.name] = [device], operation.output_bytes
    return total + sum(fetch(name, device) for name, device in workload.outputs.items())


def all_placements(workload):
    for devices in product(*(operation.times_s for operation in workload.operations)):
        chosen = {each.name: device for each, device in zip(workload.operations, devices, strict=True)}
        if all(chosen[each.name] == chosen[each.beside] for each in workload.operations if each.beside):
            yield chosen


@given(workloads())
@settings(deadline=None, max_examples=100)
def test_the_placement_is_the_best_of_all(workload):
    times = [play(workload, devices) for devices in all_placements(workload)]
    if not times:
        return  # an operation must run beside another that runs elsewhere
    placement = place(workload)
    assert placement.is_exact
    assert placement.time_s == pytest.approx(min(times))
    assert play(workload, placement.devices) == pytest.approx(placement.time_s)
    assert time_s(workload, placement.devices) == pytest.approx(placement.time_s)
    assert placement.lower_bound_s == placement.time_s


@given(workloads())
@settings(deadline=None, max_examples=100)
def test_a_search_cut_short_stays_between_its_bound_and_one_device(workload):
    times = [play(workload, devices) for devices in all_placements(workload)]
    if not times:
        return
    placement = place(workload, max_states=2)
    assert placement.lower_bound_s <= min(times) + 1e-9
    assert placement.time_s >= min(times) - 1e-9
    assert play(workload, placement.devices) == pytest.approx(placement.time_s)
    assert all(placement.time_s <= alone + 1e-9 for alone in placement.single_device_time_s.values())


def test_long_chains_and_parallel_branches_are_exact():
    link = Link(1.0, 1.0)
    links = {("cpu", "gpu"): link, ("gpu", "cpu"): link}
    operations, before = [], "x"
    for index in range(100):
        left = TimedOperation(f"left{index}", {"cpu": 2.0, "gpu": 9.0}, (before,), 0)
        right = TimedOperation(f"right{index}", {"cpu": 9.0, "gpu": 2.0}, (before,), 0)
        join = TimedOperation(f"join{index}", {"cpu": 1.0, "gpu": 1.0}, (f"left{index}", f"right{index}"), 0)
        operations += [left, right, join]
        before = f"join{index}"
    placement = place(Workload(tuple(operations), links, {"x": ("cpu", 0)}, {before: "cpu"}))
    assert placement.is_exact
    assert placement.single_device_time_s == {"cpu": 1200.0, "gpu": 1202.0}
    # Each branch on its own device; one value goes over and one comes back in each round.
    assert placement.time_s == 100 * (2 + 2 + 1 + 2)


def test_one_device_is_the_floor_when_transfers_are_slow():
    slow = Link(1.0, 1e3)
    operations = (
        TimedOperation("a", {"cpu": 0.5, "gpu": 0.1}, ("x",), 8),
        TimedOperation("b", {"cpu": 0.1, "gpu": 0.5}, ("a",), 8),
    )
    workload = Workload(operations, {("cpu", "gpu"): slow, ("gpu", "cpu"): slow}, {"x": ("cpu", 8)}, {"b": "cpu"})
    placement = place(workload)
    assert placement.devices == {"a": "cpu", "b": "cpu"}
    assert placement.time_s == placement.single_device_time_s["cpu"] == 0.6
    assert "2 on cpu (the best there is); cpu alone 600 ms" in str(placement)


def test_bad_workloads_are_refused():
    link = {("a", "b"): Link(0.0, 1.0)}
    with pytest.raises(ConfigError, match="no device runs o"):
        place(Workload((TimedOperation("o", {}),), link, {}, {}))
    with pytest.raises(ConfigError, match="o reads y, which nothing before it makes"):
        place(Workload((TimedOperation("o", {"a": 1.0}, ("y",)),), link, {}, {}))
    with pytest.raises(ConfigError, match="y is wanted as a result"):
        place(Workload((TimedOperation("o", {"a": 1.0}),), link, {}, {"y": "a"}))
    with pytest.raises(ConfigError, match="from b to a and no such link"):
        place(Workload((TimedOperation("o", {"b": 1.0}),), link, {}, {"o": "a"}))
    with pytest.raises(ConfigError, match="has to run beside p, which it does not read"):
        place(Workload((TimedOperation("p", {"a": 1.0}), TimedOperation("o", {"a": 1.0}, beside="p")), link, {}, {}))
