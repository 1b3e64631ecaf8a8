"""Settings: one frozen pydantic class per thing that is configured, from whatever a user has at hand.

    class OptimizerConfig(Config):
        weight_decay: float = 0.01
        '''Decoupled weight decay of AdamW, per step and unit of learning rate.'''

A config comes from keywords, a dict, or a YAML, TOML or JSON file, and is varied by copies: `config.override(
{"optimizer.weight_decay": 0.1})`. A key that does not exist is refused together with the nearest one that does. The
string under a field is its documentation; the reference pages and `--help` are made from it.

A setting of several kinds is a union of configs that pydantic tells apart by their field `kind`, a `Literal`:

    data: Annotated[TextConfig | ImagesConfig, Field(discriminator="kind"), BeforeValidator(name_kind("text"))]

When an override changes the kind, what is below begins with that kind's defaults.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown, find_initials, find_nearest, word_unknown

# YAML 1.1 takes `1e-3` for a string, where every user means a number.
_SCIENTIFIC = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][+-]?[0-9]+")
_MAX_SETTINGS_BYTES = 5_000_000
_MAX_DEPTH = 4
_SAID_OF_EVERYTHING = ("name", "type", "kind")  # one of a lower level is hardly what is meant
SETTINGS_SUFFIXES = (".yaml", ".yml", ".toml", ".json")
"""Endings of the files that settings are read from."""
_SHORT = reprlib.Repr()  # takes its limits in the constructor from Python 3.12 on
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlist = _SHORT.maxdict = 12
_SHORT.maxlevel = 3


class Config(BaseModel):
    """Base of every config: frozen, typed, strict about names, numbers finite. Construction raises `ConfigError`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    other_names: ClassVar[Mapping[str, str]] = {}
    """Names that settings have elsewhere, each with the dotted name it stands for; they are read and never written."""

    def __init__(self, **values: Any) -> None:
        with _explained(type(self)):
            super().__init__(**values)

    # pydantic then validates nested configs itself, so that an error deep inside knows the whole path to its key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _read_other_names(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not cls.other_names.keys() & values.keys():
            return values
        read = {name: value for name, value in values.items() if name not in cls.other_names}
        for other in cls.other_names.keys() & values.keys():
            *parents, last = cls.other_names[other].split(".")
            holder = read
            for parent in parents:
                below = holder.get(parent, {})
                holder[parent] = below.to_dict() if isinstance(below, Config) else dict(below)
                if isinstance(below, Config) and last not in below.model_fields_set:
                    holder[parent].pop(last, None)
                holder = holder[parent]
            if last in holder:
                raise ConfigError(_explain_twice(other, cls.other_names[other]))
            holder[last] = values[other]
        return read

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from nested dicts, as a YAML or JSON file holds them."""
        with _explained(cls):
            return cls.model_validate(dict(values))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Build from a `.yaml`, `.yml`, `.toml` or `.json` file."""
        return cls.from_dict(read_settings(Path(path)))

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of JSON types; `from_dict` gives the same config back."""
        return self.model_dump(mode="json")

    def override(self, changes: Mapping[str, Any]) -> Self:
        """A copy with dotted keys changed: `config.override({"model.num_layers": 4})`."""
        for other in self.other_names.keys() & changes.keys():
            if self.other_names[other] in changes:
                raise ConfigError(_explain_twice(other, self.other_names[other]))
        changes = {self.other_names.get(key, key): value for key, value in changes.items()}
        kinds = _find_kinds(type(self), changes)
        values = self.to_dict()
        for name, kind in kinds.items():
            if not isinstance(values[name], dict) or values[name]["kind"] != kind:
                values[name] = _list_defaults(list_kinds(type(self), name)[kind])
        for key, value in changes.items():
            if key.removesuffix(".kind") not in kinds or not isinstance(value, str):
                _assign(values, key.split("."), value, whole_key=key)
        return type(self).from_dict(_drop_undefined(values))

    @property
    def digest(self) -> str:
        """SHA-256 of the settings, the same in every process: two runs with one digest were configured alike."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def list_kinds(config: type[BaseModel], name: str) -> dict[str, type[BaseModel]]:
    """List the configs that the setting `name` may be, by their `kind`; none where it is of one kind only."""
    field = config.model_fields.get(name)
    classes = _classes(field.annotation) if field and field.discriminator == "kind" else []
    return {found.model_fields["kind"].get_default(): found for found in classes}


def _find_kinds(config: type[BaseModel], changes: Mapping[str, Any]) -> dict[str, str]:
    """The kinds that `changes` choose, by setting: `data.kind` or `data` alone to the name of one."""
    chosen = {}
    for key, kind in changes.items():
        name = key.removesuffix(".kind")
        if isinstance(kind, str) and (known := list_kinds(config, name)):
            if kind not in known:
                raise ConfigError(explain_unknown(f"kind of {name}", kind, known))
            chosen[name] = kind
    return chosen


def _explain_twice(other: str, name: str) -> str:
    return f"{other} and {name} are two names of one setting and both are given; give one of them"


def _list_defaults(config: type[BaseModel]) -> dict[str, Any]:
    """The settings of `config` as they are if nobody sets them; `PydanticUndefined` where somebody has to."""
    defaults = {name: field.get_default(call_default_factory=True) for name, field in config.model_fields.items()}
    return {name: value.to_dict() if isinstance(value, Config) else value for name, value in defaults.items()}


def _drop_undefined(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _drop_undefined(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not PydanticUndefined
    }


def name_kind(default: str) -> Callable[[Any], Any]:
    """Return a validator that reads a name alone as a kind, and settings without a kind as those of `default`."""

    def read(value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        return {"kind": default} | value if isinstance(value, dict) else value

    return read


def read_settings(path: Path) -> dict[str, Any]:
    """The top-level mapping in a YAML, TOML or JSON file."""
    readers: dict[str, Callable[[str], Any]] = {
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
        ".toml": tomllib.loads,
        ".json": json.loads,
    }
    if path.suffix not in readers:
        raise ConfigError(f"{path} ends in {path.suffix!r}; a config file ends in one of {', '.join(readers)}")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ConfigError(f"config file {path} is no regular file; write the settings to one")
    try:
        if path.stat().st_size > _MAX_SETTINGS_BYTES:
            raise ConfigError(f"config file {path} holds {path.stat().st_size} bytes, more than settings take")
        values = readers[path.suffix](path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read ({error}); check the path and its permissions") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"config file {path} is not valid {path.suffix[1:].upper()}: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"config file {path} is nested too deeply for settings") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} holds a {type(values).__name__}; expected a mapping of settings")
    return values


def parse_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """Dotted settings from a command line; values are read as YAML, so numbers, lists and `null` work.

    >>> parse_overrides(["model.num_layers=4", "data.paths=[a, b]"])
    {'model.num_layers': 4, 'data.paths': ['a', 'b']}
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"{assignment!r} is not an override; write KEY=VALUE, for example model.num_layers=4")
        changes[key] = _parse_value(key, text)
    return changes


def _parse_value(key: str, text: str) -> Any:
    try:
        return float(text) if _SCIENTIFIC.fullmatch(text) else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"{text!r} cannot be read as the value of {key}; text with signs of YAML needs quotes inside the shell's, "
            f"""for example --set '{key}="..."', and a list --set '{key}=[a, b]'"""
        ) from error


def _assign(values: dict[str, Any], path: list[str], value: Any, *, whole_key: str) -> None:
    for depth, name in enumerate(path):
        if name not in values:
            raise ConfigError(_explain_unknown(path[:depth], name, values, _list_settings(values, ())))
        if depth == len(path) - 1:
            values[name] = value
        elif isinstance(values[name], dict):
            values = values[name]
        else:
            above = ".".join(path[: depth + 1])
            raise ConfigError(
                f"setting {whole_key!r} goes below {above!r}, which is {values[name]!r}; set {above!r} itself"
            )


def _list_settings(values: Mapping[str, Any], above: Sequence[str]) -> Iterator[str]:
    """The dotted names of all settings in `values`, which lie below `above`."""
    for name, value in values.items():
        yield ".".join([*above, name])
        if isinstance(value, dict):
            yield from _list_settings(value, [*above, name])


def _list_fields(config: type[BaseModel], above: tuple[str, ...]) -> Iterator[str]:
    """The dotted names of all settings of `config`, which lie below `above`; none of those that hold themselves."""
    for name, field in config.model_fields.items():
        yield ".".join([*above, name])
        for nested in _classes(field.annotation) if len(above) < _MAX_DEPTH else ():
            yield from _list_fields(nested, (*above, name))


def _explain_unknown(parents: Sequence[str], name: str, siblings: Iterable[str], settings: Iterable[str]) -> str:
    """One sentence for a setting `name` that is none of its `siblings` nor of all `settings` below them.

    Names are compared without what stands above them: `optimizer.lr` is no slip of the pen for `optimizer.eps`.
    """
    nested = [setting for setting in settings if "." in setting]
    exact = [setting for setting in nested if setting.rpartition(".")[2] == name and name not in _SAID_OF_EVERYTHING]
    siblings = list(siblings)
    found = next(iter(exact), None) or find_nearest(name, siblings) or find_initials(name, siblings, of_all=True)
    found = found or _find_below(name, nested) or find_initials(name, siblings)
    known = [".".join([*parents, sibling]) for sibling in siblings]
    nearest = ".".join([*parents, found]) if found else None
    return word_unknown("setting", ".".join([*parents, name]), known, nearest)


def _find_below(name: str, nested: Sequence[str]) -> str | None:
    """Return the setting on the next lower level that `name` stands for: by its words beside `num`, or by initials."""
    words = set(name.lower().split("_"))
    for depth in range(1, _MAX_DEPTH + 1):
        level = {setting.rpartition(".")[2]: setting for setting in nested if setting.count(".") == depth}
        rest_of = {own: set(own.split("_")) - words for own in level if words <= set(own.split("_"))}
        fitting = [own for own, rest in rest_of.items() if len(words) > 1 or rest == {"num"}]
        if found := min(fitting, key=len, default=None) or find_initials(name, level):
            return level[found]
    return None


def show_value(value: object) -> str:
    """Write a value for an error, short also where a file's aliases make it endless."""
    return _SHORT.repr(value)


@contextmanager
def _explained(config: type[BaseModel]) -> Iterator[None]:
    """Turn what pydantic has to say about `config` into a `ConfigError`."""
    try:
        yield
    except ValidationError as error:
        # A value that fits no alternative of a setting has a problem with each, and they may read alike.
        sentences = dict.fromkeys(_explain(config, dict(problem)) for problem in error.errors())
        raise ConfigError("; ".join(sentences)) from None


def _explain(config: type[BaseModel], problem: dict[str, Any]) -> str:
    """One sentence for one problem; the first thing a user should read is which key is wrong."""
    location, owner = _find_place(config, [str(part) for part in problem["loc"]])
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        *parents, name = location
        return _explain_unknown(parents, name, owner.model_fields, _list_fields(owner, ()))
    if problem["type"] == "missing":
        return f"setting {where!r} of {config.__name__} is missing; give it a value"
    if problem["type"] == "union_tag_invalid":
        return explain_unknown(f"kind of {where}", str(problem["ctx"]["tag"]), list_kinds(owner, location[-1]))
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"setting {where!r} is {show_value(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _find_place(config: type[BaseModel], location: Sequence[str]) -> tuple[list[str], type[BaseModel]]:
    """The dotted path of a setting, and the config that it is a setting of.

    A place in a list has a number, and in a setting of several kinds pydantic puts the kind after its name.
    """
    path: list[str] = []
    owner = below = config
    kinds: dict[str, type[BaseModel]] = {}
    for part in location:
        if part in kinds:
            below, kinds = kinds[part], {}
            continue
        path.append(part)
        owner, kinds = below, list_kinds(below, part)
        field = owner.model_fields.get(part)
        nested = _classes(field.annotation) if field else []
        below = nested[0] if nested else owner
    return path, owner


def _classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _classes(argument)]
