"""Freezing parts of a model: parameters, by patterns over their names, that training leaves as they are.

    freeze_(model, ["embed", "layers.[0-3]", "*.bias"])

A pattern is one of the shell (`fnmatch`), for the name of a parameter or of a module with parameters in it. A batch
norm whose weights are frozen keeps its running statistics as well, and normalizes with them as in evaluation: the
layers behind it then see what they were trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from deepseek.core.errors import ConfigError
from deepseek.core.names import find_nearest

_MOST_NAMED = 5


def freeze_(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze the parameters of `model` that match any of `patterns`, in place, and return their names.

    Raises `ConfigError` for a pattern that matches nothing, and where nothing is left to train.

    >>> freeze_(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), ["0"])
    ['0.weight', '0.bias']
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    frozen = [name for name in named if any(matches(name, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in named):
            raise ConfigError(explain_no_match("freeze", pattern, named, "parameter"))
    for name in frozen:
        named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError(
            f"freeze={list(patterns)} matches every parameter, so that nothing is left to train; freeze less"
        )
    hold_norms_(model)
    return frozen


def matches(name: str, pattern: str) -> bool:
    """Return whether `pattern` names the parameter `name`, or a module that it is in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def explain_no_match(setting: str, pattern: str, known: Iterable[str], noun: str) -> str:
    """Return the sentence for a pattern that matches none of the `known` names."""
    names = list(dict.fromkeys(known))
    above = {name.rsplit(".", count)[0] for name in names for count in range(1, name.count(".") + 1)}
    nearest = find_nearest(pattern.strip("*."), {*names, *above})
    hint = f"did you mean {nearest!r}?" if nearest else f"they are called {', '.join(names[:_MOST_NAMED])}, ..."
    return f"{setting} has the pattern {pattern!r}, which matches no {noun} of this model; {hint}"


def hold_norms_(model: nn.Module) -> None:
    """Keep the running statistics of batch norms whose own parameters are all frozen."""
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.register_forward_pre_hook(_evaluate)


def _evaluate(module: nn.Module, inputs: Any) -> None:
    """`train()` of the whole model reaches the norm as well, so that it is said again before each pass."""
    module.training = False
