"""Files that somebody else wrote: damaged, cut short, pickles, weights that lie elsewhere."""

import numpy
import pytest
import torch
from onnx import TensorProto, helper

from deepseek.core.errors import ArtifactError, ConfigError, CorruptArtifactError, UnsafeFileError
from deepseek.onnx.files import read_onnx
from deepseek.onnx.importing import import_onnx
from tests.models import minilm
from tests.onnx.checks import FLOAT, build_model, relu_model


@pytest.mark.parametrize("opset", [7, 10, 29, 99])
def test_an_opset_that_is_not_read_is_said(opset):
    with pytest.raises(ConfigError, match=f"opset {opset} and 11 to 28 are converted"):
        import_onnx(relu_model(opset=opset))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07", b"\xff" * 64])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"m\.onnx"):
        read_onnx(path)


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "m.onnx"
    content = minilm.find_int8_onnx().read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptArtifactError, match=r"m\.onnx"):
        read_onnx(path)


def test_a_pickle_and_nothing_are_refused(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "m.onnx")
    with pytest.raises(UnsafeFileError, match="pickle"):
        read_onnx(tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match="does not exist"):
        read_onnx(tmp_path / "n.onnx")


def model_with_weights_at(location, path):
    model = build_model(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        {"x": (FLOAT, [4])},
        {"y": FLOAT},
        weights={"w": numpy.ones(4, "f")},
    )
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret"])
def test_weights_outside_the_folder_are_refused(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(16))
    (tmp_path / "model").mkdir()
    with pytest.raises(UnsafeFileError, match="outside its own folder"):
        read_onnx(model_with_weights_at(location, tmp_path / "model" / "m.onnx"))


def test_a_link_that_leads_outside_the_folder_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(16))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeFileError, match="outside its own folder"):
        read_onnx(model_with_weights_at("w", tmp_path / "model" / "m.onnx"))


def test_weights_that_are_missing_or_too_short_are_said(tmp_path):
    path = model_with_weights_at("w", tmp_path / "m.onnx")
    with pytest.raises(CorruptArtifactError, match=r"m\.onnx"):
        read_onnx(path)
    (tmp_path / "w").write_bytes(numpy.arange(4, dtype="<f4").tobytes())
    converted = import_onnx(read_onnx(path))
    torch.testing.assert_close(converted(torch.zeros(4)), torch.arange(4.0))
    (tmp_path / "w").write_bytes(bytes(3))
    with pytest.raises(CorruptArtifactError, match=r"'w' is damaged|weights of"):
        import_onnx(read_onnx(path))
