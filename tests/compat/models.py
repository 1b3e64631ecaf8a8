"""Tiny real models of `transformers`, whose logits judge a conversion."""

from __future__ import annotations

import torch
import transformers

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def build(family: str) -> torch.nn.Module:
    """A model with random weights, also in its norms and biases."""
    torch.manual_seed(0)
    decoder = SIZES | TOKENS | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
    match family:
        case "gpt2":
            config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=16, **TOKENS)
            model = transformers.GPT2LMHeadModel(config)
        case "bert":
            model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **TOKENS))
        case "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**decoder))
        case "phi3":
            config = transformers.Phi3Config(**decoder, original_max_position_embeddings=64)
            model = transformers.Phi3ForCausalLM(config)
        case "mixtral":
            config = transformers.MixtralConfig(**decoder, num_local_experts=3, num_experts_per_tok=2)
            model = transformers.MixtralForCausalLM(config)
        case "resnet":
            config = transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[2, 1, 1, 2], layer_type="basic", num_labels=5
            )
            model = transformers.ResNetForImageClassification(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(std=0.3)
                if name.endswith("running_var"):
                    tensor.abs_()
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """What the model says about fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    if "resnet" in type(model).__name__.lower():
        return model(torch.randn(2, 3, 32, 32, generator=generator)).logits
    return model(torch.randint(0, 32, (2, 7), generator=generator)).logits
