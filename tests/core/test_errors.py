import inspect
import pickle
import re

import pytest

from deepseek.core import errors
from deepseek.core.errors import (
    AddressInUseError,
    ConfigError,
    DeepSeekError,
    MissingExtraError,
    PermanentError,
    RequestError,
    StorageError,
    TemporaryError,
)

CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, DeepSeekError)]


def read_drawn_tree():
    """Name -> (parent, builtin base) from the picture in the module's docstring, by indentation."""
    tree, path = {}, []
    for line in errors.__doc__.splitlines():
        drawn = re.match(r"    ([|` -]*)([A-Z]\w+Error)\b(.*)", line)
        if drawn is None:
            continue
        depth = len(drawn[1]) // 4
        also = re.search(r"also an? (\w+)", drawn[3])
        path = [*path[:depth], drawn[2]]
        tree[drawn[2]] = (path[depth - 1] if depth else None, also and also[1])
    return tree


def test_the_drawn_tree_is_the_tree():
    ours = {each.__name__ for each in CLASSES}
    real = {}
    for each in CLASSES:
        parents = [base.__name__ for base in each.__bases__ if base.__name__ in ours]
        builtins = [base.__name__ for base in each.__bases__ if base.__name__ not in ours and base is not Exception]
        assert len(parents) <= 1 and len(builtins) <= 1
        real[each.__name__] = (parents[0] if parents else None, builtins[0] if builtins else None)
    assert read_drawn_tree() == real


def test_every_error_says_by_its_type_whether_to_try_again():
    halves = (PermanentError, TemporaryError)
    for each in CLASSES:
        if each is not DeepSeekError and each not in halves:
            assert sum(issubclass(each, half) for half in halves) == 1


@pytest.mark.parametrize(
    ("ours", "builtin"),
    [
        (ConfigError, ValueError),
        (MissingExtraError, ImportError),
        (StorageError, OSError),
        (AddressInUseError, OSError),
    ],
)
def test_code_that_catches_the_builtin_catches_ours(ours, builtin):
    with pytest.raises(builtin, match="said"):
        raise ours("said")


def test_a_request_error_carries_what_the_http_answer_needs_also_between_processes():
    error = RequestError("too long", status=413, param="prompt", code="context_length_exceeded")
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert (str(each), each.status, each.param, each.code) == (
            "too long",
            413,
            "prompt",
            "context_length_exceeded",
        )
    assert (RequestError("no").status, RequestError("no").param, RequestError("no").code) == (400, None, None)
