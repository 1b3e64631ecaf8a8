"""What can be given to `load_model`, each kind against an independent reading of the same thing."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deepseek.artifact.reading import read_manifest
from deepseek.core.errors import ArtifactError, ConfigError, CorruptArtifactError, UnsafeFileError
from deepseek.core.machine import describe_machine
from deepseek.models import text_zoo, zoo
from deepseek.models.architectures import list_architectures, name_architecture
from deepseek.models.decoder.model import Decoder
from deepseek.models.loaded_model import RunModel
from deepseek.models.loading import load_model, save_model
from deepseek.models.model_sources import KNOWN_NAMES, LoadConfig, draw_for
from deepseek.models.transformers_models.model import TransformersModel
from tests.models.tensorflow_files import write_frozen_graph, write_saved_model, write_tflite

TINY_BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
TINY = {
    "resnet50": {"width": 8, "num_classes": 10},
    "resnet18": {"width": 8, "num_classes": 10},
    "mobilenet_v3_small": {"num_classes": 10},
    "bert-base": TINY_BERT,
    "t5-small": {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "gpt2": {"vocab_size": 64, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_size": 48, "max_length": 32},
    "llama-135m": {"vocab_size": 64, "num_layers": 2, "hidden_size": 36, "num_heads": 6, "ffn_size": 48},
}


def load_quietly(name, config=None, **options):
    """A model by name, whose random weights are what the test wants."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has random weights")
        return load_model(name, {"overrides": TINY.get(name, {})} | (config or {}), **options)


@torch.inference_mode()
def answer(model, inputs=None):
    return model(*(inputs if inputs is not None else draw_for(model, LoadConfig(sequence_length=8))))


# ---- names


@pytest.mark.parametrize("name", TINY)
def test_a_name_gives_a_model_in_evaluation_mode_and_says_that_its_weights_are_random(name):
    with pytest.warns(UserWarning, match=f"{name} has random weights, so its answers mean nothing") as seen:
        model = load_model(name, {"overrides": TINY[name]})
    assert [each.filename for each in seen] == [__file__]
    assert not model.training
    assert torch.isfinite(answer(model)).all()


def test_every_name_of_the_specification_is_known():
    promised = {"resnet50", "resnet152", "mobilenet_v3_large", "mobilenet_v3_small", "bert-base", "bert-large"}
    promised |= {"gpt2", "t5-small", "yolov7"}
    assert promised <= set(KNOWN_NAMES)
    assert any(name.startswith("llama-") for name in KNOWN_NAMES)
    assert set(zoo.NAMES) | set(text_zoo.NAMES) == set(KNOWN_NAMES)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808),  # transformers' GPT2LMHeadModel, tied
        ("llama-135m", 134_515_008),  # SmolLM2-135M
        ("llama-1.1b", 1_100_048_384),  # TinyLlama
        ("llama-7b", 6_738_415_616),
        ("llama-8b", 8_030_261_248),
    ],
)
def test_decoders_by_name_have_the_published_number_of_parameters(name, published):
    with torch.device("meta"):
        model = Decoder(text_zoo.configure(name))
    assert sum(each.numel() for each in model.parameters()) == published


@pytest.mark.parametrize(("name", "published"), [("bert-base", 109_482_240), ("bert-large", 335_141_888)])
def test_encoders_by_name_have_the_published_number_of_parameters(name, published):
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(**text_zoo.configure(name)))
    assert sum(each.numel() for each in model.parameters()) == published


@pytest.mark.parametrize("name", zoo.NAMES)
def test_sample_inputs_are_those_of_the_zoo(name):
    with torch.device("meta"):
        model = zoo.build(name)
    ours, theirs = draw_for(model, LoadConfig(batch_size=2)), zoo.sample_inputs(name, 2)
    assert [each.shape for each in ours] == [each.shape for each in theirs]


def test_a_model_that_no_memory_holds_is_refused_with_its_size():
    gigabytes = describe_machine()["memory_bytes"] / 1e9
    if gigabytes > 270:
        pytest.skip("this machine could hold it")
    with pytest.raises(ConfigError, match=r"llama-70b has 276 GB of weights in fp32 and this machine has \d+ GB"):
        load_model("llama-70b")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown model 'resnet5'; did you mean 'resnet50'"):
        load_model("resnet5")
    with pytest.raises(ConfigError, match="did you mean 'bert-base'"):
        load_model("bert-bas")


@pytest.mark.parametrize("name", ["resnet50", "bert-base", "gpt2"])
def test_an_unknown_override_is_answered_with_the_nearest(name):
    wrong, right = {"resnet50": ("widht", "width"), "bert-base": ("hiden_size", "hidden_size")}.get(
        name, ("num_layer", "num_layers")
    )
    with pytest.raises(ConfigError, match=f"'{wrong}'; did you mean '{right}'"):
        load_model(name, {"overrides": {wrong: 8}})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"precison": "fp16"}, "did you mean 'precision'"),
        ({"precision": "fp17"}, "did you mean 'fp16'"),
        ({"batch_size": 0}, "'batch_size' is 0"),
        ({"time_budget_s": 0}, "'time_budget_s' is 0"),
        ({"backend": 3}, "'backend' is 3"),
    ],
)
def test_a_wrong_setting_is_explained(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_model("resnet18", setting)


def test_a_config_is_a_dict_or_a_load_config():
    with pytest.raises(ConfigError, match="give a LoadConfig or a dict"):
        load_model("resnet18", "fp16")
    config = LoadConfig(overrides=TINY["resnet18"], precision="bf16")
    with pytest.warns(UserWarning, match="random weights"):
        model = load_model("resnet18", config)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}


# ---- weights for a name


def test_weights_for_a_name_come_from_a_file_a_hugging_face_folder_or_an_artifact(tmp_path):
    torch.manual_seed(3)
    original = zoo.build("resnet18", **TINY["resnet18"]).eval()
    save_file(original.state_dict(), tmp_path / "resnet.safetensors")
    save_model(original, tmp_path / "artifact")
    images = (torch.randn(1, 3, 64, 64),)
    for weights in (tmp_path / "resnet.safetensors", tmp_path / "artifact"):
        loaded = load_model("resnet18", {"overrides": TINY["resnet18"]}, weights=weights)  # no warning
        torch.testing.assert_close(answer(loaded, images), answer(original, images))


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_weights_of_a_bare_encoder_or_one_with_a_head_fit(tmp_path, kind):
    torch.manual_seed(1)
    config = transformers.BertConfig(**TINY_BERT)
    theirs = getattr(transformers, kind)(config, **({"add_pooling_layer": False} if kind == "BertModel" else {})).eval()
    bare = theirs if kind == "BertModel" else theirs.bert
    full = transformers.BertModel(config).eval()
    full.load_state_dict(bare.state_dict(), strict=False)
    prefix = "" if kind == "BertModel" else "bert."
    save_file(
        {prefix + name: each.contiguous() for name, each in full.state_dict().items()}, tmp_path / "w.safetensors"
    )
    loaded = load_model("bert-base", {"overrides": TINY_BERT, "weights": str(tmp_path / "w.safetensors")})
    tokens_BT = torch.randint(0, 60, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens_BT), full(tokens_BT).last_hidden_state)


def test_weights_of_gpt2_under_the_names_of_hugging_face_fit(tmp_path):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 64}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    loaded = load_model("gpt2", {"overrides": TINY["gpt2"] | {"ffn_size": 128}}, weights=tmp_path / "gpt2")
    tokens_BT = torch.randint(0, 64, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens_BT), theirs(tokens_BT).logits, rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit_are_named(tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match=r"w\.safetensors do not fit"):
        load_model("resnet18", {"overrides": TINY["resnet18"]}, weights=tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match="does not exist"):
        load_model("resnet18", {"overrides": TINY["resnet18"]}, weights=tmp_path / "nothing.safetensors")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UnsafeFileError, match=r"w\.pth is a pickle"):
        load_model("resnet18", {"overrides": TINY["resnet18"]}, weights=tmp_path / "w.pth")


def test_a_path_brings_its_own_weights(tmp_path):
    save_model(zoo.build("resnet18", **TINY["resnet18"]), tmp_path / "model")
    for setting in ({"weights": "other.safetensors"}, {"overrides": {"width": 4}}):
        with pytest.raises(ConfigError, match="brings its own weights and shape"):
            load_model(tmp_path / "model", setting)


# ---- artifacts of any architecture


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v3_small", "bert-base", "t5-small", "gpt2", "llama-135m"])
def test_an_artifact_of_any_model_by_name_comes_back_the_same(tmp_path, name):
    torch.manual_seed(2)
    model = load_quietly(name)
    manifest = save_model(model, tmp_path / "model", metrics={"top1": 0.5})
    assert manifest == read_manifest(tmp_path / "model")
    assert manifest.architecture == name_architecture(model)
    loaded = load_model(tmp_path / "model")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(answer(loaded), answer(model), rtol=1e-5, atol=1e-5)
    assert not loaded.training


def test_every_family_of_the_zoo_can_be_stored():
    families = {entry.assemble for entry in zoo.MODELS.values()}
    assert {each.model for each in list_architectures().values()} == families | {Decoder}


def test_running_statistics_are_stored_with_the_weights(tmp_path):
    model = zoo.build("resnet18", **TINY["resnet18"]).train()
    model(torch.randn(4, 3, 64, 64))
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert int(loaded.bn1.num_batches_tracked) == 1
    torch.testing.assert_close(loaded.bn1.running_mean, model.bn1.running_mean, rtol=0, atol=0)


def test_an_encoder_artifact_is_a_hugging_face_folder(tmp_path):
    model = load_quietly("bert-base")
    save_model(model, tmp_path / "model", precision="bf16")
    theirs, report = transformers.AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.dtype is torch.bfloat16
    (tmp_path / "model" / "manifest.json").unlink()  # what is left is a folder as Hugging Face has it
    again = load_model(tmp_path / "model")
    torch.testing.assert_close(again.state_dict(), as_dtype(model, torch.bfloat16), rtol=0, atol=0)


def as_dtype(model, dtype):
    return {name: each.to(dtype) if each.is_floating_point() else each for name, each in model.state_dict().items()}


def test_a_precision_converts_a_vision_model_whole(tmp_path):
    model = zoo.build("resnet18", **TINY["resnet18"]).eval()
    manifest = save_model(model, tmp_path / "model", precision="bf16")
    assert manifest.precision == "bf16"
    loaded = load_model(tmp_path / "model")
    assert answer(loaded, (torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16),)).dtype is torch.bfloat16
    widened = load_model(tmp_path / "model", precision="fp32")
    assert answer(widened, (torch.zeros(1, 3, 64, 64),)).dtype is torch.float32


def test_another_kind_of_model_is_not_stored(tmp_path):
    with pytest.raises(ArtifactError, match="given a Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_one_flipped_bit_of_a_vision_artifact_is_seen(tmp_path):
    save_model(zoo.build("resnet18", **TINY["resnet18"]), tmp_path / "model")
    content = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    content[-9] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"model\.safetensors"):
        load_model(tmp_path / "model")


# ---- Hugging Face folders that are no decoder of ours


@pytest.fixture
def bert_folder(tmp_path):
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**TINY_BERT)).eval()
    model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", model


def test_a_bert_folder_loads_through_transformers(bert_folder):
    folder, theirs = bert_folder
    model = load_model(folder)
    assert isinstance(model, TransformersModel)
    tokens_BT, mask_BT = torch.randint(0, 60, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask_BT[1, 4:] = 0
    with torch.inference_mode():
        expected = theirs(input_ids=tokens_BT, attention_mask=mask_BT).last_hidden_state
        torch.testing.assert_close(model(tokens_BT, mask_BT), expected)
        torch.testing.assert_close(model(tokens_BT, attention_mask=mask_BT), expected)


def test_a_folder_with_a_vision_model_loads_too(tmp_path):
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}
    theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "resnet")
    model = load_model(tmp_path / "resnet")
    assert model.input_names == ("pixel_values",)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), theirs(images).logits)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_decoder_that_ours_cannot_be_loads_through_transformers_with_a_warning(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, hidden_act="relu", **sizes)).eval()
    theirs.save_pretrained(tmp_path / "llama")
    with pytest.warns(UserWarning, match="hidden_act='relu' .* through transformers instead"):
        model = load_model(tmp_path / "llama")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    tokens_BT = torch.randint(0, 64, (1, 9))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens_BT), theirs(tokens_BT).logits)


def test_code_that_a_folder_brings_is_never_run(bert_folder):
    folder, _ = bert_folder
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    change_config(folder, model_type="evil", auto_map={"AutoModel": "evil.Evil"})
    with pytest.raises(ConfigError, match=r"auto_map.*never done"):
        load_model(folder)
    change_config(folder, model_type="bert")  # a class of the library: its own code runs, not the folder's
    assert isinstance(load_model(folder), TransformersModel)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "brt"}, "unknown Hugging Face model type 'brt'; did you mean"),
        ({"architectures": None}, "names no model class"),
        ({"architectures": ["BertModle"]}, "names no model class"),
        ({"architectures": ["pipeline"]}, "names no model class"),
    ],
)
def test_a_config_that_names_no_model_is_explained(bert_folder, changes, message):
    folder, _ = bert_folder
    change_config(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        load_model(folder)


def test_weights_that_are_missing_in_a_folder_are_named_and_never_random(bert_folder):
    folder, model = bert_folder
    state = {name: each for name, each in model.state_dict().items() if "layer.1.attention" not in name}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"come without encoder\.layer\.1\.attention"):
        load_model(folder)


def test_weights_that_are_left_over_are_warned_about(bert_folder):
    folder, model = bert_folder
    save_file(model.state_dict() | {"extra.weight": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"no place for: extra\.weight"):
        load_model(folder)


def test_a_pickle_is_refused_and_a_pickle_in_disguise_too(bert_folder):
    folder, model = bert_folder
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UnsafeFileError, match="pickle"):
        load_model(folder)
    shutil.move(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(UnsafeFileError, match="pickle"):
        load_model(folder)


def test_a_truncated_file_is_named(bert_folder):
    folder, _ = bert_folder
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptArtifactError, match=r"model\.safetensors is not a whole"):
        load_model(folder)


# ---- TensorFlow


WEIGHT_IO = numpy.random.default_rng(0).standard_normal((4, 3)).astype("f")
BIAS_O = numpy.random.default_rng(1).standard_normal(3).astype("f")


@pytest.fixture(params=["SavedModel", "frozen graph", "TFLite"])
def tensorflow_path(request, tmp_path):
    if request.param == "SavedModel":
        return write_saved_model(tmp_path / "saved", WEIGHT_IO, BIAS_O)
    if request.param == "TFLite":
        return write_tflite(tmp_path / "model.tflite", WEIGHT_IO, BIAS_O)
    return write_frozen_graph(tmp_path / "graph.pb", WEIGHT_IO, BIAS_O)


def test_a_tensorflow_model_runs_without_tensorflow(tensorflow_path):
    assert "tensorflow" not in sys.modules
    program = load_model(tensorflow_path)
    assert isinstance(program, RunModel) and program.module is None and program.choice == "openvino"
    x = torch.randn(2, 4)
    expected = torch.relu(x @ torch.from_numpy(WEIGHT_IO) + torch.from_numpy(BIAS_O))
    torch.testing.assert_close(program(x), expected, rtol=1e-6, atol=1e-6)  # fp32, as it says
    torch.testing.assert_close(program(x=x), expected, rtol=1e-6, atol=1e-6)
    assert "openvino in fp32" in program.explain() and "x (" in program.explain()


def test_a_tensorflow_model_is_called_with_its_inputs(tensorflow_path):
    program = load_model(tensorflow_path)
    with pytest.raises(ConfigError, match="takes x and 0 were given"):
        program()
    with pytest.raises(ConfigError, match="unknown input 'y'"):
        program(y=torch.ones(2, 4))


def test_a_tensorflow_operation_that_nobody_knows_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no rule for NoSuchOperation"):
        load_model(write_saved_model(tmp_path / "saved", WEIGHT_IO, BIAS_O, op="NoSuchOperation"))


@pytest.mark.parametrize("name", ["saved_model.pb", "graph.pb", "model.tflite"])
def test_a_damaged_tensorflow_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00\x01 nothing of the kind" * 9)
    with pytest.raises(CorruptArtifactError, match="OpenVINO cannot read"):
        load_model(tmp_path if name == "saved_model.pb" else tmp_path / name)


def test_a_pickle_as_a_tensorflow_file_is_refused(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "model.tflite")
    with pytest.raises(UnsafeFileError, match="pickle"):
        load_model(tmp_path / "model.tflite")


def test_loading_through_openvino_sends_nothing_anywhere(tensorflow_path):
    """Its package reports its use as soon as it is imported; here no connection is even tried."""
    code = """
import socket, sys, time
tried = []
def refuse(*arguments, **keywords):
    tried.append(arguments)
    raise OSError("no connection is allowed here")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from deepseek.models.loading import load_model
load_model(sys.argv[1])
from openvino.tools.ovc import telemetry_utils
time.sleep(0.5)
print(len(tried), telemetry_utils.tm.__name__)
"""
    command = [sys.executable, "-c", code, str(tensorflow_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0", "openvino.tools.ovc.telemetry_stub"]


# ---- nothing


def test_what_is_no_model_is_explained(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ArtifactError, match="of a kind that is not read"):
        load_model(tmp_path / "notes.txt")
    with pytest.raises(ArtifactError, match=r"neither manifest\.json nor config\.json nor saved_model\.pb"):
        load_model(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(ArtifactError, match="does not exist"):
        load_model("nothing.onnx")


# ---- folders as people have them: one small Qwen 3, changed in one way each


TOKENS_BT = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen") / "folder"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen3Config(vocab_size=64, head_dim=16, num_key_value_heads=2, **sizes)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    theirs.save_pretrained(folder)
    with torch.inference_mode():
        return folder, theirs(TOKENS_BT).logits


@pytest.fixture
def qwen(qwen_folder, tmp_path):
    shutil.copytree(qwen_folder[0], tmp_path / "model")
    return tmp_path / "model", qwen_folder[1]


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, path, metadata={"format": "pt"})


PREFIXES = {
    "ddp": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "compiled layers": lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
    "in a multimodal model": lambda name: f"language_model.{name}",
    "twice": lambda name: f"model.{name}",
    "bare": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("rename", PREFIXES.values(), ids=PREFIXES)
def test_a_prefix_more_or_less_makes_the_same_model(qwen, rename):
    folder, expected = qwen
    change_tensors(folder, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    model = load_model(folder)
    assert isinstance(model.module, Decoder)
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS_BT), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_taken_off_models_of_transformers_too(bert_folder, prefix):
    folder, theirs = bert_folder
    change_tensors(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    tokens_BT = torch.randint(0, 60, (2, 9))
    with torch.inference_mode():
        expected = theirs(input_ids=tokens_BT).last_hidden_state
        torch.testing.assert_close(load_model(folder)(tokens_BT), expected)


@pytest.mark.parametrize("said", ["float32", "bfloat16", "float16", None])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_decoder", [True, False])
def test_weights_have_the_dtype_they_are_stored_in_whatever_the_config_says(
    qwen, bert_folder, said, stored, is_decoder
):
    folder, _ = qwen if is_decoder else bert_folder
    change_tensors(folder, lambda tensors: {name: tensor.to(stored) for name, tensor in tensors.items()})
    change_config(folder, dtype=said, torch_dtype=said)
    assert {parameter.dtype for parameter in load_model(folder).module.parameters()} == {stored}
    asked = load_model(folder, precision="fp32").module
    assert {parameter.dtype for parameter in asked.parameters()} == {torch.float32}


def test_norms_in_another_dtype_follow_the_matrices_unless_a_precision_is_asked_for(qwen):
    folder, _ = qwen
    change_tensors(folder, lambda tensors: {n: t if "norm" in n else t.bfloat16() for n, t in tensors.items()})
    assert {parameter.dtype for parameter in load_model(folder).module.parameters()} == {torch.bfloat16}
    exact = load_model(folder, precision="fp32").module
    norms = load_file(folder / "model.safetensors")
    torch.testing.assert_close(exact.norm.weight, norms["model.norm.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("head", ["Qwen3Model", "Qwen3ForSequenceClassification", "Qwen3ForTokenClassification"])
def test_a_family_of_ours_with_another_head_is_what_transformers_makes_of_it(tmp_path, head):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.Qwen3Config(vocab_size=64, head_dim=16, num_key_value_heads=2, pad_token_id=0, **sizes)
    theirs = getattr(transformers, head)(config).eval()
    theirs.save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model")
    with torch.inference_mode():
        answer = theirs(TOKENS_BT)
        expected = answer.logits if hasattr(answer, "logits") else answer.last_hidden_state
        torch.testing.assert_close(model(TOKENS_BT), expected)


QUANTIZED = {
    "fp8": lambda tensors: {n: t if "norm" in n else t.to(torch.float8_e4m3fn) for n, t in tensors.items()},
    "bitsandbytes": lambda tensors: {n: t.char() if "up_proj" in n else t for n, t in tensors.items()},
}


@pytest.mark.parametrize("change", QUANTIZED.values(), ids=QUANTIZED)
def test_weights_that_another_tool_quantized_are_refused(qwen, change):
    change_tensors(qwen[0], change)
    with pytest.raises(ArtifactError, match=r"is quantized \(.* give the folder it was made from"):
        load_model(qwen[0])


def test_a_quantization_that_the_library_cannot_read_is_one_sentence(qwen):
    change_config(qwen[0], quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64})
    with pytest.warns(UserWarning, match="quantization_config"), pytest.raises(ConfigError, match="cannot build"):
        load_model(qwen[0])


def test_two_sets_of_weights_side_by_side_are_refused(qwen):
    folder, _ = qwen
    transformers.Qwen3ForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"holds the model twice, as model\.safetensors and in the files of"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("consolidated.safetensors", r"holds consolidated\.safetensors, which nothing names"),
        ("model-00001-of-00002.safetensors", r"copy model\.safetensors\.index\.json too"),
    ],
)
def test_weights_under_another_name_are_named(qwen, name, message):
    (qwen[0] / "model.safetensors").rename(qwen[0] / name)
    with pytest.raises(ArtifactError, match=message):
        load_model(qwen[0])


def test_an_adapter_beside_a_model_is_warned_about_and_alone_is_explained(qwen, tmp_path):
    folder, _ = qwen
    (folder / "adapter_config.json").write_text("{}")
    with pytest.warns(UserWarning, match="holds an adapter as well, which is not applied"):
        load_model(folder)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is an adapter of type None, and LORA is read only"):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": None},
        {"vocab_size": 10**12},
        {"rms_norm_eps": float("nan")},
        {"rope_parameters": ["x"]},
        {"rope_scaling": "linear", "rope_parameters": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "abc"}},
        {"model_type": ["qwen3"]},
        {"num_attention_heads": 0},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*loaded through transformers instead:UserWarning")
def test_a_config_that_no_model_has_is_one_sentence_of_ours(qwen, changes):
    change_config(qwen[0], **changes)
    with pytest.raises((ConfigError, ArtifactError), match=r"config\.json|unknown Hugging Face model type"):
        load_model(qwen[0])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_in_a_model_folder_is_never_opened(qwen, name):
    (qwen[0] / name).unlink(missing_ok=True)
    os.mkfifo(qwen[0] / name)
    with pytest.raises(ArtifactError):
        load_model(qwen[0])


def test_deep_nesting_is_an_error_of_the_file(qwen):
    for name in ("model.safetensors.index.json", "config.json"):
        (qwen[0] / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
        with pytest.raises(CorruptArtifactError, match=name):
            load_model(qwen[0])


def test_a_packed_vision_model_names_the_ways_out(tmp_path):
    save_model(zoo.build("resnet18", width=8, num_classes=10), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"packed=True takes decoders only; call load_model without it, or with"):
        load_model(tmp_path / "model", packed=True)
