"""Tokens and what is learned of them, against transformers, and against the same template with marks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from deepseek.core.errors import DataError
from deepseek.data.chat_tokens import ChatEncoder
from deepseek.data.chats import Chat
from deepseek.data.samples import BrokenSampleError
from deepseek.data.token_cache import EncodedPiece
from tests.data.chat_examples import CHATML, CHATS, SCHEMAS, TEMPLATES, make_tokenizer, without_marks


def chat_of(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> Chat:
    return Chat("chats.jsonl:0", tuple(messages), tuple(tools) if tools else None)


def encode(encoder: ChatEncoder, *chats: Chat) -> list[EncodedPiece]:
    return [piece for pieces in encoder.encode(chat.to_document() for chat in chats) for piece in pieces]


def theirs(template: str, chat: Chat) -> tuple[list[int], list[int]]:
    """Tokens and the assistant's mask, as transformers has them."""
    ours = make_tokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=ours.backend, bos_token="<s>", eos_token="</s>")
    found = tokenizer.apply_chat_template(
        list(chat.messages),
        tools=None if chat.tools is None else list(chat.tools),
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("has_marks", [True, False], ids=["marks", "beginnings"])
@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_tokens_and_the_mask_are_those_of_transformers(template: str, name: str, has_marks: bool) -> None:
    chat = chat_of(CHATS[name], SCHEMAS if name == "tools" else None)
    ours = make_tokenizer(template if has_marks else without_marks(template))
    (piece,) = encode(ChatEncoder(ours), chat)
    ids, mask = theirs(template, chat)
    assert piece.ids == ids
    assert piece.learned is not None
    assert piece.learned.astype(int).tolist() == mask
    assert 0 < sum(mask) < len(mask)


# Its first token is two line ends, of which one is the template's.
LAST = "\n\n Four é\U0001f600<|im_end|>"


def learned_text(encoder: ChatEncoder, chat: Chat) -> str:
    (piece,) = encode(encoder, chat)
    assert piece.learned is not None
    return encoder.tokenizer.decode(np.asarray(piece.ids)[piece.learned].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("template", [CHATML, without_marks(CHATML)], ids=["marks", "beginnings"])
def test_the_last_answer_or_everything_can_be_learned_instead(template: str) -> None:
    tokenizer, chat = make_tokenizer(template), chat_of(CHATS["system and several turns"])
    assert learned_text(ChatEncoder(tokenizer, train_on="last"), chat) == LAST
    (whole,) = encode(ChatEncoder(tokenizer, train_on="all"), chat)
    assert whole.learned is not None
    assert whole.learned.all()


@pytest.mark.parametrize("template", [CHATML, without_marks(CHATML)], ids=["marks", "beginnings"])
def test_answers_of_weight_0_are_not_learned(template: str) -> None:
    messages = [dict(message) for message in CHATS["system and several turns"]]
    messages[2]["weight"] = 0
    encoder = ChatEncoder(make_tokenizer(template))
    assert learned_text(encoder, chat_of(messages)) == LAST


def test_chats_without_an_answer_are_counted_and_left_out_unless_they_are_all() -> None:
    question = chat_of(CHATS["one turn"][:1])
    encoder = ChatEncoder(make_tokenizer(CHATML))
    assert len(encode(encoder, question, chat_of(CHATS["one turn"]), question)) == 1
    assert encoder.notes == ("2 chats have no answer to learn and are left out",)
    with pytest.raises(DataError, match="no chat to learn from: 1 chats have no answer"):
        encode(ChatEncoder(make_tokenizer(CHATML)), question)


FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.role != 'assistant' or loop.last else m.content.split('.')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_rewrites_earlier_messages_is_refused_by_name_and_its_last_answer_is_learned() -> None:
    chat = chat_of(CHATS["system and several turns"])
    with pytest.raises(BrokenSampleError, match=r"chats.jsonl:0: the chat template writes .* message 2 in another way"):
        ChatEncoder(make_tokenizer(FORGETS)).write(chat)
    encoder = ChatEncoder(make_tokenizer(FORGETS), train_on="last")
    assert learned_text(encoder, chat) == LAST


def test_chats_that_the_template_refuses_are_named_and_limited() -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML
    odd = chat_of(CHATS["one turn"][::-1])
    encoder = ChatEncoder(make_tokenizer(template), max_broken=1)
    assert len(encode(encoder, odd, chat_of(CHATS["one turn"]))) == 1
    assert "begin with the user" in encoder.notes[0]
    assert "chats.jsonl:0" in encoder.notes[0]
    with pytest.raises(DataError, match="2 chats cannot be written and 1 may be left out"):
        encode(ChatEncoder(make_tokenizer(template), max_broken=1), odd, odd)


def test_half_a_surrogate_pair_becomes_the_replacement_character() -> None:
    chat = chat_of([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\ud800c"}])
    assert learned_text(ChatEncoder(make_tokenizer(CHATML)), chat) == "b\N{REPLACEMENT CHARACTER}c<|im_end|>"


def test_variables_reach_the_template_and_everything_that_decides_the_tokens_is_in_the_digest() -> None:
    template = "{{ mood }}" + CHATML
    chat = chat_of(CHATS["one turn"])
    calm = ChatEncoder(make_tokenizer(template), variables={"mood": "calm"})
    text, _ = calm.write(chat)
    assert text.startswith("calm<|im_start|>")
    others = [
        ChatEncoder(make_tokenizer(template)),
        ChatEncoder(make_tokenizer(CHATML), variables={"mood": "calm"}),
        ChatEncoder(make_tokenizer(template), variables={"mood": "calm"}, train_on="last"),
    ]
    assert len({calm.digest, *(other.digest for other in others)}) == 4


def test_many_chats_stay_in_their_order() -> None:
    chats = [
        chat_of([{"role": "user", "content": str(number)}, {"role": "assistant", "content": f"<{number}>"}])
        for number in range(150)
    ]
    encoder = ChatEncoder(make_tokenizer(CHATML))
    texts = [encoder.tokenizer.decode(piece.ids) for piece in encode(encoder, *chats)]
    assert [f"<{number}>" in text for number, text in enumerate(texts)] == [True] * 150
