import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.artifact.format import SCHEMA_VERSION, Manifest
from deepseek.core.errors import ArtifactError, ConfigError, CorruptArtifactError, UnsupportedSchemaError

FILES = {"model.safetensors": {"sha256": "0" * 64, "num_bytes": 3}}


def make_manifest(**changes):
    fields = {
        "architecture": "decoder",
        "architecture_config": {"num_layers": 2, "rope_theta": 1e4, "moe": None},
        "metrics": {"heldout_loss": 4.25},
        "data_position": {"epoch": 1, "files": ["a", "b"]},
        "files": FILES,
        "created_at": "2025-01-02T03:04:05Z",
        "deepseek_version": "0.1.0",
    }
    return Manifest(**(fields | changes))


def test_a_manifest_reads_back_equal():
    manifest = make_manifest(parent_digest="a" * 64, plan={"tp": 2})
    assert Manifest.from_json(manifest.to_json(), source="here") == manifest


@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_flipped_bit_never_passes_for_another_manifest(position, bit):
    manifest = make_manifest()
    content = bytearray(manifest.to_json())
    content[position % len(content)] ^= 1 << bit
    try:
        read = Manifest.from_json(bytes(content), source="here")
    except ArtifactError:
        return
    assert read == manifest  # the bit was in white space, or made an equal spelling of a number


def test_the_digest_names_the_files_and_nothing_else():
    manifest = make_manifest()
    assert manifest.digest == make_manifest(created_at="2030-01-01T00:00:00Z", metrics={}).digest
    other = {"model.safetensors": {"sha256": "1" * 64, "num_bytes": 3}}
    assert manifest.digest != make_manifest(files=other).digest


def test_the_digest_does_not_depend_on_the_order_of_files():
    more = FILES | {"config.json": {"sha256": "2" * 64, "num_bytes": 1}}
    assert make_manifest(files=more).digest == make_manifest(files=dict(reversed(more.items()))).digest


def test_a_newer_schema_is_refused_with_the_way_out():
    values = json.loads(make_manifest().to_json()) | {"schema_version": SCHEMA_VERSION + 1, "new_field": 1}
    with pytest.raises(UnsupportedSchemaError, match="upgrade deepseek-engine"):
        Manifest.from_json(json.dumps(values).encode(), source="here")


@pytest.mark.parametrize("content", [b"", b"[1]", b"null", b"{", b"\xff\xfe", b"{}", b'{"schema_version": "2"}'])
def test_what_is_no_manifest_is_named_corrupt(content):
    with pytest.raises(CorruptArtifactError, match="here"):
        Manifest.from_json(content, source="here")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "a\\b", "..", ""])
def test_a_file_name_cannot_leave_the_folder(name):
    with pytest.raises(ConfigError, match="leaves the artifact"):
        make_manifest(files={name: FILES["model.safetensors"]})


def test_metrics_are_finite_numbers():
    with pytest.raises(ConfigError, match="heldout_loss"):
        make_manifest(metrics={"heldout_loss": float("nan")})
    with pytest.raises(ConfigError, match=r"plan.x"):
        make_manifest(plan={"x": float("inf")})


def test_reading_a_manifest_imports_no_torch(tmp_path):
    (tmp_path / "manifest.json").write_bytes(make_manifest().to_json())
    script = (
        "import sys\n"
        "import deepseek.artifact.writing, deepseek.artifact.verifying\n"
        "from deepseek.artifact.reading import read_manifest\n"
        f"print(read_manifest({str(tmp_path)!r}).architecture)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'safetensors', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "decoder"), done.stderr
