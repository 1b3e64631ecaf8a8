"""Checkpoints judged by their headers: of which generation they can be, and whether reading them is safe.

A safetensors file or folder is planned as if it were to be converted (`conversion_steps.identify`); no tensor is read.
A pickle is read by its opcodes (`pickles.py`) and never run.
"""

from __future__ import annotations

from pathlib import Path

from deepseek.compat.conversion_steps import FUSE_LLAMA, FUSED_FAMILIES, identify, is_half_converted
from deepseek.compat.generations import FrameworkGeneration
from deepseek.compat.headers import read_checkpoint, read_model_type
from deepseek.compat.migration.findings import Finding, find, unreadable
from deepseek.compat.migration.pickles import looks_like_pickle, read_pickle
from deepseek.compat.migration.rules import MigrationRules
from deepseek.compat.transforms import Specs
from deepseek.compat.version_converter import VersionConverter
from deepseek.core.errors import ArtifactError, CorruptArtifactError

# Families that `transformers` itself writes with fused projections, or with experts under the names that Mixtral began
# with, so that their names say nothing about a generation.
_AS_TRANSFORMERS_WRITES = (*FUSED_FAMILIES, "mixtral", "phimoe", "minimax", "minimax_m2", "minimax_m3", "minimax_m3_vl")


def check_weights(path: Path, shown: str, rules: MigrationRules, target: FrameworkGeneration) -> list[Finding]:
    """Return the findings for a safetensors file, or a folder of shards with their index."""
    try:
        specs = {name: tensor.spec for name, tensor in read_checkpoint(path).items()}
    except (CorruptArtifactError, OSError) as error:
        return [_unreadable(shown, error)]
    model_type = read_model_type(path)
    if model_type in _AS_TRANSFORMERS_WRITES:
        return []
    found = _judge(specs, model_type, shown, rules, target)
    return [] if found is None else [found]


def _judge(
    specs: Specs, model_type: str | None, shown: str, rules: MigrationRules, target: FrameworkGeneration
) -> Finding | None:
    """Return the finding for tensors of these names; `None` where they are as the target has them."""
    by_id = {rule.id: rule for rule in rules.checkpoint}
    try:
        generations = identify(specs)
    except ArtifactError as error:
        return find(by_id["checkpoint-half-converted"], shown, 1, 1, detail=str(error))
    if not generations:  # or a family that no generation has: GLM holds gate and up as one, and Q, K and V apart
        return find(by_id["checkpoint-half-converted"], shown, 1, 1) if is_half_converted(specs) else None
    if target.name in generations or "checkpoint-layout" not in by_id:
        return None
    found = find(by_id["checkpoint-layout"], shown, 1, 1, detail=f"as {', '.join(generations)}, not {target.name}")
    if model_type is None and FUSE_LLAMA.plan(specs, "backward"):
        return found.for_person(
            "Phi-3 holds these names, too: put its config.json beside it, which tells them apart",
            "without one, convert it with VersionConverter if it is no Phi-3",
        )
    _, report = VersionConverter(generations[-1], target.name).plan(specs)
    return found if report.actions else None


def check_pickle(path: Path, shown: str, rules: MigrationRules) -> list[Finding]:
    """Return the findings for a pickle, a malicious one by the names of what it would call."""
    by_id = {rule.id: rule for rule in rules.checkpoint}
    try:
        content = read_pickle(path)
    except (CorruptArtifactError, OSError) as error:
        if path.suffix == ".bin" and not looks_like_pickle(path):
            return []
        return [_unreadable(shown, error)]
    if content.foreign:
        return [find(by_id["checkpoint-malicious"], shown, 1, 1, detail=f"it names {', '.join(content.foreign[:5])}")]
    return [find(by_id["checkpoint-pickle"], shown, 1, 1)] if "checkpoint-pickle" in by_id else []


def _unreadable(shown: str, error: Exception) -> Finding:
    """Our errors say what was seen and, after a semicolon, what to do next."""
    why, _, fix = str(error).partition("; ")
    return unreadable(shown, why, fix or "copy it again, or exclude it")
