"""Graphs over devices compute the same, values go once where they are read, and one device is the floor."""

import pytest
import torch
from torch import nn

from deepseek.compiler.passes.placement.assignment import Link, TimedOperation, Workload, place
from deepseek.compiler.passes.placement.devices import (
    apply_placement,
    list_devices,
    measure_link,
    measure_workload,
    place_graph,
)
from deepseek.core.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


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


TO_DEVICE = torch.ops.aten.to.device
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


def costs(fast_on):
    """Costs under which each operator is fast on one device, as `fast_on(index)` says, and sending costs little."""

    def measure(graph_module, inputs, devices, *, output_device):
        nodes = graph_module.graph.find_nodes(op="placeholder")
        computed = [node for node in graph_module.graph.nodes if node.op == "call_function"]
        operations = tuple(
            TimedOperation(
                node.name,
                {device: 1e-3 if device == fast_on(index) else 1.0 for device in devices},
                tuple(source.name for source in node.all_input_nodes if source.op != "get_attr"),
                8,
            )
            for index, node in enumerate(computed)
        )
        links = {(one, two): Link(1e-6, 1e12) for one in devices for two in devices if one != two}
        (output,) = graph_module.graph.find_nodes(op="output")
        results = {node.name: output_device for node in output.all_input_nodes}
        return Workload(operations, links, {node.name: ("cpu", 8) for node in nodes}, results)

    return measure


def test_a_graph_is_spread_where_that_is_fastest():
    x = torch.randn(2, 3, 8, 8)
    graph_module = capture(Net(), x)
    for node in graph_module.graph.nodes:
        node.meta.pop("val", None)  # as nodes that a pass added
    placed = place_graph(graph_module, [x], ["cpu", "meta"], measure=costs(lambda index: ("cpu", "meta")[index % 2]))
    assert set(placed.placement.devices.values()) == {"cpu", "meta"}
    sent = [node.args[1].type for node in placed.graph_module.graph.find_nodes(op="call_function", target=TO_DEVICE)]
    assert "meta" in sent
    assert not any(node.target is TO_DEVICE for node in graph_module.graph.nodes)


def test_a_graph_with_transfers_in_it_computes_the_same():
    x, model = torch.randn(2, 3, 8, 8), Net()
    graph_module = capture(model, x)
    names = [node.name for node in graph_module.graph.nodes if node.op == "call_function"]
    # A second name of the processor: what is sent there stays what it is.
    placed = apply_placement(graph_module, {name: ("cpu", "cpu:1")[index % 2] for index, name in enumerate(names)})
    assert any(node.target is TO_DEVICE for node in placed.graph.nodes)
    with torch.no_grad():
        for one, two in zip(placed(x), model(x), strict=True):
            torch.testing.assert_close(one, two)


def test_one_device_alone_leaves_the_graph_as_it_is():
    x = torch.randn(2, 3, 8, 8)
    graph_module = capture(Net(), x)
    placed = place_graph(graph_module, [x], ["cpu", "meta"], measure=costs(lambda index: "cpu"))
    assert placed.graph_module is graph_module
    assert set(placed.placement.devices.values()) == {"cpu"}
    assert placed.placement.time_s <= min(placed.placement.single_device_time_s.values())
    placed = place_graph(graph_module, [x], ["cpu", "cpu:0"])
    assert placed.graph_module is graph_module and placed.placement == "everything on cpu, the only device given"


def test_a_graph_that_cannot_be_spread_says_why():
    class Branching(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    x = torch.ones(2)
    graph_module = capture(Branching(), x)
    placed = place_graph(graph_module, [x], ["cpu", "meta"])
    assert placed.graph_module is graph_module
    assert "of which another device would keep an old copy" in placed.placement


def test_a_kernel_that_a_device_lacks_leaves_its_operator_on_the_other():
    class Finding(nn.Module):
        def forward(self, x):
            return (x * 2).nonzero().sum()  # how many there are, no device without data can tell

    x = torch.eye(3)
    graph_module = capture(Finding(), x)
    workload = measure_workload(graph_module, [x], ["cpu", "meta"], links=META)
    lacking = [operation.name for operation in workload.operations if set(operation.times_s) == {"cpu"}]
    assert any("nonzero" in name for name in lacking)
    assert all(place(workload).devices[name] == "cpu" for name in lacking)


def test_a_device_that_is_not_there_is_refused_with_those_that_are():
    x = torch.randn(2, 3, 8, 8)
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match=f"device '{missing}' cannot be used here .*; choose among cpu"):
        place_graph(capture(Net(), x), [x], ["cpu", missing])
    assert list_devices()[0] == "cpu" and len(list_devices()) == 1 + torch.cuda.device_count()
