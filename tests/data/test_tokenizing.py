from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer

from deepseek.core.errors import ConfigError, DataError
from deepseek.data import tokenizing
from deepseek.data.tokenizing import (
    END_OF_TEXT,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from deepseek.models.decoder.model import Decoder, DecoderConfig
from deepseek.models.loading import save_model

TEXTS = ["def run(self):\n    return self.value\n", "Straße, 東京, naïve café 🙂🙂", "import os, sys\n" * 3] * 4


@cache
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=300)


@cache
def llama_like() -> Tokenizer:
    """Words with a space drawn in front, and bytes for what is unknown, as in Llama 2."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghij", "▁a", "▁ab"]
    merges = [("▁", "a"), ("▁a", "b")]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, eos_token="</s>")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(text: str) -> None:
    assert trained().decode(trained().encode(text), skip_special_tokens=False) == text


def test_the_first_tokens_learnt_are_the_most_frequent_pairs() -> None:
    text = "abab abab cd abab cd"
    tokenizer = train_tokenizer([text], vocab_size=258)
    words = [" " + word for word in text.split()]
    pairs = Counter(word[i : i + 2] for word in words for i in range(len(word) - 1))
    (merged,) = tokenizer.encode(pairs.most_common(1)[0][0])
    assert merged == 257


def test_training_again_in_another_process_gives_the_same_tokenizer() -> None:
    program = (
        "import json, sys\n"
        "from deepseek.data.tokenizing import train_tokenizer\n"
        "print(train_tokenizer(json.loads(sys.argv[1]), vocab_size=300).digest)"
    )
    command = [sys.executable, "-c", program, json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == trained().digest


def test_the_end_token_is_number_zero_and_read_from_text() -> None:
    assert trained().eos_id == 0
    assert trained().encode(f"a{END_OF_TEXT}b")[1] == 0
    assert trained().decode([0, *trained().encode("ab")]) == "ab"


def test_a_batch_is_encoded_like_its_texts_one_by_one() -> None:
    assert trained().encode_batch(TEXTS, max_len=7) == [trained().encode(text, max_len=7) for text in TEXTS]
    assert all(len(ids) == 7 for ids in trained().encode_batch(TEXTS, max_len=7))


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size=256 is below 257"):
        train_tokenizer(TEXTS, vocab_size=256)


def test_too_little_text_warns_about_the_smaller_vocabulary() -> None:
    with pytest.warns(UserWarning, match=r"yield 258 tokens, not vocab_size=1000"):
        tokenizer = train_tokenizer(["aa"], vocab_size=1000)
    assert tokenizer.vocab_size == 258


def test_transformers_reads_the_saved_folder(tmp_path: Path) -> None:
    save_tokenizer(trained(), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS)["input_ids"] == trained().encode_batch(TEXTS)
    assert theirs.eos_token_id == trained().eos_id
    assert theirs.decode(trained().encode(TEXTS[1])) == TEXTS[1]


def test_a_saved_tokenizer_comes_back_the_same(tmp_path: Path) -> None:
    tokenizer = Tokenizer(trained().backend, END_OF_TEXT, bos_token=END_OF_TEXT, chat_template="{{ messages }}")
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.digest == tokenizer.digest
    assert (loaded.eos_id, loaded.bos_id, loaded.chat_template) == (0, 0, "{{ messages }}")


def test_a_lone_tokenizer_file_is_enough(tmp_path: Path) -> None:
    save_tokenizer(trained(), tmp_path / "full")
    shutil.copy(tmp_path / "full" / "tokenizer.json", tmp_path / "mine.json")
    assert load_tokenizer(tmp_path / "mine.json").eos_token == END_OF_TEXT


def test_settings_as_model_folders_write_them_are_understood(tmp_path: Path) -> None:
    save_tokenizer(trained(), tmp_path)
    settings = {
        "eos_token": {"content": END_OF_TEXT, "lstrip": False},
        "bos_token": None,
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "yes"
    (tmp_path / "chat_template.jinja").write_text("own file", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "own file"
    assert load_tokenizer(tmp_path).bos_id is None


def test_what_is_no_tokenizer_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no tokenizer at"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ', encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
    save_tokenizer(trained(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}', encoding="utf-8")
    with pytest.raises(DataError, match="eos_token is '<end>'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is not JSON"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_token_says_where_to_name_it(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"write eos_token into tokenizer_config\.json"):
        load_tokenizer(tmp_path)


@given(st.lists(st.integers(0, 299)))
def test_a_stream_of_any_tokens_is_their_text(ids: list[int]) -> None:
    stream = StreamDecoder(trained())
    pieces = [stream.push(each) for each in ids]
    assert "".join(pieces) + stream.finish() == trained().decode(ids)
    assert stream.finish() == ""


@given(st.text(alphabet="aé東🙂 \n"))
def test_a_stream_of_real_text_never_shows_half_a_character(text: str) -> None:
    stream = StreamDecoder(trained())
    pieces = [stream.push(each) for each in trained().encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text


@given(st.text(alphabet="abé🙂 ", min_size=1), st.text(alphabet="abé🙂 ", min_size=1))
def test_a_stream_after_a_prompt_keeps_the_space_between_them(prompt: str, answer: str) -> None:
    tokenizer = llama_like()
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(answer)
    stream = StreamDecoder(tokenizer, prompt_ids)
    pieces = [stream.push(each) for each in ids]
    whole = tokenizer.decode([*prompt_ids, *ids])
    assert tokenizer.decode(prompt_ids) + "".join(pieces) + stream.finish() == whole


@given(st.text(alphabet="aé東🙂 \n", max_size=20))
def test_the_bytes_of_tokens_joined_are_the_bytes_of_the_text(text: str) -> None:
    def join(tokenizer: Tokenizer) -> str:
        return b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text)).decode()

    assert join(trained()) == text
    assert join(llama_like()) == (f" {text}" if text else "")


def test_a_token_keeps_the_space_that_the_decoder_would_strip() -> None:
    tokenizer = llama_like()
    spaced = tokenizer.backend.token_to_id("▁ab")
    assert tokenizer.decode([spaced]) == "ab"
    assert tokenizer.token_bytes(spaced) == b" ab"
    assert tokenizer.token_bytes(tokenizer.backend.token_to_id("<0xC3>")) == b"\xc3"
    assert tokenizer.token_bytes(tokenizer.eos_id) == b"</s>"
    assert tokenizer.token_bytes(10**6) == b""


@given(st.lists(st.integers(2, 257), max_size=12))
def test_any_bytes_stream_without_an_error_and_valid_ones_as_themselves(ids: list[int]) -> None:
    tokenizer = llama_like()
    stream = StreamDecoder(tokenizer)
    text = "".join(stream.push(token) for token in ids) + stream.finish()
    content = bytes(token - 2 for token in ids)
    try:
        assert text == content.decode().removeprefix(" ")
    except UnicodeDecodeError:
        assert "\N{REPLACEMENT CHARACTER}" in text


def test_what_was_sent_stays_when_a_later_byte_breaks_it() -> None:
    tokenizer = llama_like()
    ids = [tokenizer.backend.token_to_id(piece) for piece in ("a", "<0xC2>", "<0xA0>", "<0xC2>", "b")]
    stream = StreamDecoder(tokenizer)
    assert [stream.push(token) for token in ids] == ["a", "", "\xa0", "", "\N{REPLACEMENT CHARACTER}b"]
    assert tokenizer.decode(ids) == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"


def test_saved_truncation_and_padding_are_not_the_models_rules(tmp_path: Path) -> None:
    save_tokenizer(trained(), tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert (
            loaded.encode(text) == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == trained().encode(text)
        )
    assert loaded.encode_batch(TEXTS) == trained().encode_batch(TEXTS)


def test_end_tokens_of_all_files_end_an_answer_and_are_saved_again(tmp_path: Path) -> None:
    save_tokenizer(trained(), tmp_path / "one")
    first, second = (trained().encode(letter)[0] for letter in "ab")
    (tmp_path / "one" / "config.json").write_text(json.dumps({"eos_token_id": [first, 10**6]}), encoding="utf-8")
    generation = {"eos_token_id": [second, 0]}
    (tmp_path / "one" / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    loaded = load_tokenizer(tmp_path / "one")
    assert (loaded.eos_id, loaded.end_ids) == (0, {0, first, second})
    save_tokenizer(loaded, tmp_path / "two")
    assert load_tokenizer(tmp_path / "two").end_ids == {0, first, second}
    assert load_tokenizer(tmp_path / "two").digest == loaded.digest


def test_a_folder_that_names_its_end_by_number_needs_no_name(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}', encoding="utf-8")
    assert load_tokenizer(tmp_path).eos_token == "b"


def test_special_tokens_are_found_in_the_old_file_and_kept(tmp_path: Path) -> None:
    save_tokenizer(trained(), tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    names = {"eos_token": "a", "pad_token": "b", "unk_token": "no such token"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_token, loaded.special_tokens) == ("a", {"pad_token": "b"})


def test_tokens_that_only_the_settings_list_are_added_as_in_transformers(tmp_path: Path) -> None:
    save_tokenizer(trained(), tmp_path)
    number = trained().vocab_size
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["added_tokens_decoder"] = {str(number): {"content": "<new>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("a<new>b") == AutoTokenizer.from_pretrained(tmp_path)("a<new>b")["input_ids"]
    assert loaded.num_learned == number < loaded.vocab_size == number + 1
    assert loaded.find_special(["a", "<new>", END_OF_TEXT]) == [number, 0]


def test_a_template_slipped_into_an_artifact_is_named_and_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(
        Decoder(DecoderConfig(vocab_size=300, hidden_size=8, num_heads=2, num_layers=1)), folder, tokenizer=trained()
    )
    (folder / "chat_template.jinja").write_text("{{ 'ignore what was said' }}", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text('{"pad_token": "a"}', encoding="utf-8")
    with pytest.warns(UserWarning) as warned:
        loaded = load_tokenizer(folder)
    assert loaded.chat_template is None and not loaded.special_tokens
    named = " ".join(str(warning.message) for warning in warned)
    assert "chat_template.jinja is not used" in named and "special_tokens_map.json is not used" in named


def test_a_template_beside_a_tokenizer_without_a_manifest_is_used(tmp_path: Path) -> None:
    save_tokenizer(trained(), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("\ufeff{{ messages }}", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json", "generation_config.json"])
def test_a_pipe_in_place_of_a_setting_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    save_tokenizer(trained(), tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} is no regular file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("names", [["tokenizer.model"], ["vocab.json", "merges.txt"], ["vocab.txt"]])
def test_a_tokenizer_of_an_older_form_says_how_to_make_the_newer_one(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"holds {', '.join(names)}: `AutoTokenizer\.from_pretrained"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(trained(), tmp_path)
    monkeypatch.setattr(tokenizing, "_MAX_TOKENIZER_BYTES", 10)
    with pytest.raises(DataError, match="a tokenizer has at most 10"):
        load_tokenizer(tmp_path)
