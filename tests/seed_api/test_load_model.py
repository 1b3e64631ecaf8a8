"""`load_model` as the documents write it: a name, a dict, `BackendSelector.AUTO`; and every kind of source."""

import warnings

import pytest
import torch
import transformers

import deepseek as ds
from deepseek import BackendSelector, load_model
from tests.models import minilm

SMALL = {"overrides": {"width": 8, "num_classes": 10}, "shapes": {"images": [2, 3, 64, 64]}, "time_budget_s": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path / "cache"))


def quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights, and fp16 on a CPU: both are tested below
        return load_model(*arguments, **options)


@pytest.mark.slow
def test_the_call_of_the_documents_runs_as_it_is_written():
    model = quietly("resnet50", {"precision": "fp16", "batch_size": 64, "backend": BackendSelector.AUTO})
    logits = model(torch.randn(64, 3, 224, 224))
    assert logits.shape == (64, 1000) and torch.isfinite(logits).all()
    assert "resnet50" in model.explain()


def test_the_same_call_on_a_narrow_resnet_is_right_and_says_why():
    config = {"precision": "fp16", "batch_size": 2, "backend": BackendSelector.AUTO} | SMALL
    model = quietly("resnet50", config)
    (images,) = model.sample_inputs
    with torch.inference_mode():
        expected = model.module.float()(images)
    assert float((model(images).float() - expected).norm() / expected.norm()) < 0.1
    said = model.explain()
    assert "random weights" in said and "eager FP32" in said and "refused" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_fp16_on_a_cpu_is_never_silent():
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU computes in fp16")
    config = {"precision": "fp16", "backend": BackendSelector.AUTO} | SMALL
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load_model("resnet18", config)
    messages = [str(each.message) for each in seen if each.filename == __file__]
    assert any("bf16 is used instead" in each for each in messages)
    assert any("random weights" in each for each in messages)


def test_without_a_backend_it_is_the_module_that_can_be_trained():
    with pytest.warns(UserWarning, match="random weights"):
        model = load_model("resnet18", {"overrides": SMALL["overrides"]})
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.conv1.weight.grad is not None


def test_hardware_that_is_absent_is_refused_with_what_would_be_needed():
    for backend in (BackendSelector.ROCM, BackendSelector.GAUDI, BackendSelector.ASCEND):
        with pytest.raises(ds.core.errors.DeepSeekError, match="needs"):
            quietly("resnet18", {"backend": backend} | SMALL)


def test_a_hugging_face_folder_of_the_bert_family_loads():
    model = load_model(minilm.find_folder())
    theirs = transformers.AutoModel.from_pretrained(minilm.find_folder())
    tokens, mask = torch.tensor([[101, 7592, 2088, 102]]), torch.ones(1, 4, dtype=torch.int64)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens, mask), theirs(tokens, mask).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_an_onnx_file_loads_as_pytorch_and_runs_as_it_is():
    converted = load_model(minilm.find_int8_onnx())
    as_it_is = load_model(minilm.find_int8_onnx(), {"backend": BackendSelector.ONNXRUNTIME, "sequence_length": 9})
    with torch.inference_mode():
        torch.testing.assert_close(
            converted(*as_it_is.sample_inputs), as_it_is(*as_it_is.sample_inputs), rtol=1e-3, atol=1e-4
        )


def test_a_vision_model_is_saved_and_loaded(tmp_path):
    model = quietly("mobilenet_v3_small", {"overrides": {"num_classes": 5}})
    ds.save_model(model, tmp_path / "model")
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(load_model(tmp_path / "model")(images), model(images))
