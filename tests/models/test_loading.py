import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deepseek.artifact.format import Description
from deepseek.artifact.reading import open_artifact, read_manifest
from deepseek.artifact.writing import write_artifact
from deepseek.core.errors import ArtifactError, ConfigError, CorruptArtifactError, UnsafeFileError
from deepseek.data.tokenizing import load_tokenizer, train_tokenizer
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import count_stored_bytes, load_decoder, load_model, make_int8_, save_model
from deepseek.nn.masks import MaskConfig
from deepseek.nn.moe import MoEConfig
from tests.models.decoders import EXAMPLES, SMALL, randomize

OURS_ONLY = {
    "masked experts": DecoderConfig(**SMALL, moe=MoEConfig(num_experts=4, balance_rate=0.1), mask=MaskConfig()),
    "progressive routing": DecoderConfig(**SMALL, moe=MoEConfig(num_candidates=4), tie_embeddings=False),
    "layer norm, rotary": DecoderConfig(**SMALL, norm="layer"),
}
TOKENS_BT = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model, tokens_BT=TOKENS_BT):
    with torch.inference_mode():
        return model(tokens_BT)


@pytest.fixture
def model():
    return randomize(Decoder(EXAMPLES["llama with biases, tied"]))


@pytest.mark.parametrize("config", (EXAMPLES | OURS_ONLY).values(), ids=EXAMPLES | OURS_ONLY)
def test_a_saved_model_loads_with_the_same_weights_and_config(tmp_path, config):
    model = randomize(Decoder(config))
    for name, buffer in model.named_buffers():
        if name.endswith("balance_bias_E") and config.moe.balance_rate:
            buffer.copy_(torch.tensor([0.5, -0.25, 0, 1]))
    manifest = save_model(model, tmp_path / "model", metrics={"heldout_loss": 1.5}, config_digest="c" * 64)
    loaded = load_model(tmp_path / "model")
    assert loaded.config == config
    assert manifest.layout == ("deepseek" if config in OURS_ONLY.values() else "huggingface")
    assert read_manifest(tmp_path / "model") == manifest
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(dict(loaded.named_buffers()), dict(model.named_buffers()), rtol=0, atol=0)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not loaded.training


@pytest.mark.parametrize("config", EXAMPLES.values(), ids=EXAMPLES)
def test_transformers_opens_the_same_folder(tmp_path, config):
    model = randomize(Decoder(config))
    save_model(model, tmp_path / "model")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.dtype is torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(logits(model), theirs(TOKENS_BT).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_folder_that_transformers_wrote_loads(tmp_path, name, max_shard_size):
    torch.manual_seed(0)
    sizes = {
        "llama": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
    }
    sizes["mixtral"] = sizes["llama"] | {"num_key_value_heads": 2, "num_local_experts": 3}
    config = transformers.AutoConfig.for_model(name, vocab_size=64, **sizes[name])
    theirs = randomize(transformers.AutoModelForCausalLM.from_config(config))
    theirs.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (max_shard_size == "10KB")
    with torch.inference_mode():
        torch.testing.assert_close(
            logits(load_model(tmp_path / "model")), theirs(TOKENS_BT).logits, rtol=1e-5, atol=1e-4
        )


def test_parameters_are_the_mapped_file_itself(tmp_path, model):
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(tmp_path / "model" / "model.safetensors")):
            start, _, end = line.split()[0].partition("-")
            mapped.append(range(int(start, 16), int(end, 16)))
    assert all(any(each.data_ptr() in part for part in mapped) for each in loaded.parameters())


def test_training_a_loaded_model_leaves_its_file(tmp_path, model):
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model").train()
    loaded(TOKENS_BT).logsumexp(-1).mean().backward()
    torch.optim.SGD(loaded.parameters(), lr=1.0).step()
    assert not torch.equal(loaded.embed.weight, model.embed.weight)
    open_artifact(tmp_path / "model")


def test_tied_weights_are_one_parameter_and_stored_once(tmp_path, model):
    save_model(model, tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    loaded = load_model(tmp_path / "model")
    assert loaded.head.weight is loaded.embed.weight
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


def test_loading_draws_no_random_numbers(tmp_path, model):
    save_model(model, tmp_path / "model")
    before = torch.get_rng_state()
    load_model(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_bf16_is_a_choice_when_saving_and_when_loading(tmp_path, name):
    model = randomize(Decoder(EXAMPLES[name]))
    save_model(model, tmp_path / "wide")
    assert save_model(model, tmp_path / "narrow", precision="bf16").precision == "bf16"
    rounded = {key: each.bfloat16() for key, each in model.named_parameters()}
    for loaded in (load_model(tmp_path / "wide", precision="bf16"), load_model(tmp_path / "narrow")):
        torch.testing.assert_close(dict(loaded.named_parameters()), rounded, rtol=0, atol=0)
        assert all(each.dtype is torch.float32 for _, each in loaded.named_buffers())
    widened = load_model(tmp_path / "narrow", precision="fp32")
    torch.testing.assert_close(
        dict(widened.named_parameters()), {key: each.float() for key, each in rounded.items()}, rtol=0, atol=0
    )
    with pytest.raises(ConfigError, match="did you mean 'bf16'"):
        load_model(tmp_path / "wide", precision="bf61")


def test_the_tokenizer_goes_along_and_names_the_end_of_a_text(tmp_path, model):
    tokenizer = train_tokenizer(["a b c " * 50], vocab_size=258)
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    assert load_tokenizer(tmp_path / "model").encode("a b é") == tokenizer.encode("a b é")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    assert "tokenizer.json" in read_manifest(tmp_path / "model").files


def test_provenance_is_kept(tmp_path, model):
    first = save_model(model, tmp_path / "first", data_position={"epoch": 2})
    second = save_model(model, tmp_path / "second", parent_digest=first.digest, plan={"tp": 1})
    assert second.digest == first.digest  # the same files
    manifest = read_manifest(tmp_path / "second")
    assert (manifest.parent_digest, manifest.plan) == (first.digest, {"tp": 1})
    assert read_manifest(tmp_path / "first").data_position == {"epoch": 2}


def test_saving_over_something_needs_to_be_asked_for(tmp_path, model):
    save_model(model, tmp_path / "model")
    with pytest.raises(
        ArtifactError, match="holds an artifact already; give another folder, or ask for it to be overwritten"
    ):
        save_model(model, tmp_path / "model")
    save_model(model, tmp_path / "model", overwrite=True)


def test_only_decoders_are_saved(tmp_path):
    with pytest.raises(ArtifactError, match="was given a Linear"):
        save_model(torch.nn.Linear(1, 1), tmp_path / "model")


def test_a_flipped_byte_is_found_on_loading(tmp_path, model):
    save_model(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"model\.safetensors"):
        load_model(tmp_path / "model")
    load_model(tmp_path / "model", verify=False)


@pytest.mark.parametrize("config", (EXAMPLES | OURS_ONLY).values(), ids=EXAMPLES | OURS_ONLY)
def test_an_int8_model_comes_back_with_the_same_layers_and_answers(tmp_path, config):
    model = make_int8_(randomize(Decoder(config)))
    manifest = save_model(model, tmp_path / "model")
    assert (manifest.precision, manifest.layout) == ("int8", "deepseek")
    loaded = load_model(tmp_path / "model")
    assert [type(each) for each in loaded.modules()] == [type(each) for each in model.modules()]
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    if config.tie_embeddings:
        assert loaded.head.weight is loaded.embed.weight and loaded.head.weight_scale is loaded.embed.weight_scale


def test_stored_bytes_are_those_of_the_weight_file(tmp_path, model):
    for name, each in {"float": model, "int8": make_int8_(copy.deepcopy(model))}.items():
        save_model(each, tmp_path / name)
        stored = load_file(tmp_path / name / "model.safetensors")
        assert count_stored_bytes(each) == sum(tensor.nbytes for tensor in stored.values())


def test_an_int8_model_is_not_widened(tmp_path, model):
    save_model(make_int8_(model), tmp_path / "model")
    with pytest.raises(ConfigError, match="leave precision out"):
        load_model(tmp_path / "model", precision="fp32")
    torch.testing.assert_close(
        load_model(tmp_path / "model", precision="int8").state_dict(), load_model(tmp_path / "model").state_dict()
    )


@pytest.mark.parametrize("precision", ["int4", "fp8"])
def test_a_precision_that_is_not_known_is_refused(tmp_path, model, precision):
    manifest = save_model(model, tmp_path / "model")
    fields = manifest.model_dump(include=set(Description.model_fields)) | {"precision": precision}
    write_artifact(tmp_path / "other", {"weight": torch.zeros(1)}, Description(**fields))
    with pytest.raises(ConfigError, match=f"unknown precision '{precision}'"):
        load_model(tmp_path / "other")


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    return load_model(smollm2_folder)


class TestForeignFolders:
    @pytest.fixture
    def folder(self, tmp_path, model):
        """A Hugging Face folder: no manifest."""
        save_model(model, tmp_path / "model")
        (tmp_path / "model" / "manifest.json").unlink()
        return tmp_path / "model"

    def test_it_loads_without_a_manifest(self, folder, model):
        torch.testing.assert_close(logits(load_model(folder)), logits(model), rtol=1e-5, atol=1e-5)

    def test_a_copy_of_a_tied_head_stays_tied(self, folder, model):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        save_file(tensors | {"lm_head.weight": model.embed.weight.detach().clone()}, path, metadata={"format": "pt"})
        loaded = load_model(folder)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
        assert loaded.config.tie_embeddings and loaded.head.weight is loaded.embed.weight

    def test_another_head_in_the_file_is_the_head_whatever_the_config_says(self, folder, model, tmp_path):
        path = folder / "model.safetensors"
        head = torch.randn(model.embed.weight.shape, generator=torch.Generator().manual_seed(0))
        save_file(load_file(path) | {"lm_head.weight": head}, path, metadata={"format": "pt"})
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
        loaded = load_model(folder)
        with torch.no_grad():
            model.head.weight = torch.nn.Parameter(head)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
        assert not loaded.config.tie_embeddings
        save_model(loaded, tmp_path / "again")  # and it stays so in the next artifact
        torch.testing.assert_close(logits(load_model(tmp_path / "again")), logits(model), rtol=1e-5, atol=1e-5)

    def test_a_file_without_a_head_is_tied_whatever_the_config_says(self, folder, model):
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.warns(UserWarning, match="has no head, .* set tie_word_embeddings to true if that is right"):
            loaded = load_model(folder)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)

    def test_only_a_pickle_is_refused(self, folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        load_model(folder)  # the safe file is there as well
        (folder / "model.safetensors").unlink()
        with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin is a pickle"):
            load_model(folder)
        with pytest.raises(UnsafeFileError, match="pickle"):
            load_model(folder / "pytorch_model.bin")

    def test_a_pickle_in_disguise_is_refused(self, folder):
        (folder / "model.safetensors").write_bytes(pickle.dumps({"weight": [1.0] * 100}))
        with pytest.raises(UnsafeFileError, match="pickle"):
            load_model(folder)

    def test_a_truncated_file_is_named(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CorruptArtifactError, match=r"model\.safetensors is not a whole safetensors file"):
            load_model(folder)

    def test_a_missing_file_is_named(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(ArtifactError, match=r"model\.safetensors is missing"):
            load_model(folder)

    def test_weights_of_another_shape_are_explained(self, folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 47}))
        with pytest.raises(
            ArtifactError, match=r"do not fit the model: layers\.0\.feedforward.* instead of .*; give the weights"
        ):
            load_model(folder)

    @pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": "bert"}'])
    def test_a_config_that_says_nothing_is_refused(self, folder, content):
        (folder / "config.json").write_text(content)
        with pytest.raises((CorruptArtifactError, ConfigError), match=r"config\.json|unknown Hugging Face model type"):
            load_model(folder)

    @pytest.mark.parametrize("weight_map", [None, {"a": "../model.safetensors"}, {"a": 3}, []])
    def test_an_index_that_leaves_the_folder_is_refused(self, folder, weight_map):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ArtifactError):
            load_model(folder)

    def test_a_folder_without_a_model_is_explained(self, tmp_path):
        with pytest.raises(ArtifactError, match=r"neither manifest\.json nor config\.json"):
            load_model(tmp_path)
        with pytest.raises(ArtifactError, match="does not exist"):
            load_model(tmp_path / "nothing")


class TestRealWeights:
    PROMPTS = (
        "The capital of France is",
        "def fibonacci(n):\n    ",
        "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    )

    def test_logits_are_those_of_transformers(self, smollm2, smollm2_folder):
        theirs = transformers.LlamaForCausalLM.from_pretrained(smollm2_folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
        for prompt in self.PROMPTS:
            tokens_BT = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.inference_mode():
                torch.testing.assert_close(logits(smollm2, tokens_BT), theirs(tokens_BT).logits, rtol=0, atol=1e-4)

    def test_an_artifact_of_it_opens_in_transformers(self, smollm2, smollm2_folder, tmp_path):
        tokenizer = load_tokenizer(smollm2_folder)
        manifest = save_model(smollm2, tmp_path / "model", tokenizer=tokenizer, precision="bf16")
        assert (manifest.layout, manifest.precision) == ("huggingface", "bf16")
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        ours = load_model(tmp_path / "model", precision="fp32")
        tokens_BT = torch.tensor([tokenizer.encode(self.PROMPTS[0])])
        with torch.inference_mode():
            torch.testing.assert_close(logits(ours, tokens_BT), theirs(tokens_BT).logits, rtol=0, atol=1e-4)

    @pytest.mark.parametrize(("prompt", "answer"), [(PROMPTS[0], " Paris"), (PROMPTS[2], "Blue")])
    def test_it_answers_in_english(self, smollm2, smollm2_folder, prompt, answer):
        tokenizer = load_tokenizer(smollm2_folder)
        ids = tokenizer.encode(prompt)
        num_prompt = len(ids)
        for _ in range(12):
            ids.append(int(logits(smollm2, torch.tensor([ids]))[0, -1].argmax()))
        assert answer.lower() in tokenizer.decode(ids[num_prompt:]).lower()


def test_a_model_that_is_no_decoder_is_refused_with_the_families_that_are(tmp_path):
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    for packed in (False, True):
        with pytest.raises(
            ConfigError, match=r"holds a BertForMaskedLM, .* families llama, gpt2, .*; give one of them"
        ):
            load_decoder(tmp_path / "bert", packed=packed)
