"""Names of checkpoint folders, what a killed save leaves behind, and the table of checksums."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.artifact.format import FileRecord
from deepseek.checkpoint.layout import (
    clear_leftovers,
    list_checkpoints,
    read_checksums,
    step_folder,
    step_of,
    write_checksums,
)
from deepseek.core.errors import ConfigError, CorruptArtifactError, UnsupportedSchemaError

RECORDS = {
    "state.json": FileRecord(sha256=hashlib.sha256(b"{}").hexdigest(), num_bytes=2),
    "state.safetensors": FileRecord(sha256=hashlib.sha256(b"").hexdigest(), num_bytes=0),
}


@pytest.fixture
def table(tmp_path):
    write_checksums(tmp_path / "checksums.json", RECORDS)
    return tmp_path / "checksums.json"


def rewrite(table, **changes):
    """The table as an older or other writer would leave it, without a digest of itself."""
    values = json.loads(table.read_text())
    values.pop("sha256")
    table.write_text(json.dumps(values | changes))


def make_folders(folder, *names):
    for name in names:
        (folder / name).mkdir()
        (folder / name / "from").write_text(name)


@given(st.integers(0, 10**12))
def test_a_folder_is_named_after_its_step_and_read_back(step):
    path = step_folder(Path("checkpoints"), step)
    assert path.name == "step-" + str(step).rjust(8, "0")
    assert step_of(path) == step


def test_a_negative_step_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="step is -1; give the number of steps done"):
        step_folder(tmp_path, -1)


def test_checkpoints_are_listed_by_number_and_nothing_else_is(tmp_path):
    make_folders(tmp_path, "step-100000000", "step-99999999", "step-00000005", "step-5", "notes")
    make_folders(tmp_path, ".step-00000007.1a2b3c4d.tmp", ".step-00000008.1a2b3c4d.old")
    (tmp_path / "step-00000009").write_text("a file")
    assert list(list_checkpoints(tmp_path)) == [5, 8, 99999999, 100000000]
    assert list_checkpoints(tmp_path / "nowhere") == {}


def test_a_checkpoint_supersedes_the_one_that_it_replaced(tmp_path):
    make_folders(tmp_path, ".step-00000005.1a2b3c4d.old", "step-00000005")
    assert list_checkpoints(tmp_path) == {5: tmp_path / "step-00000005"}


def test_leftovers_go_and_a_replaced_checkpoint_without_its_successor_comes_back(tmp_path):
    make_folders(tmp_path, ".step-00000001.1a2b3c4d.tmp", ".step-00000002.1a2b3c4d.old", ".step-00000003.1a2b3c4d.old")
    make_folders(tmp_path, "step-00000003", ".step-00000004.XYZ.tmp", "notes")
    clear_leftovers(tmp_path)
    found = {path.name: (path / "from").read_text() for path in tmp_path.iterdir()}
    assert found == {
        "step-00000002": ".step-00000002.1a2b3c4d.old",
        "step-00000003": "step-00000003",
        ".step-00000004.XYZ.tmp": ".step-00000004.XYZ.tmp",  # not a name that we give
        "notes": "notes",
    }
    clear_leftovers(tmp_path / "nowhere")


def test_the_table_of_checksums_comes_back(table):
    assert read_checksums(table) == RECORDS


def test_the_digest_of_the_table_is_sha256_of_its_sorted_content(table):
    values = json.loads(table.read_text())
    stated = values.pop("sha256")
    assert stated == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def test_a_flipped_digit_in_the_table_itself_is_noticed(table):
    table.write_text(table.read_text().replace('"num_bytes": 2', '"num_bytes": 3'))
    with pytest.raises(CorruptArtifactError, match="its own checksum does not match"):
        read_checksums(table)


def test_a_table_from_before_it_had_a_digest_is_read(table):
    rewrite(table)
    assert read_checksums(table) == RECORDS


def test_a_newer_schema_asks_for_an_upgrade(table):
    rewrite(table, schema_version=2)
    with pytest.raises(UnsupportedSchemaError, match="schema version 2 and this deepseek reads up to 1; upgrade"):
        read_checksums(table)


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": {"state.json": {"sha256": "0" * 64, "num_bytes": 1}}},
        {"files": {"state.json": {"sha256": "short", "num_bytes": 1}}},
        {"files": ["state.json"]},
        {"schema_version": "one"},
        {"more": 1},
    ],
)
def test_a_table_of_another_form_is_damaged(table, changes):
    rewrite(table, **changes)
    with pytest.raises(CorruptArtifactError, match=r"checksums\.json"):
        read_checksums(table)


@pytest.mark.parametrize("content", [b"", b"[]", b"nonsense", b"[" * 90_000, b" " * 100_001])
def test_bytes_that_are_no_table_are_damaged(table, content):
    table.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"checksums\.json"):
        read_checksums(table)


def test_a_missing_table_is_damaged(tmp_path):
    with pytest.raises(CorruptArtifactError, match="is missing or damaged"):
        read_checksums(tmp_path / "checksums.json")
