"""Options that `deepseek train` does not have and that a user meant as settings of the run."""

from __future__ import annotations

from deepseek.core.errors import ConfigError


def explain_option(option: str) -> str:
    """Say what was probably meant by an option that there is not: most are settings of the run."""
    from deepseek.train.config import TrainConfig

    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    try:
        TrainConfig().override({name: None})
    except ConfigError as error:
        if str(error).startswith("unknown setting"):
            return f"{option} is no option, and settings are given as --set KEY=VALUE: {error}"
    return f"{option} is a setting of the run; write --set {name}=VALUE"
