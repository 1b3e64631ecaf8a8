"""Models over ranks, held against the same model in one process."""

import pytest
import torch

from deepseek.core.errors import ConfigError
from deepseek.distributed.plan import Plan
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import load_model, save_model
from deepseek.models.model_sources import LoadConfig
from deepseek.models.parallel_loading import read_inference_plan
from deepseek.models.zoo import build
from tests.distributed.ranks import run_ranks

CONFIG = DecoderConfig(vocab_size=29, num_layers=3, hidden_size=16, num_heads=4, num_kv_heads=2, ffn_size=12)
FORM = {
    "model_parallel": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "device_map": {"gpu0": [0, 1], "gpu1": [2, 3]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "decoder"
    save_model(Decoder(CONFIG), path)
    return str(path)


def answer_under(rank, folder, forms):
    """Rank by rank the largest difference from one process, and the words on how each lies."""
    tokens = torch.arange(14).view(2, 7)
    expected = load_model(folder)(tokens)
    found = []
    for form in forms:
        model = load_model(folder, **form)
        answer = model(tokens)
        assert answer.shape == expected.shape and not answer.requires_grad
        found.append((float((answer - expected).abs().max()), model.choice))
    return found


def test_two_ranks_answer_as_one_process_does(folder):
    forms = [
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"config": {"device_map": {"gpu0": [0, 1]}}},
        {"device_map": {"first": [0], "second": [1]}},
    ]
    for found in run_ranks(answer_under, 2, folder, forms):
        assert all(difference < 1e-5 for difference, _ in found)
        assert [words for _, words in found] == [f"torch, over 2 ranks ({plan})" for plan in ("tp=2", "pp=2") * 2]


def test_four_ranks_answer_under_the_form_of_the_documents(folder):
    for ((difference, words),) in run_ranks(answer_under, 4, folder, [{"config": FORM}]):
        assert difference < 1e-5 and words == "torch, over 4 ranks (tp=2 pp=2)"


@pytest.mark.parametrize(
    ("settings", "plan", "devices"),
    [
        (FORM, Plan(tp=2, pp=2), (0, 1, 2, 3)),
        ({"device_map": {"gpu0": [2, 3], "gpu1": [0, 1]}}, Plan(tp=2, pp=2), (2, 3, 0, 1)),
        ({"device_map": {"all": [0, 1, 2, 3]}, "pipeline_parallel_size": 4}, Plan(pp=4), (0, 1, 2, 3)),
        ({"tensor_parallel_size": 2, "model_parallel": {"tensor_parallel_size": 2}}, Plan(tp=2), ()),
    ],
)
def test_sizes_and_maps_say_which_plan(settings, plan, devices):
    assert read_inference_plan(LoadConfig.from_dict(settings)) == (plan, devices)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device_map": {"a": [0, 1], "b": [2]}}, "groups of 1 and 2 devices"),
        ({"tensor_parallel_size": 4, "device_map": {"a": [0, 1]}}, r"names 2 devices .* needs 4; make the two equal"),
        ({"tensor_parallel_size": 4, "model_parallel": {"tensor_parallel_size": 2}}, "say it once"),
        ({"device_map": "auto"}, "is no table of devices"),
        ({"tensor_parallel_size": 2}, "needs 2 ranks and this process is alone; start it with torchrun"),
        ({"model_parallel": {"tensor_parallel": 2}}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 2, "precision": "int8"}, "asked for in int8 and over 2 ranks"),
        ({"tensor_parallel_size": 2, "backend": "eager"}, "asked for backend 'eager' and over 2 ranks"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(folder, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_model(folder, settings)


def test_a_packed_model_is_not_spread(folder):
    with pytest.raises(ConfigError, match="asked for packed and over 2 ranks"):
        load_model(folder, tensor_parallel_size=2, packed=True)


def refuse_to_cut(rank, folder):
    with pytest.raises(ConfigError, match="needs to know which layers of ResNet to cut"):
        load_model(folder, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="needs 4 ranks and 2 were started"):
        load_model(folder, tensor_parallel_size=4)
    return True


def test_models_without_rows_and_worlds_of_another_size_are_refused(tmp_path):
    save_model(build("resnet18", width=8, num_classes=3), tmp_path / "resnet")
    assert run_ranks(refuse_to_cut, 2, str(tmp_path / "resnet")) == [True, True]
