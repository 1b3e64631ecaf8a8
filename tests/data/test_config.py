from __future__ import annotations

import pytest

from deepseek.core.errors import ConfigError
from deepseek.data.config import DataConfig


def test_every_setting_is_documented() -> None:
    assert [name for name, field in DataConfig.model_fields.items() if not field.description] == []


def test_a_misspelt_setting_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sequence_length'"):
        DataConfig(sequence_lenght=8)


def test_a_document_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_len=100 is over max_tokens=50"):
        DataConfig(batching="token_budget", max_len=100, max_tokens=50)
    DataConfig(batching="packed", max_len=100, max_tokens=50)


@pytest.mark.parametrize("settings", [{"sources": []}, {"heldout_fraction": 1}, {"batching": "random"}, {"seed": -1}])
def test_a_value_out_of_range_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        DataConfig(**settings)


def test_settings_survive_a_file_of_plain_values() -> None:
    config = DataConfig(sources=("a", "b"), document_separator="\n\n")
    assert DataConfig.from_dict(config.to_dict()) == config
