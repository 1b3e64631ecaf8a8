import hashlib
import json
import os
import re
import subprocess
import sys
from typing import Annotated, ClassVar, Literal, Self

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from deepseek.core.config import Config, list_kinds, name_kind, parse_overrides, read_settings
from deepseek.core.errors import ConfigError
from deepseek.recipes import load_recipe


class Rate(Config):
    peak: float = Field(default=0.1, gt=0)
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decays."""


class Model(Config):
    depth: int = Field(default=3, ge=1)
    """Blocks."""
    width: int = 8
    """Channels."""
    rate: Rate = Rate()
    """Nested twice."""
    extra: Rate | None = None
    """Optional."""
    stages: tuple[Rate, ...] = ()
    """Several."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.depth == 1:
            raise ConfigError(f"width={self.width} is one more than a multiple of depth={self.depth}; choose another")
        return self


class Job(Config):
    name: str = "job"
    """What it is called."""
    kind: Literal["Train", "Serve"] = "Train"
    """What it does."""
    model: Model = Model()
    """What it works on."""


class Needy(Config):
    path: str
    """No default."""


class Square(Config):
    kind: Literal["square"] = "square"
    """Which shape."""
    side: int
    """Without a default."""


class Circle(Config):
    kind: Literal["circle"] = "circle"
    """Which shape."""
    radius: int = 1
    """Of one kind alone."""
    pen: Rate = Rate()
    """Nested."""


class Drawing(Config):
    shape: Annotated[Square | Circle, Field(discriminator="kind"), BeforeValidator(name_kind("circle"))] = Circle()
    """Of several kinds."""
    frame: Annotated[Square | Circle | None, Field(discriminator="kind")] = None
    """Of several kinds, or none."""


rates = st.builds(Rate, peak=st.floats(1e-9, 1e9), betas=st.tuples(st.floats(0, 1), st.floats(0, 1)))
models = st.builds(
    Model,
    depth=st.just(3),
    width=st.integers(0, 99).filter(lambda width: width % 3 != 1),
    rate=rates,
    extra=st.none() | rates,
    stages=st.lists(rates, max_size=2).map(tuple),
)
jobs = st.builds(Job, name=st.text(), kind=st.sampled_from(["Train", "Serve"]), model=models)


@given(jobs)
def test_dicts_json_and_yaml_give_the_same_config_back(job):
    values = job.to_dict()
    assert Job.from_dict(values) == job
    assert Job.from_dict(json.loads(json.dumps(values))) == job
    assert Job.from_dict(yaml.safe_load(yaml.safe_dump(values))) == job


@given(jobs, jobs)
def test_one_digest_means_one_configuration(one, other):
    assert (one.digest == other.digest) == (one == other)
    assert one.digest == Job.from_dict(one.to_dict()).digest


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_the_digest_is_the_same_in_every_process(hash_seed):
    code = (
        "from deepseek.core.config import Config\n"
        "class Job(Config):\n    b: int = 2\n    a: dict[str, float] = {'y': 0.5, 'x': 1e-3}\n"
        "print(Job().digest)"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert answer.strip() == hashlib.sha256(b'{"a": {"x": 0.001, "y": 0.5}, "b": 2}').hexdigest()


@pytest.mark.parametrize(
    ("values", "key", "nearest"),
    [
        ({"nam": 1}, "nam", "name"),
        ({"model": {"dept": 1}}, "model.dept", "model.depth"),
        ({"model": {"rate": {"peek": 1}}}, "model.rate.peek", "model.rate.peak"),
        ({"model": {"extra": {"peek": 1}}}, "model.extra.peek", "model.extra.peak"),
        ({"model": {"stages": [{}, {"peek": 1}]}}, "model.stages.1.peek", "model.stages.1.peak"),
    ],
)
def test_an_unknown_key_is_refused_at_every_depth_with_the_nearest_name(values, key, nearest):
    with pytest.raises(ConfigError, match=f"^unknown setting '{key}'; did you mean '{nearest}'"):
        Job.from_dict(values)
    with pytest.raises(ConfigError, match=f"^unknown setting '{key}'; did you mean '{nearest}'"):
        Job(**values)


def test_an_unknown_key_near_no_other_lists_all_of_its_place():
    with pytest.raises(
        ConfigError, match=r"^unknown setting 'model.rate.zzz' \(known: model.rate.betas, model.rate.peak\)$"
    ):
        Job(model={"rate": {"zzz": 1}})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lr", "optimizer.base_learning_rate"),
        ("learning_rate", "optimizer.base_learning_rate"),
        ("optimizer.lr", "optimizer.base_learning_rate"),
        ("wd", "optimizer.weight_decay"),
        ("bs", "data.batch_size"),
        ("layers", "model.num_layers"),
        ("steps", "num_steps"),
        ("optimizer.type", None),  # not its `eps`, which is spelled like it only with what stands before
        ("model.name", None),
        ("name", None),  # not the name of an optimizer
        ("type", None),
        ("output", None),
        ("epochs", None),
    ],
)
def test_names_of_other_programs_lead_to_what_they_mean_or_nowhere(key, nearest):
    recipe = load_recipe("decoder_tiny")
    values = recipe.to_dict()
    *parents, name = key.split(".")
    (values[parents[0]] if parents else values)[name] = 1
    hint = f"; did you mean '{nearest}'? (known: " if nearest else " (known: "
    for give in (lambda: recipe.override({key: 1}), lambda: type(recipe).from_dict(values)):
        with pytest.raises(ConfigError, match="^" + re.escape(f"unknown setting '{key}'{hint}")):
            give()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"depth": "abc"}}, "setting 'model.depth' is 'abc': input should be a valid integer"),
        ({"model": {"depth": 0}}, "setting 'model.depth' is 0: input should be greater than or equal to 1"),
        ({"model": {"rate": {"betas": [0.9]}}}, "setting 'model.rate.betas.1' of Job is missing; give it a value"),
        ({"model": {"stages": [{"peak": -1}]}}, "setting 'model.stages.0.peak' is -1: input should be greater than 0"),
        (
            {"model": {"rate": {"peak": float("inf")}}},
            "setting 'model.rate.peak' is inf: input should be a finite number",
        ),
        (
            {"model": {"stages": [{"betas": [0.9, float("nan")]}]}},
            "'model.stages.0.betas.1' is nan: input should be a fin",
        ),
        ({"model": 3}, "setting 'model' is 3: input should be a valid dictionary or instance of Model"),
        ({"kind": "train"}, "setting 'kind' is 'train': input should be 'Train' or 'Serve'"),
        ({"model": {"width": 4}}, "^width=4 is one more than a multiple of depth=3; choose another$"),
        ({3: 4}, "setting '3' is 3: keys should be strings"),
        ({"model": {2: 4}}, "setting 'model.2' is 2: keys should be strings"),
    ],
)
def test_a_wrong_value_is_named_with_its_whole_path(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Job.from_dict(values)
    assert "\n" not in str(caught.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError, match=r"setting 'name' is 1: .*; unknown setting 'model.dept'; .*"):
        Job(name=1, model={"dept": 1})


def test_a_missing_value_is_asked_for():
    with pytest.raises(ConfigError, match="setting 'path' of Needy is missing; give it a value"):
        Needy()


def test_a_config_is_frozen():
    job = Job()
    with pytest.raises(ValidationError, match="frozen"):
        job.name = "other"
    assert job.name == "job" and hash(job) == hash(Job())


def test_the_string_under_a_field_is_its_description():
    assert Job.model_fields["name"].description == "What it is called."


def test_override_changes_a_copy_at_any_depth():
    job = Job()
    changed = job.override({"model.rate.peak": 0.5, "name": "new", "model.extra": {"peak": 2}})
    expected = {"name": "new", "model": {"rate": {"peak": 0.5}, "extra": {"peak": 2}}}
    assert changed == Job.from_dict(expected) and job == Job()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("nam", r"unknown setting 'nam'; did you mean 'name'\?"),
        ("model.dept", r"unknown setting 'model.dept'; did you mean 'model.depth'\?"),
        ("model.rate.peek", r"unknown setting 'model.rate.peek'; did you mean 'model.rate.peak'\?"),
        ("", "unknown setting ''"),
        ("model.depth.x", "goes below 'model.depth', which is 3; set 'model.depth' itself"),
        ("model.extra.peak", "goes below 'model.extra', which is None; set 'model.extra' itself"),
    ],
)
def test_an_override_of_nothing_is_refused(key, message):
    with pytest.raises(ConfigError, match=message):
        Job().override({key: 1})


def test_an_override_is_validated_like_everything_else():
    with pytest.raises(ConfigError, match=r"setting 'model.depth' is 'x'"):
        Job().override({"model.depth": "x"})


def test_a_change_of_kind_begins_with_the_defaults_of_that_kind_whatever_its_order():
    drawing = Drawing.from_dict({"shape": {"radius": 5}})
    assert drawing == Drawing(shape=Circle(radius=5))
    square = drawing.override({"shape.side": 3, "shape.kind": "square"})
    assert square == Drawing(shape=Square(side=3)) == drawing.override({"shape": "square", "shape.side": 3})
    assert square.override({"shape": "circle", "shape.pen.peak": 0.3}) == Drawing(shape=Circle(pen=Rate(peak=0.3)))
    assert drawing.override({"frame": "square", "frame.side": 2}).frame == Square(side=2)


def test_a_change_to_the_kind_there_is_keeps_the_other_settings():
    drawing = Drawing(shape=Circle(radius=5))
    assert drawing.override({"shape.kind": "circle"}) == drawing == drawing.override({"shape": "circle"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": "squire"}, "unknown kind of shape 'squire'; did you mean 'square'?"),
        ({"shape": {"kind": 3}}, "unknown kind of shape '3'"),
        ({"shape": {"radios": 3}}, "unknown setting 'shape.radios'; did you mean 'shape.radius'?"),
        ({"shape": {"pen": {"peek": 3}}}, "unknown setting 'shape.pen.peek'; did you mean 'shape.pen.peak'?"),
        ({"shape": {"kind": "square", "radius": 3}}, "(known: shape.kind, shape.side)"),
        ({"shape": "square"}, "setting 'shape.side' of Drawing is missing"),
        ({"shape": 3}, "setting 'shape' is 3"),
    ],
)
def test_a_setting_of_several_kinds_is_refused_without_a_word_of_how_they_are_told_apart(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Drawing.from_dict(values)


def test_settings_of_one_kind_alone_have_no_list_of_kinds():
    assert list_kinds(Drawing, "shape") == {"square": Square, "circle": Circle}
    assert list_kinds(Job, "kind") == {} == list_kinds(Job, "absent")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("1e-3", 1e-3),
        ("-1E5", -1e5),
        (".5e1", 5.0),
        ("2.e+2", 200.0),
        ("1.5", 1.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("[a, 2]", ["a", 2]),
        ("{peak: 0.5}", {"peak": 0.5}),
        ("'4'", "4"),
        ("a=b", "a=b"),
        ("e5", "e5"),
        ("+-5e3", "+-5e3"),
        ("²e3", "²e3"),
    ],
)
def test_values_on_a_command_line(text, value):
    parsed = parse_overrides([f"key={text}"])["key"]
    assert parsed == value and type(parsed) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_that_python_writes_is_that_number(number):
    assert parse_overrides([f"key={number!r}"]) == {"key": number}


@pytest.mark.parametrize("assignment", ["model.depth", "=4", ""])
def test_an_override_without_both_sides_is_refused(assignment):
    with pytest.raises(ConfigError, match="is not an override; write KEY=VALUE"):
        parse_overrides([assignment])


@pytest.mark.parametrize("text", ["[1", "a: b: c", "2020-13-45", "@x"])
def test_a_value_that_is_no_yaml_is_refused(text):
    with pytest.raises(ConfigError, match=r"cannot be read as the value of key; .*needs quotes"):
        parse_overrides([f"key={text}"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("job.yaml", "name: new\nmodel:\n  depth: 5\n  rate: {peak: 1e-3}\n"),
        ("job.yml", "{name: new, model: {depth: 5, rate: {peak: 0.001}}}"),
        ("job.toml", 'name = "new"\n[model]\ndepth = 5\n[model.rate]\npeak = 1e-3\n'),
        ("job.json", '{"name": "new", "model": {"depth": 5, "rate": {"peak": 1e-3}}}'),
    ],
)
def test_every_format_reads_alike(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert Job.from_file(tmp_path / name) == Job(name="new", model=Model(depth=5, rate=Rate(peak=0.001)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("job.ini", b"a=1", "ends in '.ini'; a config file ends in one of .yaml, .yml, .toml, .json"),
        ("job", b"a: 1", "ends in ''; a config file ends in"),
        ("job.yaml", b"a: [1", "is not valid YAML"),
        ("job.yaml", b"a: 2020-13-45", "is not valid YAML"),
        ("job.toml", b"a = ", "is not valid TOML"),
        ("job.json", b"{", "is not valid JSON"),
        ("job.json", b"1" * 5000, "is not valid JSON"),
        ("job.yaml", b"\xff\xfe\xff", "cannot be read"),
        ("job.yaml", b"- a", "holds a list; expected a mapping of settings"),
        ("job.yaml", b"", "holds a NoneType; expected a mapping of settings"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_settings(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_said_to_be_unreadable(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for name in ("missing.yaml", "folder.yaml"):
        with pytest.raises(ConfigError, match=f"config file .*{name} cannot be read .*check the path"):
            read_settings(tmp_path / name)


def test_a_config_without_an_end_or_with_too_many_values_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with (tmp_path / "huge.toml").open("wb") as file:
        file.truncate(8 << 30)
    for name, words in (
        ("pipe.yaml", "no regular file"),
        ("endless.json", "no regular file"),
        ("huge.toml", "8589934592 bytes"),
        ("deep.json", "nested too deeply"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_settings(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_settings(tmp_path / "a.json") == {"a": 1}


def test_an_error_shows_no_more_of_a_value_than_one_reads(tmp_path):
    class Small(Config):
        number: int = 1

    many = [[["x"] * 50] * 50] * 50
    with pytest.raises(ConfigError) as caught:
        Small.from_dict({"number": many})
    assert len(str(caught.value)) < 10_000


class Clipped(Config):
    class Below(Config):
        bound: float = 1.0
        name: str = "a"

    other_names: ClassVar = {"old_bound": "below.bound"}
    below: Below = Below()


def test_another_name_of_a_setting_is_read_in_every_way_a_config_is_made(tmp_path):
    (tmp_path / "a.yaml").write_text("old_bound: 3\nbelow: {name: b}\n")
    read = Clipped.from_file(tmp_path / "a.yaml")
    assert (read.below.bound, read.below.name) == (3.0, "b")
    assert Clipped(old_bound=3.0, below=Clipped.Below(name="b")) == read
    assert Clipped.from_dict(read.to_dict()) == read and "old_bound" not in read.to_dict()
    assert read.override({"old_bound": 4}).below == Clipped.Below(bound=4, name="b")


@pytest.mark.parametrize("below", [{"bound": 2.0}, Clipped.Below(bound=2.0), Clipped.Below(bound=1.0)])
def test_both_names_of_one_setting_are_refused(below):
    with pytest.raises(ConfigError, match=r"old_bound and below\.bound are two names of one setting"):
        Clipped(old_bound=3.0, below=below)
    with pytest.raises(ConfigError, match="two names of one setting"):
        Clipped().override({"old_bound": 1, "below.bound": 1})


def test_a_value_under_another_name_is_checked_like_any():
    with pytest.raises(ConfigError, match=r"setting 'below\.bound' is 'wide'"):
        Clipped(old_bound="wide")
