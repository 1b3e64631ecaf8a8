"""Folders of every family that transformers writes, loaded as our decoder and asked the same as transformers.

Each is tiny, has random weights of its own in every tensor, and is asked for more tokens than its window holds.
"""

import json

import pytest
import torch
import transformers

from deepseek.data.tokenizing import train_tokenizer
from deepseek.models.loading import load_decoder, load_model, make_int8_, save_model
from deepseek.nn.packed import pack_
from deepseek.serve.config import EngineConfig
from deepseek.serve.engine import Engine

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
THETA = {"rope_theta": 1000.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
PAIRS = [1.0, 1.1, 1.3, 2.0]
LONG = {
    "rope_type": "longrope",
    "short_factor": PAIRS,
    "long_factor": [4.0] * 4,
}
FAMILIES = {
    "llama": ("llama", {}),
    "llama, biases and a head size of its own": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "llama 3": ("llama", {"rope_parameters": THETA | LLAMA3 | {"rope_type": "llama3"}}),
    "llama, linear": ("llama", {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}}),
    "llama, dynamic": ("llama", {"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 4.0}}),
    "llama, yarn": (
        "llama",
        {"rope_parameters": THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}},
    ),
    "llama, yarn with every setting": (
        "llama",
        {
            "rope_parameters": THETA
            | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 8.0}
            | {"beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False}
        },
    ),
    "mistral": ("mistral", {"sliding_window": 8}),
    "mistral without a window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mixtral with a window": ("mixtral", {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 with windows": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", {"sliding_window": 8}),
    "phi3 with parts of heads rotated": (
        "phi3",
        {"num_attention_heads": 2, "rope_parameters": THETA | {"rope_type": "default", "partial_rotary_factor": 0.75}},
    ),
    "phi3, longrope": ("phi3", {"rope_parameters": THETA | LONG, "original_max_position_embeddings": 48}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def build(name):
    """The model of transformers, with values that tell every tensor from every other."""
    model_type, changes = FAMILIES[name]
    config = transformers.AutoConfig.for_model(model_type, **SMALL | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def make_tokens(*shape, seed=0):
    return torch.randint(1, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders by name, each written once."""
    written = {}

    def folder_of(name):
        if name not in written:
            folder = tmp_path_factory.mktemp("family") / "model"
            model = build(name)
            model.save_pretrained(folder)
            model.config.eos_token_id = model.generation_config.eos_token_id = None  # so that nothing ends an answer
            written[name] = folder, model
        return written[name]

    return folder_of


@every_family
@torch.no_grad()
def test_logits_are_those_of_transformers(folders, name):
    folder, theirs = folders(name)
    ours = load_decoder(folder)
    tokens_BT = make_tokens(2, 40)
    expected = theirs(tokens_BT).logits
    torch.testing.assert_close(ours(tokens_BT), expected, rtol=1e-3, atol=1e-3)
    packed = load_decoder(folder, packed=True)
    torch.testing.assert_close(packed(tokens_BT), expected, rtol=1e-3, atol=1e-3)


@every_family
@torch.no_grad()
def test_token_by_token_is_the_whole_pass(folders, name):
    model = load_decoder(folders(name)[0])
    tokens_1T = make_tokens(1, 24)
    cache = model.new_cache(1)
    logits = []
    for start, stop in [(0, 5), (5, 11), *((at, at + 1) for at in range(11, 24))]:
        view = cache.view(0, 1, stop)
        positions_1T = torch.arange(start, stop)[None]
        logits.append(model(tokens_1T[:, start:stop], positions_BT=positions_1T, cache=view))
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens_1T), rtol=1e-4, atol=1e-4)


@every_family
def test_the_engine_generates_what_transformers_generates(folders, name):
    folder, theirs = folders(name)
    tokenizer = train_tokenizer([], vocab_size=257)
    prompts = [make_tokens(length, seed=length).tolist() for length in (1, 7, 20)]
    engine = Engine(load_decoder(folder, packed=True), tokenizer, EngineConfig(prefill_tokens=6, max_length=48))
    answers = engine.generate(prompts, max_tokens=20, ignore_eos=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        written = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        expected = written[0, len(prompt) :].tolist()
        assert [token.id for token in answer.tokens] == expected


@every_family
@torch.no_grad()
def test_it_is_saved_for_transformers_again(folders, name, tmp_path):
    folder, theirs = folders(name)
    manifest = save_model(load_model(folder), tmp_path / "again")
    assert manifest.layout == "huggingface"
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    tokens_BT = make_tokens(2, 40)
    torch.testing.assert_close(back(tokens_BT).logits, theirs(tokens_BT).logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(load_model(tmp_path / "again")(tokens_BT), load_model(folder)(tokens_BT), rtol=0, atol=0)


@every_family
@torch.no_grad()
def test_bf16_weights_compute_what_transformers_computes_in_bf16(folders, name, tmp_path):
    _, theirs = folders(name)
    half = build(name).bfloat16()
    half.save_pretrained(tmp_path / "half")
    ours = load_decoder(tmp_path / "half")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    tokens_BT = make_tokens(2, 24)
    exact, expected, given = theirs(tokens_BT).logits, half(tokens_BT).logits.float(), ours(tokens_BT).float()
    # As far from the exact logits as the same model of transformers, and not farther.
    assert (given - exact).norm() < 1.5 * (expected - exact).norm()


@pytest.mark.parametrize("name", ["llama 3", "mistral", "qwen2", "qwen3", "phi3", "gemma3"])
@torch.no_grad()
def test_int8_stays_near_and_comes_back_from_an_artifact(folders, name, tmp_path):
    folder, theirs = folders(name)
    tokens_BT = make_tokens(2, 24)
    quantized = make_int8_(load_decoder(folder))
    exact = theirs(tokens_BT).logits
    assert (quantized(tokens_BT) - exact).norm() < 0.15 * exact.norm()
    save_model(quantized, tmp_path / "int8")
    again = load_decoder(tmp_path / "int8")
    torch.testing.assert_close(again(tokens_BT), quantized(tokens_BT), rtol=0, atol=0)
    torch.testing.assert_close(pack_(again)(tokens_BT), quantized(tokens_BT), rtol=1e-4, atol=1e-4)


def test_old_configs_say_the_same_under_older_names(folders, tmp_path):
    """As transformers 4 wrote them: rope_theta and rope_scaling on the top level."""
    for name in ("llama 3", "phi3, longrope", "gemma3"):
        folder, _ = folders(name)
        values = json.loads((folder / "config.json").read_text())
        rope = values.pop("rope_parameters")
        if "full_attention" in rope:
            full, window = rope["full_attention"], rope["sliding_attention"]
            values |= {"rope_theta": full.pop("rope_theta"), "rope_local_base_freq": window["rope_theta"]}
            rope = full
        else:
            values["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
        original = rope.get("original_max_position_embeddings")
        if rope["type"] == "longrope":
            values["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings", original)
        old = tmp_path / name.replace(" ", "")
        old.mkdir()
        (old / "config.json").write_text(json.dumps(values | {"rope_scaling": rope}))
        (old / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        assert load_decoder(old).config == load_decoder(folder).config


SHORT = {"max_position_embeddings": 16}
LONGER = {
    "longrope": ("phi3", {"rope_parameters": THETA | LONG, "original_max_position_embeddings": 16}),
    "longrope on parts of heads": (
        "phi3",
        {
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 17,
            "rope_parameters": THETA
            | {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [3.0, 5.0], "attention_factor": 1.2},
        },
    ),
    "longrope beside a window": (
        "phi3",
        {"rope_parameters": THETA | LONG, "original_max_position_embeddings": 16, "sliding_window": 8},
    ),
    "longrope in llama": (
        "llama",
        {"rope_parameters": THETA | LONG | {"factor": 6.0, "original_max_position_embeddings": 16}},
    ),
    "dynamic": ("llama", SHORT | {"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 4.0}}),
    "dynamic in qwen2": ("qwen2", SHORT | {"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 2.5}}),
    "dynamic beside norms of queries": (
        "qwen3",
        SHORT | {"head_dim": 12, "rope_parameters": THETA | {"rope_type": "dynamic", "factor": 3.0}},
    ),
    "yarn beside its first length": (
        "qwen2",
        SHORT
        | {"rope_parameters": THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
}


@pytest.fixture(params=LONGER)
def longer(request, tmp_path):
    """A model whose angles change beyond 16 or 17 tokens: transformers' own, and its folder."""
    FAMILIES[request.param] = LONGER[request.param]
    model = build(request.param)
    del FAMILIES[request.param]
    model.save_pretrained(tmp_path / "model")
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model, tmp_path / "model"


@torch.no_grad()
def test_texts_beyond_the_first_length_have_the_logits_of_transformers(longer, tmp_path):
    theirs, folder = longer
    ours = load_decoder(folder)
    save_model(ours, tmp_path / "again")
    again = load_decoder(tmp_path / "again")
    for length in (15, 16, 17, 18, 33, 40):  # growing, since what they compute for a short text depends on longer ones
        tokens_BT = make_tokens(2, length)
        expected = theirs(tokens_BT).logits
        torch.testing.assert_close(ours(tokens_BT), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(again(tokens_BT), ours(tokens_BT), rtol=0, atol=0)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    torch.testing.assert_close(back(tokens_BT).logits, expected, rtol=1e-3, atol=1e-3)


def test_an_answer_that_grows_beyond_the_first_length_is_that_of_transformers(longer):
    theirs, folder = longer
    if theirs.config.model_type == "llama" and theirs.config.rope_parameters["rope_type"] == "longrope":
        pytest.skip("transformers goes on with the keys of the shorter text in every family but Phi-3")
    tokenizer = train_tokenizer([], vocab_size=257)
    prompts = [make_tokens(length, seed=length).tolist() for length in (3, 16, 17, 24)]
    engine = Engine(load_decoder(folder, packed=True), tokenizer, EngineConfig(prefill_tokens=6, max_length=40))
    answers = engine.generate(prompts, max_tokens=16, ignore_eos=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        fresh = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        fresh.generation_config = theirs.generation_config
        written = fresh.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0)
        assert [token.id for token in answer.tokens] == written[0, len(prompt) :].tolist(), len(prompt)


YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
EVERY_SECOND = ["sliding_attention", "full_attention", "sliding_attention"]
SIBLINGS = {
    "yarn with an amplitude": ("qwen2", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "yarn beside norms of queries": ("qwen3", {"head_dim": 8, "rope_parameters": YARN}),
    "dynamic within its length": (
        "gemma2",
        {"head_dim": 8, "rope_parameters": THETA | {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "one key head": ("llama", {"num_key_value_heads": 1, "hidden_act": "swish"}),
    "a head size that hidden_size does not hold": ("mistral", {"sliding_window": 5, "head_dim": 12}),
    "a window of one token": ("mistral", {"sliding_window": 1}),
    "a window in every layer, said twice": ("mistral", {"sliding_window": 8, "layer_types": [EVERY_SECOND[0]] * 3}),
    "a window above a layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "a window that is switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
    "a window where layer_types says": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": EVERY_SECOND},
    ),
    "biases and norms of queries": ("qwen3", {"attention_bias": True, "head_dim": 12}),
    "half of the channels rotated": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 8}),
    "tight caps": ("gemma2", {"head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0}),
    "no caps": ("gemma2", {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "a scale of its own": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 100, "sliding_window": 8}),
    "an activation under its older name": ("gemma2", {"head_dim": 8, "hidden_act": "gelu"}),
    "a cap of logits alone": ("gemma3_text", {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0}),
    "an untied head": ("gemma3_text", {"head_dim": 8, "sliding_window": 4, "tie_word_embeddings": False}),
    "three of four experts": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "head_dim": 12}),
    "a ratio of its own": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 96, "n_inner": 40}),
}


@pytest.mark.parametrize("name", SIBLINGS)
@torch.no_grad()
def test_settings_beside_the_usual_ones_give_the_logits_of_transformers(name, tmp_path, monkeypatch):
    """More tokens than the window and the first training's length hold; whole, in pieces, and in int8."""
    monkeypatch.setitem(FAMILIES, name, SIBLINGS[name])
    theirs = build(name)
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(tmp_path)
    tokens_BT = make_tokens(2, 60)
    expected = theirs(tokens_BT).logits
    tolerance = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(ours(tokens_BT), expected, rtol=0, atol=tolerance)
    cache, pieces = ours.new_cache(2), []
    for start, stop in [(0, 3), (3, 30), *((at, at + 1) for at in range(30, 60))]:
        positions_BT = torch.arange(start, stop).expand(2, -1)
        pieces.append(ours(tokens_BT[:, start:stop], positions_BT=positions_BT, cache=cache.view(0, 2, stop)))
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=tolerance)
    assert (make_int8_(ours)(tokens_BT) - expected).norm() < 0.2 * expected.norm()
