"""Training begins with the weights that were given, with new heads where they have none of that size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deepseek.artifact.reading import read_manifest
from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.models import zoo
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import load_model, make_int8_, save_model
from deepseek.models.resnet.model import ResNet
from deepseek.models.starting_weights import CAUSAL_LM, HeadSpec, find_tokenizer, open_start
from deepseek.models.vit.model import ViT
from tests.models.decoders import EXAMPLES, randomize

SMALL_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
    "max_position_embeddings": 16,
}
RESNET = {"width": 8, "num_classes": 5}
IMAGES = HeadSpec("image_classification", 5)


def save_resnet(folder: Path) -> Path:
    torch.manual_seed(1)
    save_model(zoo.build("resnet18", **RESNET), folder)
    return folder


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_taken_over(model: torch.nn.Module, expected: dict[str, torch.Tensor], new: tuple[str, ...]) -> None:
    state = model.state_dict()
    assert set(new) <= set(state)
    for name in set(state) - set(new):
        torch.testing.assert_close(state[name], expected[name], rtol=0, atol=0)


def test_an_artifact_is_opened_for_training_with_its_digest(tmp_path: Path) -> None:
    folder = save_resnet(tmp_path / "model")
    start = open_start(folder, IMAGES)
    assert isinstance(start.model, ResNet)
    assert start.model.training
    assert all(parameter.requires_grad for parameter in start.model.parameters())
    assert start.parent_digest == read_manifest(folder).digest
    assert start.new_tensors == ()
    assert_taken_over(start.model, load_model(folder).module.state_dict(), ())


def test_training_never_reaches_the_file(tmp_path: Path) -> None:
    folder = save_resnet(tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    model = open_start(folder, IMAGES).model
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert open_start(folder, IMAGES).model.state_dict()["fc.weight"].abs().sum() > 0


def test_a_head_of_another_size_is_new_and_comes_from_the_seed(tmp_path: Path) -> None:
    folder = save_resnet(tmp_path / "model")
    heads = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        start = open_start(folder, HeadSpec("image_classification", 3))
        assert start.new_tensors == ("fc.weight", "fc.bias")
        assert_taken_over(start.model, load_model(folder).module.state_dict(), start.new_tensors)
        heads.append(start.model.state_dict()["fc.weight"])
    assert heads[0].shape == (3, 64)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_name_begins_with_random_weights_and_says_so() -> None:
    torch.manual_seed(3)
    start = open_start("resnet18", IMAGES, settings={"width": 8})
    torch.manual_seed(3)
    expected = zoo.build("resnet18", **RESNET)
    assert_taken_over(start.model, expected.state_dict(), ())
    assert start.summary == "resnet18 with random weights"
    assert start.parent_digest is None


def test_torchvisions_weights_fill_a_named_model(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = state_of(zoo.build("resnet18", width=8, num_classes=10))  # under torchvision's names
    save_file(theirs, tmp_path / "resnet18.safetensors")
    start = open_start("resnet18", IMAGES, weights=tmp_path / "resnet18.safetensors", settings={"width": 8})
    assert start.new_tensors == ("fc.weight", "fc.bias")
    assert_taken_over(start.model, theirs, start.new_tensors)
    assert start.parent_digest is not None


def test_a_resnet_and_a_vit_of_hugging_face_become_ours(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    resnet = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).eval()
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, num_labels=4,
        )
    ).eval()  # fmt: skip
    for theirs, kind, num_outputs in ((resnet, ResNet, 2), (vit, ViT, 4)):
        theirs.save_pretrained(tmp_path / kind.__name__)
        start = open_start(tmp_path / kind.__name__, HeadSpec("image_classification", num_outputs))
        assert isinstance(start.model, kind)
        assert start.new_tensors == ()
        torch.testing.assert_close(start.model.eval()(images), theirs(images).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("example", ["llama", "gpt2"])
def test_a_decoder_of_hugging_face_becomes_ours(example: str, tmp_path: Path) -> None:
    model = randomize(Decoder(EXAMPLES[example]))
    save_model(model, tmp_path / "artifact")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tmp_path / "artifact" / name).read_bytes())
    start = open_start(folder, CAUSAL_LM)
    assert isinstance(start.model, Decoder)
    assert_taken_over(start.model, model.state_dict(), ())
    # The digest is that of the files, without the manifest that only an artifact has.
    assert start.parent_digest == read_manifest(tmp_path / "artifact").digest


def test_bert_gets_the_head_of_the_task(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL_BERT))
    theirs.save_pretrained(tmp_path)
    inputs = torch.randint(0, 40, (2, 8))
    heads = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        start = open_start(tmp_path, HeadSpec("sequence_classification", 4))
        heads.append(start.model.state_dict()["model.classifier.weight"])
        assert "model.classifier.weight" in start.new_tensors
        assert all(name.startswith(("model.classifier.", "model.bert.pooler.")) for name in start.new_tensors)
    assert heads[0].shape == (4, 16)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    masked = open_start(tmp_path, HeadSpec("masked_lm"))
    assert masked.new_tensors == ()
    torch.testing.assert_close(masked.model.eval()(inputs), theirs.eval()(inputs).logits)
    assert masked.model.train().training


def test_a_bert_of_ours_is_begun_with_again(tmp_path: Path) -> None:
    start = open_start("bert-base", HeadSpec("masked_lm", settings={"vocab_size": 30}), settings=SMALL_BERT)
    assert start.model.config["vocab_size"] == 40  # what the user says counts
    save_model(start.model, tmp_path / "bert")
    again = open_start(tmp_path / "bert", HeadSpec("question_answering"))
    assert {name.split(".")[1] for name in again.new_tensors} == {"qa_outputs"}
    assert again.parent_digest == read_manifest(tmp_path / "bert").digest


def test_the_head_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    labels = ("cat", "dog", "bird")
    bert = open_start("bert-base", HeadSpec("sequence_classification", 3, labels), settings=SMALL_BERT).model
    assert bert.config["id2label"] == {"0": "cat", "1": "dog", "2": "bird"}
    small = {"width_multiple": 0.125}
    detector = open_start("yolov7-tiny", HeadSpec("detection", 3, labels), settings=small).model
    assert detector.config.labels == labels
    save_model(detector, tmp_path / "detector")
    start = open_start(tmp_path / "detector", HeadSpec("detection", 2))
    assert start.model.config.labels == ()
    last = len(start.model.model) - 1
    assert {name.split(".")[1] for name in start.new_tensors} == {str(last)}
    assert_taken_over(start.model, detector.state_dict(), start.new_tensors)
    assert open_start(tmp_path / "detector", HeadSpec("detection", 3)).new_tensors == ()


def test_an_int8_decoder_is_opened_for_adapters_only(tmp_path: Path) -> None:
    save_model(make_int8_(randomize(Decoder(EXAMPLES["llama"]))), tmp_path / "int8")
    with pytest.raises(ConfigError, match="are int8, which no gradient changes; train an adapter"):
        open_start(tmp_path / "int8", CAUSAL_LM)
    start = open_start(tmp_path / "int8", CAUSAL_LM, allow_int8=True)
    assert start.model.state_dict()["layers.0.attention.q_proj.weight"].dtype is torch.int8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float, tmp_path: Path) -> None:
    folder = save_resnet(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["layer2.0.conv1.weight"][0, 0, 0, 0] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ArtifactError, match=r"hold NaN or infinity in layer2\.0\.conv1\.weight;"):
        open_start("resnet18", IMAGES, weights=tmp_path / "bad.safetensors", settings={"width": 8})
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL_BERT))
    bert.bert.embeddings.word_embeddings.weight.data[0, 0] = value
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ArtifactError, match=r"NaN or infinity in bert\.embeddings\.word_embeddings\.weight"):
        open_start(tmp_path / "bert", HeadSpec("masked_lm"))


def test_weights_of_another_body_are_refused(tmp_path: Path) -> None:
    save_file(state_of(zoo.build("resnet18", width=16)), tmp_path / "wide.safetensors")
    with pytest.raises(ArtifactError, match=r"wide.safetensors do not fit the model: bn1.bias is .16. instead of .8."):
        open_start("resnet18", IMAGES, weights=tmp_path / "wide.safetensors", settings={"width": 8})
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL_BERT))
    bert.save_pretrained(tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text()) | {"intermediate_size": 48}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"come without bert\.encoder"):
        open_start(tmp_path / "bert", HeadSpec("sequence_classification", 2))


@pytest.mark.parametrize(
    ("head", "settings", "message"),
    [
        (CAUSAL_LM, {}, r"resnet18 is a model of architecture resnet and this task trains one for causal_lm"),
        (
            HeadSpec("sequence_classification", 2),
            {},
            "trains one for sequence_classification; give one of transformers",
        ),
        (IMAGES, {"widht": 8}, "unknown setting 'widht'; did you mean 'width'"),
    ],
)
def test_a_model_that_the_task_cannot_train_is_refused(head: HeadSpec, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_start("resnet18", head, settings=settings)


def test_a_folder_with_settings_of_a_name_is_refused(tmp_path: Path) -> None:
    folder = save_resnet(tmp_path / "model")
    with pytest.raises(ConfigError, match="brings its own weights and shape, and init_settings was given"):
        open_start(folder, IMAGES, settings={"width": 8})
    with pytest.raises(ConfigError, match="holds weights without a shape; give the model's name as init"):
        open_start(folder / "model.safetensors", IMAGES)
    with pytest.raises(ArtifactError, match="does not exist"):
        open_start(tmp_path / "nothing.d", IMAGES)
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        open_start("resnet81", IMAGES)


def test_the_tokenizer_is_that_of_the_folder(tmp_path: Path) -> None:
    assert find_tokenizer("gpt2", None) is None
    assert find_tokenizer(None, None) is None
    assert find_tokenizer(str(tmp_path), None) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_tokenizer(str(tmp_path), None) == tmp_path
    assert find_tokenizer("gpt2", str(tmp_path)) == tmp_path
    with pytest.raises(ArtifactError, match="nowhere does not exist; give the folder"):
        find_tokenizer(str(tmp_path / "nowhere"), None)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model = randomize(Decoder(DecoderConfig(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, ffn_size=32)))
    save_model(model, tmp_path / "tied")
    start = open_start(tmp_path / "tied", CAUSAL_LM).model
    assert start.head.weight is start.embed.weight
    torch.testing.assert_close(start.embed.weight, model.embed.weight, rtol=0, atol=0)
