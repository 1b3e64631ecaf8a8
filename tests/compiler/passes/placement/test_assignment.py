"""Placements are the best there are where that is claimed, never worse than one device, and compute the same."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek.compiler.passes.placement.assignment import Link, Operation, Workload, place, time_s
from deepseek.compiler.passes.placement.devices import apply_placement, measure_link, measure_workload
from deepseek.core.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

# The policy


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
        operations.append(Operation(f"o{index}", cost, tuple(reads), draw(st.integers(0, 50)), beside))
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
        left = Operation(f"left{index}", {"cpu": 2.0, "gpu": 9.0}, (before,), 0)
        right = Operation(f"right{index}", {"cpu": 9.0, "gpu": 2.0}, (before,), 0)
        join = Operation(f"join{index}", {"cpu": 1.0, "gpu": 1.0}, (f"left{index}", f"right{index}"), 0)
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
        Operation("a", {"cpu": 0.5, "gpu": 0.1}, ("x",), 8),
        Operation("b", {"cpu": 0.1, "gpu": 0.5}, ("a",), 8),
    )
    workload = Workload(operations, {("cpu", "gpu"): slow, ("gpu", "cpu"): slow}, {"x": ("cpu", 8)}, {"b": "cpu"})
    placement = place(workload)
    assert placement.devices == {"a": "cpu", "b": "cpu"}
    assert placement.time_s == placement.single_device_time_s["cpu"] == 0.6
    assert "2 on cpu (the best there is); cpu alone 600 ms" in str(placement)


def test_bad_workloads_are_refused():
    link = {("a", "b"): Link(0.0, 1.0)}
    with pytest.raises(ConfigError, match="no device runs o"):
        place(Workload((Operation("o", {}),), link, {}, {}))
    with pytest.raises(ConfigError, match="o reads y, which nothing before it makes"):
        place(Workload((Operation("o", {"a": 1.0}, ("y",)),), link, {}, {}))
    with pytest.raises(ConfigError, match="y is wanted as a result"):
        place(Workload((Operation("o", {"a": 1.0}),), link, {}, {"y": "a"}))
    with pytest.raises(ConfigError, match="from b to a and no such link"):
        place(Workload((Operation("o", {"b": 1.0}),), link, {}, {"o": "a"}))
    with pytest.raises(ConfigError, match="has to run beside p, which it does not read"):
        place(Workload((Operation("p", {"a": 1.0}), Operation("o", {"a": 1.0}, beside="p")), link, {}, {}))


# Graphs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        y = torch.relu(self.norm(self.one(x)))
        return self.two(y.mean((2, 3)) + torch.ones(4, device=x.device)), y.sum()


def capture(model, *inputs):
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs).run_decompositions().module()


META = {("cpu", "meta"): Link(0.0, 1e12), ("meta", "cpu"): Link(1e3, 1.0)}


def test_every_operator_of_a_graph_is_timed_on_every_device():
    x = torch.randn(2, 3, 8, 8)
    graph_module = capture(Net(), x)
    workload = measure_workload(graph_module, [x], ["cpu", "meta"], links=META)
    computed = [node.name for node in graph_module.graph.nodes if node.op == "call_function"]
    assert [each.name for each in workload.operations] == computed
    assert all(each.times_s["cpu"] > 0 and each.times_s["meta"] > 0 for each in workload.operations)
    assert workload.inputs == {"x": ("cpu", x.nbytes)}
    assert set(workload.outputs.values()) == {"cpu"}
    placement = place(workload)
    assert set(placement.devices.values()) == {"cpu"}  # nothing comes back from meta in time


def test_a_graph_on_one_device_computes_the_same():
    x = torch.randn(2, 3, 8, 8)
    model = Net()
    graph_module = capture(model, x)
    names = [node.name for node in graph_module.graph.nodes if node.op == "call_function"]
    placed = apply_placement(graph_module, dict.fromkeys(names, "cpu"))
    with torch.no_grad():
        for one, two in zip(placed(x), model(x), strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("num_first", [0, 3, 6])
def test_values_and_weights_go_where_they_are_read_and_go_once(num_first):
    x = torch.randn(2, 3, 8, 8)
    graph_module = capture(Net(), x)
    names = [node.name for node in graph_module.graph.nodes if node.op == "call_function"]
    devices = {name: "cpu" if index < num_first else "meta" for index, name in enumerate(names)}
    placed = apply_placement(graph_module, devices, output_device="meta")
    assert [each.device.type for each in placed(x)] == ["meta", "meta"]
    sent = [node for node in placed.graph.nodes if node.target is torch.ops.aten.to.device]
    assert len({(node.args[0], node.args[1]) for node in sent}) == len(sent)
    for node in placed.graph.nodes:
        if node.name in devices:
            read = [each for each in node.all_input_nodes if each.op == "get_attr"]
            assert all(getattr(placed, each.target).device.type == devices[node.name] for each in read)


def test_a_graph_that_writes_in_place_is_refused():
    class Writing(nn.Module):
        def forward(self, x):
            y = x * 2
            y.add_(1)
            return y

    with torch.no_grad():
        graph_module = torch.export.export(Writing(), (torch.ones(2),)).module()
    with pytest.raises(ConfigError, match=r"add_ may write .* run_decompositions\(\)"):
        measure_workload(graph_module, [torch.ones(2)], ["cpu"])
    with pytest.raises(ConfigError, match="add_ may write"):
        apply_placement(graph_module, {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_together_compute_the_same_and_are_no_slower_than_predicted_alone():
    x = torch.randn(8, 3, 64, 64)
    model = Net()
    graph_module = capture(model, x)
    workload = measure_workload(graph_module, [x], ["cpu", "cuda"])
    assert measure_link("cpu", "cuda").bandwidth_bytes_per_s > 1e8
    placement = place(workload)
    assert placement.time_s <= min(placement.single_device_time_s.values())
    for devices in (
        placement.devices,
        {name: ("cuda" if each % 2 else "cpu") for each, name in enumerate(placement.devices)},
    ):
        placed = apply_placement(graph_module, devices)
        with torch.no_grad():
            for one, two in zip(placed(x), model(x), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
