import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek.core.errors import ConfigError
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import save_model
from deepseek.nn.moe import MoEConfig
from deepseek.planning.machines.cluster import Cluster
from deepseek.planning.models.from_module import read_module, trace_operators
from deepseek.planning.naming import find_model
from deepseek.planning.search.planner import plan


class Bottleneck(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        wide = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide),
        )  # fmt: skip
        is_same = channels == wide and stride == 1
        skip = nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))
        self.skip = nn.Identity() if is_same else skip

    def forward(self, x):
        return F.relu(self.body(x) + self.skip(x))


def build_resnet50():
    layers = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for depth, width, stride in ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)):
        for index in range(depth):
            layers.append(Bottleneck(channels, width, stride if index == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


@pytest.fixture(scope="module")
def resnet():
    with torch.device("meta"):
        return trace_operators(build_resnet50(), torch.zeros(1, 3, 224, 224), name="ResNet-50")


def test_a_convolutional_net_has_its_published_size(resnet):
    assert resnet.num_parameters == 25_557_032
    assert resnet.flops / 2 == pytest.approx(
        4.09e9, rel=0.005
    )  # multiply-adds of He et al. 2015 with stride in the 3x3
    assert sum(each.is_matmul for each in resnet.operators) == 53 + 1


def test_what_backward_needs_is_what_torch_saves():
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 32, bias=False))
    traced = trace_operators(model, torch.zeros(1, 64), dtype=torch.float32)
    assert sum(each.kept_bytes for each in traced.operators) == 4 * (64 + 128)  # the input, and what comes out of ReLU
    assert traced.flops == 2 * (64 * 128 + 128 * 32)


def test_a_traced_net_can_be_planned(resnet):
    found = plan(resnet, Cluster.of("A100-SXM-80GB"), global_batch=2048)
    per_device = 2048 / found.best.step_time_s / 8
    assert 1000 < per_device < 5000  # images a second: NVIDIA reports about 2,500 to 3,000 with fused kernels


def test_shared_weights_count_once():
    model = Decoder(DecoderConfig(vocab_size=512, num_layers=2, hidden_size=64, max_length=64))
    traced = trace_operators(model, torch.zeros(1, 32, dtype=torch.long))
    assert traced.num_parameters == sum(each.numel() for each in model.parameters())


def test_tracing_leaves_the_module_alone():
    model = nn.BatchNorm2d(3)
    trace_operators(model, torch.ones(2, 3, 4, 4))
    assert model.running_mean.device.type == "cpu"
    assert float(model.running_mean.abs().sum()) == 0


@pytest.mark.parametrize("moe", [None, MoEConfig(num_experts=4, top_k=2, ffn_size=32)], ids=["dense", "experts"])
def test_a_decoder_is_read_from_its_configuration(moe):
    model = Decoder(DecoderConfig(vocab_size=512, num_layers=2, hidden_size=64, ffn_size=96, max_length=64, moe=moe))
    shape = read_module(model, sequence=48)
    assert shape.sequence == 48
    assert shape.experts == (4 if moe else 0)
    assert shape.num_parameters == pytest.approx(sum(each.numel() for each in model.parameters()), rel=0.02)


def test_an_artifact_is_read_from_its_manifest(tmp_path):
    model = Decoder(DecoderConfig(vocab_size=300, num_layers=2, hidden_size=64, ffn_size=96, max_length=64))
    save_model(model, tmp_path / "artifact")
    assert find_model(str(tmp_path / "artifact")).layers == 2


def test_modules_that_say_nothing_of_themselves_are_refused():
    with pytest.raises(ConfigError, match="trace it with trace_operators"):
        read_module(nn.Linear(2, 2))


def test_a_configuration_that_is_not_the_modules_is_refused():
    model = Decoder(DecoderConfig(vocab_size=300, num_layers=2, hidden_size=64, max_length=64))
    model.config = DecoderConfig(vocab_size=300, num_layers=3, hidden_size=64, max_length=64)
    with pytest.raises(ConfigError, match="its configuration reads as"):
        read_module(model)


class LooksAtValues(nn.Module):
    def forward(self, x):
        return x[: int(x.sum())]


def test_a_module_that_looks_at_values_cannot_be_traced():
    with pytest.raises(ConfigError, match="cannot be traced without values"):
        trace_operators(LooksAtValues(), torch.ones(4))
