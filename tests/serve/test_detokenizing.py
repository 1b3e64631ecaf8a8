"""Text that leaves piece by piece is the text that would leave at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepseek.data.tokenizing import StreamDecoder, Tokenizer
from deepseek.serve.detokenizing import TextWriter, find_stop, num_open


class Pieces:
    """A decoder whose token i is the i-th of some strings."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def finish(self) -> str:
        return ""


def write(pieces: list[str], stop: tuple[str, ...]) -> tuple[list[str], TextWriter, list[int]]:
    writer = TextWriter(Pieces(pieces), stop)
    texts, tokens = [], []
    for token_id in range(len(pieces)):
        text, released = writer.push(token_id)
        texts.append(text)
        tokens += [token.id for token in released]
        if writer.is_stopped:
            return texts, writer, tokens
    text, released = writer.finish()
    return [*texts, text], writer, tokens + [token.id for token in released]


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Brute force: read on character by character until a stop string is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(each) for each in stop if text[:end].endswith(each)]
        if starts:
            return text[: min(starts)]
    return text


short = st.text("ab\n", max_size=4)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3).map(tuple)


@given(pieces=st.lists(short, max_size=12), stop=stops)
def test_the_pieces_together_end_before_the_first_stop_string(pieces: list[str], stop: tuple[str, ...]) -> None:
    texts, writer, _ = write(pieces, stop)
    assert "".join(texts) == cut("".join(pieces), stop)
    assert writer.is_stopped == any(each in "".join(pieces) for each in stop)


@given(pieces=st.lists(short, max_size=12), stop=stops)
def test_text_is_kept_back_only_while_it_may_become_a_stop_string(pieces: list[str], stop: tuple[str, ...]) -> None:
    writer = TextWriter(Pieces(pieces), stop)
    sent = ""
    for token_id, _ in enumerate(pieces):
        sent += writer.push(token_id)[0]
        if writer.is_stopped:
            return
        kept = "".join(pieces[: token_id + 1])[len(sent) :]
        assert kept == "" or any(each.startswith(kept) for each in stop)


@given(pieces=st.lists(short, max_size=12))
def test_without_stop_strings_all_tokens_come_out_in_order(pieces: list[str]) -> None:
    _, _, tokens = write(pieces, ())
    assert tokens == list(range(len(pieces)))


def test_tokens_of_the_stop_string_are_left_out() -> None:
    texts, writer, tokens = write(["one", " tw", "o\n", "\nmore"], ("\n\n",))
    assert writer.is_stopped
    assert "".join(texts) == "one two"
    assert tokens == [0, 1, 2]


def test_a_token_waits_as_long_as_its_text() -> None:
    writer = TextWriter(Pieces(["a", "##", "# b"]), ("###!",))
    assert [(text, [token.offset for token in tokens]) for text, tokens in map(writer.push, range(3))] == [
        ("a", [0]),
        ("", []),
        ("### b", [1, 3]),
    ]


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert find_stop("xabc", ("abc", "ab")) == 1
    assert find_stop("xabc", ("bc", "abc")) == 1
    assert find_stop("xabc", ("q",)) is None


def test_only_a_proper_beginning_is_kept_back() -> None:
    assert num_open("abc", ("cde", "bcd")) == 2
    assert num_open("abc", ()) == 0


def test_characters_of_several_tokens_come_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Größe 漢字 🎉 x")
    writer = TextWriter(StreamDecoder(tokenizer), ())
    texts = [writer.push(token_id)[0] for token_id in ids] + [writer.finish()[0]]
    assert "".join(texts) == "Größe 漢字 🎉 x"
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def test_half_a_character_at_the_end_is_marked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🎉")[:-1]
    writer = TextWriter(StreamDecoder(tokenizer), ())
    texts = [writer.push(token_id)[0] for token_id in ids]
    rest, tokens = writer.finish()
    assert "".join(texts) == "x"
    assert rest == tokenizer.decode(ids)[1:]
    assert rest.startswith("\N{REPLACEMENT CHARACTER}")
    assert tokens
