"""`SelectionOptions`: one value, checked when it is made, that says what a search may try."""

import pytest

from deepseek.compiler.runtimes.backends.interface import Variant
from deepseek.compiler.runtimes.selection_options import SelectionOptions
from deepseek.compiler.runtimes.selection_policy import AS_WRITTEN, BackendSelector, Tolerance
from deepseek.core.errors import ConfigError

FILE = {"openvino": Variant("file", AS_WRITTEN, "", lambda job: None)}


def test_a_changed_copy_leaves_the_original_as_it_was():
    options = SelectionOptions(backend="openvino", precision="bf16")
    changed = options.override({"remember": False})
    assert (changed.remember, options.remember) == (False, True)
    assert changed.backend is options.backend is BackendSelector.OPENVINO


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backend": "openvin"}, "did you mean 'openvino'"),
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"time_budget_s": float("nan")}, "time_budget_s is nan"),
        ({"tolerance": {"bf61": Tolerance(0.1, 0.9, 1.0)}}, "did you mean 'bf16'"),
        ({"tolerances": 1.0}, "unknown setting of select 'tolerances'; did you mean 'tolerance'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_the_nearest(settings, said):
    with pytest.raises(ConfigError, match=said):
        SelectionOptions().override(settings)


def test_what_auto_must_not_take_binds_auto_only():
    excluded = {"int8": "it is not wanted", "fp16": "nor this"}
    auto = SelectionOptions(excluded=excluded)
    assert auto.precisions == ("fp32", "bf16") and auto.exclusions == {"fp16": "nor this", "int8": "it is not wanted"}
    named = SelectionOptions(precision="int8", excluded=excluded)
    assert named.precisions == ("int8",) and named.exclusions == {}


@pytest.mark.parametrize(
    ("settings", "is_tried"),
    [
        ({}, True),
        ({"backend": "openvino"}, True),
        ({"backend": "eager"}, False),
        ({"precision": "fp32"}, False),
        ({"precision": AS_WRITTEN}, True),
    ],
)
def test_a_file_as_it_is_is_tried_where_backend_and_precision_allow_it(settings, is_tried):
    assert bool(SelectionOptions(further=FILE, **settings).alternatives) == is_tried
