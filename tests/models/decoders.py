"""Small decoders of every shape that has a twin at Hugging Face, with weights that tell them apart."""

import torch

from deepseek.models.decoder.model import DecoderConfig
from deepseek.nn.moe import MoEConfig

SMALL = {"vocab_size": 64, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_size": 48, "max_length": 32}
GPT2_SHAPE = {
    "norm": "layer",
    "feedforward": "gelu",
    "position": "learned",
    "attention_bias": True,
    "feedforward_bias": True,
}
MOE = MoEConfig(num_experts=3, top_k=2, ffn_size=24)

EXAMPLES = {
    "llama": DecoderConfig(**SMALL, num_kv_heads=2, tie_embeddings=False),
    "llama with biases, tied": DecoderConfig(**SMALL, attention_bias=True, feedforward_bias=True),
    "llama with a head size of its own": DecoderConfig(**SMALL, head_size=16, rope_theta=5e5, norm_eps=1e-6),
    "gpt2": DecoderConfig(**SMALL, **GPT2_SHAPE),
    "gpt2, not tied": DecoderConfig(**SMALL, **GPT2_SHAPE, tie_embeddings=False),
    "mixtral": DecoderConfig(**SMALL, moe=MOE, num_kv_heads=2, tie_embeddings=False),
}


def randomize(model):
    """Values that tell every tensor from every other; norms and biases start out all alike."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter == 1))
    return model.eval()
