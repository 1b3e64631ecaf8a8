"""The table is complete, cites its documents, and is what the docs show."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from deepseek.compat.generations import Claim, Document, find_generation, load_table, profile
from deepseek.compat.migration.rules import load_rules
from deepseek.core.config import Config
from deepseek.core.errors import ConfigError
from docs.rendering import render_generations, render_rules

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


def test_every_generation_of_the_specification_is_a_row() -> None:
    names = [each.name for each in load_table().generations]
    assert names == ["1.0", "1.0-quant", "1.3", "2.0", "2.3", "3.0", "3.1", "3.2", "3.5", "4.0", "5.0", "6.0"]


# Numbers copied by hand from the facts, as (generation, what its row must say somewhere).
FACTS = [
    ("1.0", "120 M"), ("1.0", "12 GB"), ("1.0", "<= 5"), ("1.0-quant", "8 frames/s"), ("1.3", "5.2"), ("1.3", "2.12"),
    ("2.0", "12.7 -> 3.2 ms"), ("2.0", "+40 %"), ("2.0", "1,200 tokens/s"),
    ("2.3", "--quantize=int8"), ("2.3", "about 2 %"),
    ("3.0", "1.75 T"), ("3.0", "84 %"), ("3.0", "1,024 A100"), ("3.0", "-58 %"), ("3.0", "2.3x"), ("3.1", "-42 %"),
    ("3.1", "99.7 %"), ("3.1", "8.2 -> 3.1 ms"), ("3.1", "412 -> 257 s"), ("3.1", "92 %"), ("3.1", "CANN 6.0"),
    ("3.2", "INT4"), ("3.5", "8.2 -> 1.7 ms"), ("3.5", "12 h to 2.3 h"), ("3.5", "CUDA 11.8"),
    ("3.5", "FlashAttention v2"),
    ("4.0", "< 500 MB"), ("4.0", "1.22"), ("4.0", "30 s"), ("4.0", "quantum-classical"), ("5.0", "3x throughput"),
    ("5.0", "11.6"), ("5.0", "470.57.02"), ("6.0", "DVFS"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fact"), FACTS)
def test_facts_of_the_documents_stand_in_their_row(name: str, fact: str) -> None:
    assert fact in str(find_generation(name).to_dict())


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("1.2", (8.2, 122, 0.0, 12.5)),
        ("2.3", (3.1, 323, 1.8, 6.8)),
        ("3.1", (2.7, 370, 1.5, 7.2)),
        ("4.2", (2.9, 345, 1.6, 7.0)),
        ("5.0", (1.2, 833, 2.1, 5.5)),
    ],
)
def test_the_benchmark_of_the_documents_stands_in_the_table(name: str, row: tuple[float, ...]) -> None:
    measured = find_generation(name).measurements[0]
    assert (measured.latency_ms, measured.images_per_s, measured.accuracy_loss_percent, measured.memory_gb) == row
    assert measured.images_per_s == pytest.approx(1000 / measured.latency_ms, rel=0.01)


def test_every_claim_cites_a_document() -> None:
    page = render_generations(load_table())
    bullets = re.findall(r"^- (?!\w+: ).*$", page, flags=re.MULTILINE)
    assert len(bullets) > 60
    assert all(re.search(r"\[(D\d|D\?|house)(, D\d)*\]$", each) for each in bullets)


# Which document says what, copied by hand from the facts: (text of the claim, its documents).
CITATIONS = [
    ("2022, as 1.x", "D1"), ("a 120 M parameter transformer", "D3"), ("over 12 GB GPU memory", "D1"),
    ("less than 8 GB of memory", "D1"), ("quantised 1.0, 8 frames/s", "D3"), ("resource-limited devices", "D?"),
    ("dynamic shapes of PyTorch 2.0", "D4"), ("sparse mixture of experts", "D3"), ("dynamic computation graph: ", "D0"),
    ("FP16: 1,200 tokens/s on a V100", "D3"), ("research and small deployments", "D0"), ("cloud API", "D3"),
    ("below ten billion parameters on one machine", "D1"), ("dynamic batching", "D1"), ("FP16 costs about 2 %", "D1"),
    ("edge devices, quantised", "D1"), ("3D parallel training", "D3"), ("FP16/BF16 mixed precision", "D0"),
    ("as 3.x: model parallel", "D1"), ("eight and more parallel parameters", "D1"),
    ("the ten-billion class takes 3.0", "D0, D1"),
    ("very large pretraining", "D3"), ("more than 32 GB", "D1"), ("dynamic mixed precision: ", "D2"),
    ("hierarchical ring topology", "D2"), ("traditional data centres", "D1"), ("INT4 toolkit", "D2"), ("TF32", "D0"),
    ("hierarchical communication", "D0"), ("hundred-billion parameters and more", "D0"), ("cloud-native", "D1"),
    ("announced elsewhere as architecture search", "D0"), ("real-time latency needs", "D1"),
    ("compile optimisation (TVM backend)", "D1"), ("CUDA 11.7 with a driver below 470.57.02", "D1"), ("DVFS", "D1"),
    ("a hundred billion parameters and more need 3.5", "D0, D1"), ("less than 8 GB of memory takes", "D1"),
    ("edge devices take quantised 2.3", "D1"), ("3.1 brought the backends", "D2"),
    ("lowest latency takes 5.0, whose", "D1"),
    ("real-time latency (augmented reality)", "D1"), ("without Kubernetes experience, enter", "D1"),
    ("below ten billion parameters 2.x", "D1"), ("traditional data centres take", "D1"),

    ("more than 32 GB takes", "D1"), ("a V100 is the device of 2.0", "D3"), ("5.0 brought three times", "D1"),
    ("check accuracy after quantisation", "D1"), ("rewrite the distributed config", "D1"), ("API adapter", "D0"),
    ("compatibility check, runtime first", "D2"), ("prepare a cluster", "D1"), ("across majors", "D1"),
]  # fmt: skip


def _claims(value: object) -> Iterator[Claim]:
    if isinstance(value, Claim):
        yield value
    elif isinstance(value, Config):
        for name in type(value).model_fields:
            yield from _claims(getattr(value, name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _claims(item)


@pytest.mark.parametrize(("text", "documents"), CITATIONS)
def test_a_claim_cites_the_document_that_makes_it(text: str, documents: str) -> None:
    found = {", ".join(claim.documents) for claim in _claims(load_table()) if claim.text.startswith(text)}
    assert found == {documents}


def test_every_mark_has_a_document_and_every_document_is_cited() -> None:
    table = load_table()
    assert list(table.documents) == list(get_args(Document))
    cited = {document for claim in _claims(table) for document in claim.documents}
    cited |= {document for row in table.generations for document in row.requirements.documents}
    assert cited == set(table.documents)
    assert find_generation("3.5").requirements.documents == ("D?",)


def test_a_claim_without_a_document_is_refused() -> None:
    with pytest.raises(ConfigError, match="'D9'"):
        Claim.from_dict({"text": "faster", "documents": ["D9"]})
    with pytest.raises(ValueError, match="names no document"):
        Claim.model_validate("faster")


@pytest.mark.parametrize("spelling", ["4.0", "v4.0", "4.2", "v4.2", "V4.X", " 4.x "])
def test_users_spellings_find_one_generation(spelling: str) -> None:
    assert find_generation(spelling).name == "4.0"


def test_an_unknown_generation_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown generation 'v7'.*1\.0-quant.*5\.0"):
        find_generation("v7")


def test_profiles_of_the_documents_comparison_exist() -> None:
    profiles = [profile(name) for name in ("v1.2", "v2.3", "v3.1", "v4.2", "v5.0")]
    assert [each.precision for each in profiles] == ["fp32", "fp16", "dynamic", "fp16", "fp16"]
    assert len({each.digest for each in profiles}) == 5


def test_a_planned_generation_without_options_says_so() -> None:
    with pytest.raises(ConfigError, match=r"6\.0 is planned"):
        profile("6.0")


def test_the_page_in_the_docs_is_the_table() -> None:
    shown = (REFERENCE / "generations.md").read_text(encoding="utf-8")
    assert shown == render_generations(load_table()), "run make docs"


def test_the_page_of_migration_rules_is_the_data() -> None:
    shown = (REFERENCE / "migration-rules.md").read_text(encoding="utf-8")
    assert shown == render_rules(load_rules()), "run make docs"


def test_the_room_imports_without_torch() -> None:
    names = ("generations", "advice", "version_adapter", "version_converter", "sharded_checkpoints", "compatibility")
    names += ("migration.scanning", "migration.applying")
    imports = "\n".join(f"import deepseek.compat.{name}\nassert 'torch' not in sys.modules, {name!r}" for name in names)
    done = subprocess.run([sys.executable, "-c", f"import sys\n{imports}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
