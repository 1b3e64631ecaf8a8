"""Boxes, vectors and classes from images and texts, each against a computation by other means."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from deepseek.core.errors import ConfigError, CorruptArtifactError
from deepseek.data.tokenizing import save_tokenizer, train_tokenizer
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import load_model, save_model
from deepseek.models.predictions import Predictor, classify, detect, embed, find_task, prepare_images
from deepseek.models.yolov7.model import YOLOv7, YOLOv7Config
from tests.models import minilm

TEXTS = ["The cat sits outside.", "A man is playing guitar in the garden while it rains.", "dogs"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def encoder():
    return load_model(minilm.find_folder())


def reference_vectors(texts, folder=None, pool=None):
    """The vectors of transformers and its tokenizer, one text at a time, so that nothing is padded."""
    folder = folder or minilm.find_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    vectors = []
    for text in texts:
        with torch.inference_mode():
            hidden = model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt")).last_hidden_state[0]
        vectors.append(hidden.mean(0) if pool is None else pool(hidden))
    stacked = torch.stack(vectors)
    return stacked / stacked.norm(dim=1, keepdim=True)


# ---- boxes


class TwoObjects(YOLOv7):
    """A detector of 64 x 64 that sees the same two objects in every image, whatever it is."""

    def __init__(self, num_classes=80):
        super().__init__(YOLOv7Config(width_multiple=0.125, image_size=64, num_classes=num_classes))

    def forward(self, images):
        predictions = torch.zeros(len(images), 3, 5 + self.config.num_classes)
        for row, (box, objectness, kind) in enumerate([((32, 32, 16, 8), 0.9, 16), ((32, 33, 16, 8), 0.5, 16)]):
            predictions[:, row, :4] = torch.tensor(box)
            predictions[:, row, 4] = objectness
            predictions[:, row, 5 + kind] = 1.0
        return predictions


def predictor_of(module, fixed=None, folder=None):
    return Predictor(module.eval(), module, fixed, folder)


def test_boxes_are_in_pixels_of_the_image_that_was_given():
    image = torch.zeros(3, 100, 200)  # 0.32 of it fits into 64: 32 rows between margins of 16
    (found,) = detect(predictor_of(TwoObjects()), image, min_score=0.25, max_overlap=0.45)
    left, top, right, bottom = (32 - 8) / 0.32, (32 - 16 - 4) / 0.32, (32 + 8) / 0.32, (32 - 16 + 4) / 0.32
    torch.testing.assert_close(found.boxes_N4, torch.tensor([[left, top, right, bottom]]))
    assert found.labels == ("dog",) and found.classes_N.tolist() == [16]
    assert found.scores_N.tolist() == pytest.approx([0.9])


def test_overlap_and_score_decide_how_many_boxes_count():
    image = torch.zeros(3, 64, 64)
    both = detect(predictor_of(TwoObjects()), image, min_score=0.25, max_overlap=0.95)
    assert [len(found.labels) for found in both] == [2]
    none = detect(predictor_of(TwoObjects()), [image, image], min_score=0.95, max_overlap=0.45)
    assert [len(found.labels) for found in none] == [0, 0]


def test_classes_that_are_not_those_of_coco_are_numbers():
    (found,) = detect(predictor_of(TwoObjects(20)), torch.zeros(3, 64, 64), min_score=0.25, max_overlap=0.45)
    assert found.labels == ("class 16",)


def test_a_fixed_batch_is_filled_up_and_its_copies_are_dropped():
    model, shapes = TwoObjects(), []
    run = lambda images: shapes.append(tuple(images.shape)) or model(images)  # noqa: E731
    images = [torch.zeros(3, 64, 64)] * 3
    found = detect(Predictor(model, run, (2, 3, 32, 32), None), images, min_score=0.25, max_overlap=0.45)
    assert shapes == [(2, 3, 32, 32)] * 2 and len(found) == 3


@pytest.mark.parametrize("name", ["yolov7", "yolov7-tiny"])
def test_a_detector_by_name_finds_boxes_in_files(name, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights
        model = load_model(name, {"overrides": {"width_multiple": 0.125, "image_size": 64}})
    found = model.detect([tmp_path / "red.png"], min_score=0.0)
    assert len(found) == 1
    assert (found[0].boxes_N4 >= 0).all() and (found[0].boxes_N4 <= torch.tensor([40, 30, 40, 30])).all()


@pytest.mark.parametrize(
    ("settings", "names"),
    [({"labels": ["cat", "dog"]}, {"cat", "dog"}), ({}, {"class 0", "class 1"})],
    ids=["named", "numbered"],
)
def test_objects_have_the_names_that_the_config_gives_them(settings, names):
    model = YOLOv7(YOLOv7Config(variant="tiny", width_multiple=0.125, image_size=64, num_classes=2, **settings)).eval()
    (found,) = detect(Predictor(model, model, None, None), [torch.rand(3, 64, 64)], min_score=0.0, max_overlap=0.45)
    assert set(found.labels) <= names and len(found.labels) > 0


# ---- vectors


def test_vectors_are_those_of_transformers_whatever_stands_beside_a_text(encoder):
    torch.testing.assert_close(encoder.embed(TEXTS), reference_vectors(TEXTS), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.embed(TEXTS[0]), reference_vectors(TEXTS[:1]), rtol=1e-4, atol=1e-5)
    assert encoder.embed([]).shape[0] == 0


def test_a_text_that_is_too_long_is_cut_where_the_files_say(encoder):
    long = "word " * 400
    torch.testing.assert_close(encoder.embed(long), reference_vectors([long]), rtol=1e-4, atol=1e-5)


def changed_folder(tmp_path, name, content):
    folder = tmp_path / "encoder"
    shutil.copytree(minilm.find_folder(), folder)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("settings", "pool"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda hidden: hidden[0]),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, lambda hidden: hidden.amax(0)),
        ({"pooling_mode": "lasttoken"}, lambda hidden: hidden[-1]),
    ],
)
def test_the_files_beside_the_weights_say_how_tokens_become_a_vector(tmp_path, settings, pool):
    folder = changed_folder(tmp_path, "1_Pooling/config.json", {"word_embedding_dimension": 384} | settings)
    ours = load_model(folder).embed(TEXTS)
    torch.testing.assert_close(ours, reference_vectors(TEXTS, folder, pool), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "mistral"])
@pytest.mark.parametrize(
    ("mode", "pool"),
    [
        ("lasttoken", lambda hidden: hidden[-1]),
        ("mean_tokens", lambda hidden: hidden.mean(0)),
        ("cls_token", lambda hidden: hidden[0]),
    ],
)
@torch.no_grad()
def test_a_decoder_that_was_trained_to_embed_texts_pools_as_its_folder_says(tmp_path, model_type, mode, pool):
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=True,
    )
    theirs = transformers.AutoModel.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["architectures"] = [values["architectures"][0].replace("Model", "ForCausalLM")]  # as Qwen3-Embedding has it
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    tokenizer = train_tokenizer([], vocab_size=257)
    save_tokenizer(tokenizer, tmp_path)
    model = load_model(tmp_path)
    tokens = [torch.tensor([tokenizer.encode(text, add_special_tokens=True)]) for text in TEXTS]
    hidden = [theirs(row_1T).last_hidden_state[0] for row_1T in tokens]
    expected = torch.stack([pool(states_TD) for states_TD in hidden])
    torch.testing.assert_close(model.embed(TEXTS, normalize=False), expected, rtol=1e-4, atol=1e-5)
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(model.embed(TEXTS), expected, rtol=1e-4, atol=1e-5)
    assert find_task(model.module) == "embed"


def test_a_decoder_without_pooling_says_why_it_embeds_no_text(tmp_path):
    save_model(Decoder(DecoderConfig(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2)), tmp_path / "model")
    model = load_model(tmp_path / "model")
    for texts in ("a text", ["a text", "another"], []):
        with pytest.raises(ConfigError, match="gives no vector for a text; load a text encoder"):
            model.embed(texts)
    assert model.embed(torch.tensor([[1, 2]])).shape == (1, 2, 16)


def test_a_prompt_that_an_encoder_was_trained_with_is_put_before_each_text(tmp_path, encoder):
    settings = {"prompts": {"query": "find: "}, "default_prompt_name": "query"}
    folder = changed_folder(tmp_path, "config_sentence_transformers.json", settings)
    expected = reference_vectors([f"find: {text}" for text in TEXTS])
    torch.testing.assert_close(load_model(folder).embed(TEXTS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "error", "said"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], ConfigError, "has a Dense"),
        ("1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True}, ConfigError, "pools by weightedmean"),
        ("1_Pooling/config.json", "{", CorruptArtifactError, "not valid JSON"),
    ],
)
def test_what_cannot_be_followed_is_refused(tmp_path, name, content, error, said):
    with pytest.raises(error, match=said):
        load_model(changed_folder(tmp_path, name, content)).embed(TEXTS)


def test_a_backend_answers_with_the_same_vectors_for_fewer_and_shorter_texts(encoder):
    config = {"backend": "openvino", "precision": "fp32", "batch_size": 2, "sequence_length": 24, "time_budget_s": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of these calls leaves the backend
        fast = load_model(minilm.find_folder(), config)
        torch.testing.assert_close(fast.embed(TEXTS), encoder.embed(TEXTS), rtol=1e-3, atol=1e-3)


def test_an_encoder_below_a_head_gives_vectors_as_well(tmp_path):
    config = transformers.BertConfig(vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.BertForMaskedLM(config).eval()
    model.save_pretrained(tmp_path / "bert")
    shutil.copy(minilm.find_folder() / "tokenizer.json", tmp_path / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.find_folder())
    with torch.inference_mode():
        expected = model.bert(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0].mean(0)
    ours = load_model(tmp_path / "bert").embed(TEXTS[0], normalize=False)
    torch.testing.assert_close(ours[0], expected, rtol=1e-4, atol=1e-5)


def test_positions_of_roberta_begin_behind_its_padding(tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.RobertaConfig(vocab_size=30522, max_position_embeddings=20, pad_token_id=1, **shape)
    transformers.RobertaModel(config).save_pretrained(tmp_path / "roberta")
    shutil.copy(minilm.find_folder() / "tokenizer.json", tmp_path / "roberta")
    model = load_model(tmp_path / "roberta")
    assert model.module.max_length == 18
    assert torch.isfinite(model.embed("word " * 50)).all()  # a nineteenth token would index beyond the table


# ---- classes


def test_a_text_classifier_names_its_classes_with_the_probabilities_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, id2label={0: "sad", 1: "glad"}
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    shutil.copy(minilm.find_folder() / "tokenizer.json", tmp_path / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.find_folder())
    answers = load_model(tmp_path / "bert").classify(TEXTS)
    for text, classes in zip(TEXTS, answers, strict=True):
        with torch.inference_mode():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(1)[0]
        assert dict(classes) == pytest.approx({"sad": float(expected[0]), "glad": float(expected[1])}, abs=1e-5)
        assert classes[0][1] >= classes[1][1]


def test_a_regression_estimates_the_number_of_transformers_and_no_class(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=30522, num_labels=1, problem_type="regression", **shape)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    shutil.copy(minilm.find_folder() / "tokenizer.json", tmp_path / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.find_folder())
    loaded = load_model(tmp_path / "bert")
    assert find_task(loaded.module) == "estimate"
    for text, number in zip(TEXTS, loaded.estimate(TEXTS), strict=True):
        with torch.inference_mode():
            assert number == pytest.approx(float(model(**tokenizer(text, return_tensors="pt")).logits), abs=1e-5)
    with pytest.raises(ConfigError, match="knows no classes; call estimate"):
        loaded.classify(TEXTS)
    with pytest.raises(ConfigError, match="estimates no number"):
        load_model(minilm.find_folder()).estimate(TEXTS)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "regression"])
def test_pairs_are_answered_as_transformers_answers_them(tmp_path, problem_type):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=30522, num_labels=1 if problem_type == "regression" else 2, problem_type=problem_type, **shape
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    shutil.copy(minilm.find_folder() / "tokenizer.json", tmp_path / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.find_folder())
    pairs = [*TEXTS[1:], "another"]
    loaded = load_model(tmp_path / "bert")
    for text, pair, answer in zip(TEXTS, pairs, getattr(loaded, find_task(loaded.module))(TEXTS, pairs), strict=True):
        with torch.inference_mode():
            (scores,) = model(**tokenizer(text, pair, return_tensors="pt")).logits
        expected = float(scores[0]) if problem_type == "regression" else float(scores.softmax(0)[0])
        found = answer if isinstance(answer, float) else dict(answer)["LABEL_0"]
        assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ConfigError, match="second texts 1; give as many of both"):
        getattr(loaded, find_task(loaded.module))(TEXTS, "one")


def test_a_model_that_was_trained_on_pairs_takes_no_single_texts_and_the_reverse(tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, is_pair in (("pairs", True), ("singles", False)):
        config = transformers.BertConfig(vocab_size=30522, text_pair=is_pair, **shape)
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        shutil.copy(minilm.find_folder() / "tokenizer.json", tmp_path / name)
    with pytest.raises(ConfigError, match="give the second text of each"):
        load_model(tmp_path / "pairs").classify("one")
    with pytest.raises(ConfigError, match="not trained on pairs"):
        load_model(tmp_path / "singles").classify("one", "other")
    with pytest.raises(ConfigError, match="images and no pairs"):
        classify(predictor_of(Mean()), torch.rand(3, 8, 8), "other")


class Mean(nn.Module):
    """One score for each channel: its mean over the image."""

    def forward(self, images):
        return images.mean((2, 3))


def test_without_a_word_about_it_images_are_prepared_as_torchvision_measures_its_models(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    size = 224
    resized = Image.fromarray(pixels).resize((int(400 * 256 / 300), 256), Image.Resampling.BILINEAR)
    top, left = (256 - size) // 2, (resized.width - size) // 2
    expected = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    expected = (expected - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    (ours,) = prepare_images(predictor_of(nn.Identity()), tmp_path / "noise.png")
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), expected, atol=0.02)  # Pillow rounds to 8 bits in between


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"size": {"height": 12, "width": 16}}, (12, 16)),
        ({"size": {"shortest_edge": 12}, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}}, (8, 8)),
        ({"size": {"shortest_edge": 12}, "crop_pct": 0.75}, (12, 12)),
        ({"size": 10, "do_normalize": False}, (10, 10)),
        ({"do_resize": False}, (20, 40)),
    ],
)
def test_the_preprocessor_beside_the_weights_says_how_images_are_made_to_fit(tmp_path, settings, size):
    values = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3} | settings
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    (image,) = prepare_images(predictor_of(Mean(), folder=tmp_path), torch.ones(3, 20, 40))
    assert tuple(image.shape) == (3, *size)
    assert image.mean() == pytest.approx(1.0 if settings.get("do_normalize") is False else (1 - 0.5) / 0.25)


def test_the_likeliest_class_comes_first_and_five_are_enough():
    image = torch.stack([torch.full((8, 8), value) for value in (0.1, 0.9, 0.5)])
    (classes,) = classify(predictor_of(Mean()), image)
    assert [label for label, _ in classes] == ["class 1", "class 2", "class 0"]
    assert sum(share for _, share in classes) == pytest.approx(1.0)
    wide = nn.Sequential(Mean(), nn.Linear(3, 100))
    assert [len(answer) for answer in classify(predictor_of(wide), [image, image])] == [5, 5]


# ---- the wrong kind of model


def test_a_model_that_is_asked_for_what_it_cannot_do_says_what_can(encoder):
    with pytest.raises(ConfigError, match="finds no objects; load a detector"):
        encoder.detect(torch.zeros(3, 8, 8))
    with pytest.raises(ConfigError, match="instead of one score for each class"):
        encoder.classify(TEXTS)
    with pytest.raises(ConfigError, match="predicts no classes"):
        classify(predictor_of(TwoObjects()), torch.zeros(3, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder = load_model("gpt2", {"overrides": {"num_layers": 1, "hidden_size": 24, "ffn_size": 48}})
    with pytest.raises(ConfigError, match="deepseek generate continues texts"):
        embed(predictor_of(decoder.module), "a text", normalize=True)
    assert decoder.embed is decoder.module.embed  # a layer, as it was before there was a method of this name
    with pytest.raises(ConfigError, match=r"an image is \(1, 8, 8\)"):
        classify(predictor_of(Mean()), torch.zeros(1, 8, 8))


def test_a_folder_without_a_tokenizer_is_named(tmp_path, encoder):
    folder = tmp_path / "encoder"
    shutil.copytree(minilm.find_folder(), folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"encoder has no tokenizer\.json"):
        load_model(folder).embed(TEXTS)
