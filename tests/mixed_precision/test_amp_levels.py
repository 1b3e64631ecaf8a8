import pytest

from deepseek.core.errors import ConfigError
from deepseek.mixed_precision import choose_level


@pytest.mark.parametrize(
    ("level", "settings", "environment", "expected"),
    [
        (None, None, {}, "O1"),
        (None, {}, {"DS_AMP_LEVEL": ""}, "O1"),
        (None, None, {"DS_AMP_LEVEL": "O0"}, "O0"),
        (None, {"ds_amp_level": "O2"}, {"DS_AMP_LEVEL": "O0"}, "O2"),
        ("O0", {"ds_amp_level": "O2"}, {"DS_AMP_LEVEL": "O1"}, "O0"),
    ],
)
def test_what_is_said_nearest_to_the_code_decides(level, settings, environment, expected):
    assert choose_level(level, settings=settings, environment=environment) == expected


def test_the_environment_of_the_process_is_read(monkeypatch):
    monkeypatch.setenv("DS_AMP_LEVEL", "O2")
    assert choose_level() == "O2"


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        ({"level": "O3"}, "level"),
        ({"settings": {"ds_amp_level": "o1"}}, "ds_amp_level"),
        ({"settings": {"ds_amp_level": 2}}, "ds_amp_level"),
        ({"environment": {"DS_AMP_LEVEL": "02"}}, "DS_AMP_LEVEL"),
    ],
)
def test_an_unknown_level_is_refused_with_where_it_stood(arguments, source):
    with pytest.raises(ConfigError, match=rf"unknown {source} .*known: O0, O1, O2"):
        choose_level(**{"environment": {}} | arguments)
