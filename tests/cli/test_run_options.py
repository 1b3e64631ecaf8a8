"""An option that is a setting is answered with how settings are given."""

from __future__ import annotations

import pytest

from deepseek.cli.run_options import explain_option


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("--folder", "--folder is a setting of the run; write --set folder=VALUE"),
        ("--num-steps=3", "--num-steps=3 is a setting of the run; write --set num_steps=VALUE"),
        ("--lr", "did you mean 'optimizer.base_learning_rate'?"),
        ("--batch-size", "did you mean 'data.batch_size'?"),
        ("--frobnicate", "settings are given as --set KEY=VALUE: unknown setting 'frobnicate'"),
    ],
)
def test_an_option_leads_to_its_setting(option: str, answer: str) -> None:
    assert answer in explain_option(option)
