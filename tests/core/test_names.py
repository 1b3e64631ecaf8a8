import string

from hypothesis import given
from hypothesis import strategies as st

from deepseek.core.names import explain_unknown

words = st.text(string.ascii_lowercase, min_size=5, max_size=12)


def test_a_name_like_no_other_gets_all_names_in_order():
    assert explain_unknown("recipe", "zzz", ["b", "a"]) == "unknown recipe 'zzz'; (known: a, b)"


def test_nothing_known_is_said_so():
    assert explain_unknown("recipe", "a", []) == "unknown recipe 'a'; (known: none)"


@given(word=words, place=st.integers(0, 4))
def test_one_wrong_letter_is_forgiven(word, place):
    typo = word[:place] + "0" + word[place + 1 :]
    assert f"did you mean {word!r}?" in explain_unknown("setting", typo, [word, "-" * 20])
