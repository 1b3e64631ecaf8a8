"""`deepseek predict`: what it prints is what the model says of each input."""

import io
import json
import shutil
import warnings

import pytest
import torch
from PIL import Image

from deepseek.cli import build_app, run
from deepseek.data.images import read_image
from deepseek.models import zoo
from deepseek.models.loading import load_model, save_model
from deepseek.models.transformers_models.model import build_transformers
from tests.models import minilm


def predict(capsys, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = run(build_app(), ["predict", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def detector(tmp_path):
    torch.manual_seed(0)
    save_model(zoo.build("yolov7", width_multiple=0.125, image_size=64).eval(), tmp_path / "detector")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return tmp_path / "detector"


def test_boxes_are_printed_as_json_and_drawn(capsys, tmp_path, detector):
    image = tmp_path / "red.png"
    options = ("--min-score", 0.0, "--json", "--out", tmp_path / "out")
    status, out, err = predict(capsys, detector, image, *options)
    (line,) = out.splitlines()
    (found,) = load_model(detector).detect([image], min_score=0.0)
    assert status == 0 and json.loads(line)["input"] == str(image)
    assert [each["label"] for each in json.loads(line)["objects"]] == list(found.labels)
    assert str(tmp_path / "out" / "red-boxes.png") in err
    assert read_image(tmp_path / "out" / "red-boxes.png").shape == (3, 30, 40)


def test_pairs_come_from_options_or_from_lines_with_a_tab(capsys, tmp_path, monkeypatch):
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    values = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "text_pair": True}
    save_model(build_transformers(values | settings), tmp_path / "model")
    shutil.copy(minilm.find_folder() / "tokenizer.json", tmp_path / "model")
    model = tmp_path / "model"
    status, out, _ = predict(capsys, model, "a cat", "a dog", "--pair", "a bird", "--pair", "a frog", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [line["input"] for line in lines] == ["a cat | a bird", "a dog | a frog"]
    found = load_model(model).classify(["a cat", "a dog"], ["a bird", "a frog"])
    assert [[(one["label"], one["probability"]) for one in line["classes"]] for line in lines] == found
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\ta bird\na dog\ta frog\n"))
    assert predict(capsys, model, "--json")[1] == out
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\n"))
    assert "line 1 has 0 tabs" in predict(capsys, model, "--json")[2]
    assert "give the second text of each" in predict(capsys, model, "a cat")[2]
    assert "takes no --pair" in predict(capsys, minilm.find_folder(), "a cat", "--pair", "a dog")[2]


def test_an_image_in_which_nothing_is_found_is_a_row_that_says_so(capsys, tmp_path, detector):
    status, out, _ = predict(capsys, detector, tmp_path / "red.png", "--min-score", 1.0)
    assert status == 0 and "nothing" in out


def test_questions_are_answered_from_a_file(capsys, tmp_path):
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    values = {"model_type": "bert", "architectures": ["BertForQuestionAnswering"]} | settings
    build_transformers(values).model.save_pretrained(tmp_path / "model")
    shutil.copy(minilm.find_folder() / "tokenizer.json", tmp_path / "model")
    (tmp_path / "text.txt").write_text("A dog sleeps in the garden.")
    status, out, _ = predict(capsys, tmp_path / "model", "who sleeps?", "--context", tmp_path / "text.txt", "--json")
    found = json.loads(out)["answer"]
    assert status == 0
    assert found["text"] == "A dog sleeps in the garden."[found["begin"] : found["end"]] != ""
    assert "who sleeps?" in predict(capsys, tmp_path / "model", "who sleeps?", "--context", tmp_path / "text.txt")[1]
    assert "needs --context FILE" in predict(capsys, tmp_path / "model", "who sleeps?")[2]
    status, _, err = predict(capsys, minilm.find_folder(), "a cat", "--context", tmp_path / "text.txt")
    assert status != 0 and "takes no --context" in err


def test_a_regression_gives_a_number_for_each_text(capsys, tmp_path):
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    values = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "num_labels": 1}
    save_model(build_transformers(values | settings | {"problem_type": "regression"}), tmp_path / "model")
    shutil.copy(minilm.find_folder() / "tokenizer.json", tmp_path / "model")
    status, out, _ = predict(capsys, tmp_path / "model", "a cat", "a dog", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [line["input"] for line in lines] == ["a cat", "a dog"]
    assert [line["number"] for line in lines] == load_model(tmp_path / "model").estimate(["a cat", "a dog"])
    assert "number" in predict(capsys, tmp_path / "model", "a cat")[1]


def test_an_encoder_gives_vectors_of_texts(capsys):
    status, out, _ = predict(capsys, minilm.find_folder(), "a cat", "a dog", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [line["input"] for line in lines] == ["a cat", "a dog"]
    expected = load_model(minilm.find_folder()).embed(["a cat", "a dog"])
    torch.testing.assert_close(torch.tensor([line["embedding"] for line in lines]), expected)
    assert "384" in predict(capsys, minilm.find_folder(), "a cat")[1]


def test_lines_of_standard_input_are_texts(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\na dog\r\n"))
    _, out, _ = predict(capsys, minilm.find_folder(), "--json")
    assert [json.loads(line)["input"] for line in out.splitlines()] == ["a cat", "a dog"]


def test_classes_come_with_probabilities(capsys, tmp_path):
    save_model(zoo.build("resnet18", width=8, num_classes=3).eval(), tmp_path / "classifier")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    _, out, _ = predict(capsys, tmp_path / "classifier", tmp_path / "red.png", "--json")
    classes = json.loads(out)["classes"]
    assert {each["label"] for each in classes} == {"class 0", "class 1", "class 2"}
    assert sum(each["probability"] for each in classes) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "nothing was given to look at"),
        (("a text", "--out", "x"), "--out is for boxes"),
    ],
)
def test_a_call_that_makes_no_sense_is_wrong_usage(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    status, _, err = predict(capsys, minilm.find_folder(), *arguments)
    assert status == 2 and said in err


def test_two_images_of_one_name_cannot_both_be_drawn(capsys, tmp_path, detector):
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "red.png", tmp_path / "other" / "red.png")
    images = (tmp_path / "red.png", tmp_path / "other" / "red.png")
    status, _, err = predict(capsys, detector, *images, "--out", tmp_path / "out")
    assert status == 2 and "have one name" in err
