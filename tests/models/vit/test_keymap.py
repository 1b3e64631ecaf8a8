"""Vision transformers of Hugging Face and of old files under torchvision's names."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.models.vit.keymap import import_config, import_tensors, modernize
from deepseek.models.vit.model import ViT
from tests.models.pictures import (
    noise,
    randomize,
)
from tests.models.vit.examples import SMALL


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
