import pytest
import torch
import transformers
from safetensors.torch import load_file

from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.models.vit.keymap import import_config, import_tensors, modernize
from deepseek.models.vit.model import ViT, ViTConfig
from tests.models.pictures import (
    check_channels_last,
    check_export_with_any_batch,
    check_one_graph_in_training,
    find_modules_called_twice,
    noise,
    randomize,
)

SMALL = ViTConfig(image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_size=24, mlp_size=40, num_classes=5)


def build_theirs(**changes):
    settings = {
        "image_size": 32,
        "patch_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_labels": 5,
    }
    torch.manual_seed(0)
    model = randomize(transformers.ViTForImageClassification(transformers.ViTConfig(**settings | changes)))
    with torch.no_grad():  # transformers starts at a deviation of 0.02, where attention is nearly even
        for parameter in model.parameters():
            parameter.add_(noise(*parameter.shape, seed=parameter.numel()) * 0.2)
    return model


@pytest.mark.parametrize("changes", [{}, {"layer_norm_eps": 1e-6, "num_channels": 1}], ids=["usual", "grey"])
def test_it_computes_what_transformers_computes_from_the_same_weights(changes):
    theirs = build_theirs(**changes)
    config = import_config(theirs.config.to_dict())
    ours = ViT(config).double().eval()
    ours.load_state_dict(import_tensors(theirs.state_dict(), config))
    pictures = noise(2, config.in_channels, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(pictures), theirs(pictures).logits, rtol=1e-10, atol=1e-10)


def test_files_of_transformers_are_read_under_the_names_they_have_there(tmp_path):
    theirs = build_theirs()
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in stored
    config = import_config(theirs.config.to_dict())
    ours = ViT(config).double().eval()
    ours.load_state_dict(import_tensors(stored, config))
    pictures = noise(2, 3, 32, 32)
    torch.testing.assert_close(ours(pictures), theirs(pictures).logits, rtol=1e-10, atol=1e-10)


def test_the_state_dict_has_torchvisions_names():
    model = ViT(SMALL)
    layer = "encoder.layers.encoder_layer_{}."
    pairs = ("ln_1", "self_attention.out_proj", "ln_2", "mlp.0", "mlp.3")
    expected = {"class_token", "encoder.pos_embedding"}
    expected |= {f"{each}.{part}" for each in ("conv_proj", "encoder.ln", "heads.head") for part in ("weight", "bias")}
    for index in (0, 1):
        expected |= {f"{layer.format(index)}{each}.{part}" for each in pairs for part in ("weight", "bias")}
        expected |= {f"{layer.format(index)}self_attention.in_proj_{part}" for part in ("weight", "bias")}
    assert set(model.state_dict()) == expected


def test_attention_is_that_of_torchs_multi_head_layer_which_has_the_same_names():
    ours = randomize(ViT(SMALL)).encoder.layers[0].self_attention
    theirs = torch.nn.MultiheadAttention(24, 3, batch_first=True).double()
    theirs.load_state_dict(ours.state_dict())
    x = noise(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], rtol=1e-12, atol=1e-12)


def test_old_names_of_torchvision_load_after_modernizing():
    model = ViT(SMALL)
    renamed = {".mlp.0.": ".mlp.linear_1.", ".mlp.3.": ".mlp.linear_2."}
    old = {}
    for name, tensor in model.state_dict().items():
        for new_part, old_part in renamed.items():
            name = name.replace(new_part, old_part)
        old[name] = tensor
    assert set(old) != set(model.state_dict())
    ViT(SMALL).load_state_dict(modernize(old))


def test_dropout_happens_in_training_only():
    model = ViT(SMALL.override({"dropout": 0.5, "attention_dropout": 0.5}))
    pictures = torch.rand(1, 3, 32, 32)
    assert not torch.equal(model.train()(pictures), model(pictures))
    assert torch.equal(model.eval()(pictures), model(pictures))


def test_it_exports_with_any_batch():
    check_export_with_any_batch(randomize(ViT(SMALL)), noise(2, 3, 32, 32))


def test_its_training_forward_is_one_graph():
    check_one_graph_in_training(ViT(SMALL).double(), noise(4, 3, 32, 32))


def test_it_runs_with_channels_last():
    check_channels_last(randomize(ViT(SMALL)), noise(2, 3, 32, 32))


def test_no_module_is_called_twice():
    assert find_modules_called_twice(ViT(SMALL), torch.zeros(2, 3, 32, 32)) == []


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="resize"):
        ViT(SMALL)(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("change", [{"num_heads": 5}, {"patch_size": 7}])
def test_a_shape_that_does_not_divide_is_refused_with_those_that_do(change):
    with pytest.raises(ConfigError, match="choose one of"):
        SMALL.override(change)


@pytest.mark.parametrize("change", [{"qkv_bias": False}, {"hidden_act": "relu"}, {"model_type": "deit"}])
def test_a_model_of_transformers_that_ours_cannot_follow_is_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        import_config(transformers.ViTConfig().to_dict() | change)


def test_queries_without_keys_are_refused():
    with pytest.raises(ArtifactError, match=r"self_attention\.k\.weight"):
        import_tensors({"vit.layers.0.attention.q_proj.weight": torch.zeros(24, 24)}, SMALL)


def test_a_tensor_without_a_place_is_refused():
    with pytest.raises(ArtifactError, match="pooler"):
        import_tensors({"vit.pooler.dense.weight": torch.zeros(1)}, SMALL)
