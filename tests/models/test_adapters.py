"""Adapters are what `peft` writes and reads: its names, its sizes, and the formula W + scaling * B A."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deepseek.artifact.reading import read_manifest
from deepseek.core.errors import ArtifactError, ConfigError, CorruptArtifactError
from deepseek.models import zoo
from deepseek.models.adapters import attach_, find_tokenizer_folder, open_adapter, save_adapter
from deepseek.models.loading import load_model, make_int8_, save_model
from deepseek.models.model_sources import read_max_length
from deepseek.models.starting_weights import CAUSAL_LM, HeadSpec, StartingModel, open_start
from deepseek.nn.lora import LoRAConfig, find_adapted
from deepseek.nn.packed import pack_

COMMON = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA_LIKE = COMMON | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
GPT2 = COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 2}
TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))

# A model of each family, and layers of it: (name, inputs, outputs, whether weights are stored (in, out)).
FAMILIES: dict[str, tuple[Any, list[tuple[str, int, int, bool]]]] = {
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_LIKE)),
        [("model.layers.0.self_attn.q_proj", 32, 32, False), ("model.layers.1.mlp.down_proj", 48, 32, False)],
    ),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        [("transformer.h.0.attn.c_attn", 32, 96, True), ("transformer.h.1.mlp.c_fc", 32, 128, True)],
    ),
    "phi3": (
        lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**LLAMA_LIKE)),
        [("model.layers.0.self_attn.qkv_proj", 32, 64, False), ("model.layers.1.mlp.gate_up_proj", 32, 96, False)],
    ),
}


def build(family: str, folder: Path) -> Any:
    torch.manual_seed(1)
    model = FAMILIES[family][0]().eval()
    model.save_pretrained(folder)
    return model


def write_adapter(
    folder: Path, base: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any] | None = None
) -> Path:
    """As `peft` writes one."""
    folder.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 4}
    values |= {"lora_alpha": 6, "bias": "none", "modules_to_save": None} | (settings or {})
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def draw_pair(name: str, num_in: int, num_out: int, rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    a, b = torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator)
    return {f"{name}.lora_A.weight": a * 0.2, f"{name}.lora_B.weight": b * 0.2}


def correct_(model: Any, tensors: dict[str, torch.Tensor], scaling: float, *, is_stored_in_out: bool) -> None:
    """Add scaling * B A to the weights of `model` of `transformers`."""
    for name in [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]:
        delta = scaling * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        weight = model.get_parameter(f"{name}.weight")
        weight.data += delta.T if is_stored_in_out else delta


def fill_(start: StartingModel) -> None:
    generator = torch.Generator().manual_seed(5)
    for layer in find_adapted(start.model).values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator) * 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_stabilized", [False, True])
def test_an_adapter_of_peft_is_the_formula_on_its_base(family: str, is_stabilized: bool, tmp_path: Path) -> None:
    theirs = build(family, tmp_path / "base")
    tensors: dict[str, torch.Tensor] = {}
    for name, num_in, num_out, _ in FAMILIES[family][1]:
        tensors |= draw_pair(name, num_in, num_out)
    write_adapter(tmp_path / "adapter", tmp_path / "base", tensors, {"use_rslora": is_stabilized})
    before = theirs(TOKENS).logits
    correct_(theirs, tensors, 6 / (2 if is_stabilized else 4), is_stored_in_out=family == "gpt2")
    expected = theirs(TOKENS).logits
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(load_model(tmp_path / "adapter")(TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_ranks_and_alphas_of_single_layers_are_read(tmp_path: Path) -> None:
    theirs = build("llama", tmp_path / "base")
    plain = draw_pair("model.layers.0.self_attn.q_proj", 32, 32)
    other = draw_pair("model.layers.0.self_attn.v_proj", 32, 16, rank=2)
    settings = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 10}}
    write_adapter(tmp_path / "adapter", tmp_path / "base", plain | other, settings)
    correct_(theirs, plain, 6 / 4, is_stored_in_out=False)
    correct_(theirs, other, 10 / 2, is_stored_in_out=False)
    torch.testing.assert_close(load_model(tmp_path / "adapter")(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_modules_that_peft_saved_whole_take_the_place_of_the_bases(tmp_path: Path) -> None:
    theirs = build("gpt2", tmp_path / "base")  # its head is tied to the embedding, and no longer afterwards
    head = torch.randn(64, 32) * 0.1
    pair = draw_pair("transformer.h.0.attn.c_proj", 32, 32)
    write_adapter(
        tmp_path / "adapter", tmp_path / "base", pair | {"lm_head.weight": head}, {"modules_to_save": ["lm_head"]}
    )
    correct_(theirs, pair, 6 / 4, is_stored_in_out=True)
    theirs.lm_head.weight = torch.nn.Parameter(head)
    torch.testing.assert_close(load_model(tmp_path / "adapter")(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [("all-linear",), ("v_proj",)])
def test_what_is_written_is_the_formula_under_pefts_names(
    family: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    theirs = build(family, tmp_path / "base")
    start = open_start(tmp_path / "base", CAUSAL_LM)
    config = LoRAConfig(rank=4, alpha=6, targets=targets)
    attach_(start, config)
    fill_(start)
    manifest = save_adapter(start.model, tmp_path / "adapter", start, config)
    assert manifest.parent_digest == start.parent_digest
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert all(name.startswith("base_model.model.") for name in tensors)
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    for name in [name.removesuffix(".lora_A.weight") for name in plain if name.endswith(".lora_A.weight")]:
        pair = {f"{name}.lora_{which}.weight": plain[f"{name}.lora_{which}.weight"] for which in "AB"}
        rank = settings["rank_pattern"].get(name, settings["r"])
        assert pair[f"{name}.lora_A.weight"].shape[0] == rank
        scaling = settings["alpha_pattern"].get(name, settings["lora_alpha"]) / rank
        correct_(theirs, pair, scaling, is_stored_in_out=family == "gpt2")
        assert any(name == target or name.endswith(f".{target}") for target in settings["target_modules"])
    ours = start.model.eval()(TOKENS)
    torch.testing.assert_close(ours, theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load_model(tmp_path / "adapter")(TOKENS), ours, rtol=1e-4, atol=1e-5)


def test_targets_may_have_the_names_of_hugging_face(tmp_path: Path) -> None:
    build("gpt2", tmp_path / "base")
    start = open_start(tmp_path / "base", CAUSAL_LM)
    targets = attach_(start, LoRAConfig(targets=("c_attn", "h.1.mlp.c_fc")))
    expected = {f"layers.{layer}.attention.{part}_proj" for layer in range(2) for part in "qkv"}
    assert set(targets) == expected | {"layers.1.feedforward.up_proj"}


def test_a_classifiers_new_head_is_saved_with_its_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "bert")
    head = HeadSpec("sequence_classification", 3, ("a", "b", "c"))
    start = open_start(tmp_path / "bert", head)
    config = LoRAConfig(rank=2, targets=("query", "value"))
    attach_(start, config)
    fill_(start)
    save_adapter(start.model, tmp_path / "adapter", start, config)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert settings["target_modules"] == ["query", "value"]
    again = load_model(tmp_path / "adapter")
    assert again.module.config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    torch.testing.assert_close(again(TOKENS), start.model.eval()(TOKENS))


def test_an_adapter_on_a_named_model_finds_its_weights_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"image_size": 32, "hidden_size": 24, "num_heads": 2, "num_layers": 2, "mlp_size": 32}
    vit = zoo.build("vit_b_16", **shape, num_classes=7)
    save_file({name: tensor.clone() for name, tensor in vit.state_dict().items()}, tmp_path / "vit.safetensors")
    head = HeadSpec("image_classification", 3)
    start = open_start("vit_b_16", head, weights=tmp_path / "vit.safetensors", settings=shape)
    config = LoRAConfig(rank=2)
    attach_(start, config)
    fill_(start)
    save_adapter(start.model, tmp_path / "adapter", start, config)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        load_model(tmp_path / "adapter")(images), start.model.eval()(images), rtol=1e-4, atol=1e-5
    )


def test_an_adapter_on_int8_weights_stays_beside_them(tmp_path: Path) -> None:
    build("llama", tmp_path / "base")
    save_model(make_int8_(open_start(tmp_path / "base", CAUSAL_LM).model), tmp_path / "int8")
    start = open_start(tmp_path / "int8", CAUSAL_LM, allow_int8=True)
    config = LoRAConfig(rank=2)
    attach_(start, config)
    fill_(start)
    save_adapter(start.model, tmp_path / "adapter", start, config)
    expected = start.model.eval()(TOKENS)
    again = load_model(tmp_path / "adapter")
    assert len(find_adapted(again.module)) == 14
    torch.testing.assert_close(again(TOKENS), expected)
    torch.testing.assert_close(pack_(again.module)(TOKENS), expected)
    with pytest.raises(ArtifactError, match="has adapters beside its weights; save_adapter writes them alone"):
        save_model(load_model(tmp_path / "adapter"), tmp_path / "whole")


def test_another_base_is_refused_by_its_digest(tmp_path: Path) -> None:
    build("llama", tmp_path / "base")
    start = open_start(tmp_path / "base", CAUSAL_LM)
    config = LoRAConfig(rank=2)
    attach_(start, config)
    save_adapter(start.model, tmp_path / "adapter", start, config)
    torch.manual_seed(9)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_LIKE)).save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match=rf"was trained on the model {start.parent_digest[:12]} and .*other is"):
        open_adapter(tmp_path / "adapter", tmp_path / "other")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ArtifactError, match="which is not there; give the folder of its base, with --base or base="):
        load_model(tmp_path / "adapter")
    moved = load_model(tmp_path / "adapter", {"base": str(tmp_path / "moved")})
    torch.testing.assert_close(moved(TOKENS), start.model.eval()(TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"peft_type": "IA3"}, ArtifactError, "is an adapter of type 'IA3', and LORA is read only"),
        ({"use_dora": True}, ArtifactError, "uses use_dora of peft, which plain LoRA does not have"),
        ({"bias": "all"}, ArtifactError, "uses bias of peft"),
        ({"task_type": "SEQ_2_SEQ_LM"}, ArtifactError, "was trained for SEQ_2_SEQ_LM, which is not read"),
        ({"lora_alpha": None}, CorruptArtifactError, "has lora_alpha=None, and a finite number is needed"),
        (
            {"base_model_name_or_path": "nobody/nothing"},
            ArtifactError,
            "an adapter on nobody/nothing, which is not there",
        ),
    ],
)
def test_adapters_of_other_kinds_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    build("llama", tmp_path / "base")
    pair = draw_pair("model.layers.0.self_attn.q_proj", 32, 32)
    write_adapter(tmp_path / "adapter", tmp_path / "base", pair, settings)
    with pytest.raises(error, match=message):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 31)},
            r"q_proj with A \[4, 31\] and B \[32, 4\]",
        ),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.full((4, 32), torch.nan)}, "NaN or infinity in model"),
        (
            {"model.layers.0.self_attn.k_proj.lora_A.weight": torch.ones(4, 32)},
            "holds lora_A of model.layers.0.self_attn.k",
        ),
        (
            {"lm_head.weight": torch.ones(3, 3)},
            r"holds head\.weight of shape \[3, 3\], for which its base has no place",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    build("llama", tmp_path / "base")
    pair = draw_pair("model.layers.0.self_attn.q_proj", 32, 32)
    write_adapter(tmp_path / "adapter", tmp_path / "base", pair | change)
    with pytest.raises(ArtifactError, match=message):
        load_model(tmp_path / "adapter")


def test_random_weights_get_no_adapter() -> None:
    shape = {"num_layers": 1, "hidden_size": 24, "ffn_size": 48, "vocab_size": 64}
    with pytest.raises(ConfigError, match=r"there are only random ones \(gpt2 with random weights\)"):
        attach_(open_start("gpt2", CAUSAL_LM, settings=shape), LoRAConfig())


def test_an_adapter_is_no_model_where_a_whole_one_is_needed(tmp_path: Path) -> None:
    build("llama", tmp_path / "base")
    folder = write_adapter(
        tmp_path / "adapter", tmp_path / "base", draw_pair("model.layers.0.self_attn.q_proj", 32, 32)
    )
    with pytest.raises(ArtifactError, match="holds an adapter and no model; make a model of it and its base with"):
        open_start(folder, CAUSAL_LM)
    with pytest.raises(ConfigError, match="is an adapter and a backend was asked for"):
        load_model(folder, {"backend": "auto"})
    with pytest.raises(ConfigError, match="is no adapter, and base was given"):
        load_model(tmp_path / "base", {"base": str(folder)})


def test_an_adapter_takes_as_many_tokens_as_its_base(tmp_path: Path) -> None:
    build("gpt2", tmp_path / "base")
    folder = write_adapter(tmp_path / "adapter", tmp_path / "base", {})
    assert read_max_length(folder) == read_max_length(tmp_path / "base") == 1024
    assert read_max_length(write_adapter(tmp_path / "lost", tmp_path / "nowhere", {})) is None


def test_the_tokenizer_is_the_adapters_or_the_bases(tmp_path: Path) -> None:
    build("llama", tmp_path / "base")
    folder = write_adapter(
        tmp_path / "adapter", tmp_path / "base", draw_pair("model.layers.0.self_attn.q_proj", 32, 32)
    )
    assert find_tokenizer_folder(folder) == tmp_path / "base"
    (folder / "tokenizer.json").write_text("{}")
    assert find_tokenizer_folder(folder) == folder
    assert find_tokenizer_folder(tmp_path / "base") == tmp_path / "base"
    assert not (folder / "manifest.json").exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's own calls
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_itself_agrees_both_ways(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    build(family, tmp_path / "base")
    kind = type(FAMILIES[family][0]())
    names = sorted({name.rpartition(".")[2] for name, *_ in FAMILIES[family][1]})
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=names, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"
    )
    theirs = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), settings).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(load_model(tmp_path / "theirs")(TOKENS), theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    start = open_start(tmp_path / "base", CAUSAL_LM)
    config = LoRAConfig(rank=4, alpha=6)
    attach_(start, config)
    fill_(start)
    save_adapter(start.model, tmp_path / "ours", start, config)
    read = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    torch.testing.assert_close(read(TOKENS).logits, start.model.eval()(TOKENS), rtol=1e-5, atol=1e-5)
    assert read_manifest(tmp_path / "ours").parent_digest == start.parent_digest
