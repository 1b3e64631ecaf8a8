"""Claim: converting a 4 GB sharded checkpoint between generations stays under 1.5 GB of resident memory.

    python -m benchmarks.convert_memory [--json FILE] [--quick]

A Mixtral-like checkpoint with random weights is generated into a temporary folder, then converted by fresh processes,
one for each side: ours from shards to shards and from shards to one file, and for comparison the way without a plan:
load everything, convert the dict, save it. Each process reports its own peak of resident memory (VmHWM). `--quick`
generates a tenth of the size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from deepseek.compat.sharded_checkpoints import convert_files
from deepseek.compat.version_converter import VersionConverter
from deepseek.core.machine import describe_machine, describe_versions

GOAL_BYTES = 1.5e9
HIDDEN, FFN, NUM_EXPERTS, KV = 2048, 2816, 8, 512


def generate(folder: Path, num_bytes: float) -> int:
    """Shards in the form of generation 3.5, one for each layer, of at least `num_bytes` in all; returns their bytes."""
    generator = torch.Generator().manual_seed(0)
    done, layer = 0, 0
    while done < num_bytes:
        shapes = {
            f"model.layers.{layer}.self_attn.qkv_proj.weight": (HIDDEN + 2 * KV, HIDDEN),
            f"model.layers.{layer}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"model.layers.{layer}.mlp.gate.weight": (NUM_EXPERTS, HIDDEN),
            f"model.layers.{layer}.mlp.experts.gate_up_proj": (NUM_EXPERTS, 2 * FFN, HIDDEN),
            f"model.layers.{layer}.mlp.experts.down_proj": (NUM_EXPERTS, HIDDEN, FFN),
        }
        shard = {
            name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(shard, folder / f"layer-{layer:03d}.safetensors")
        done += sum(tensor.numel() * tensor.element_size() for tensor in shard.values())
        layer += 1
    return done


def convert(side: str, source: Path, target: Path) -> None:
    """One side, in this process."""
    if side == "ours, shards to shards":
        convert_files(VersionConverter("3.5", "5.0"), source, target)
    elif side == "ours, shards to one file":
        convert_files(VersionConverter("3.5", "3.0"), source, target)
    else:
        weights = {
            name: tensor for path in sorted(source.glob("*.safetensors")) for name, tensor in load_file(path).items()
        }
        target.mkdir()
        save_file(dict(VersionConverter("3.5", "5.0").convert(weights)), target / "model.safetensors")


def measure(source: Path, target: Path) -> Iterator[dict[str, object]]:
    """A row for each side, each in a process of its own."""
    for side in ("ours, shards to shards", "ours, shards to one file", "load everything"):
        command = [
            sys.executable,
            "-m",
            "benchmarks.convert_memory",
            "--side",
            side,
            str(source),
            str(target / side[-8:]),
        ]
        started_s = time.perf_counter()
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        yield {
            "side": side,
            "peak_bytes": int(result.stdout),
            "duration_s": round(time.perf_counter() - started_s, 1),
        }


def peak_bytes() -> int:
    """Return the most memory that was resident in this process so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Generate, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, source, target = arguments.side
        convert(side, Path(source), Path(target))
        print(peak_bytes())
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        num_bytes = generate(source, 0.4e9 if arguments.quick else 4e9)
        rows = list(measure(source, Path(folder)))
    print(f"checkpoint of {num_bytes / 1e9:.2f} GB")
    for row in rows:
        print(f"{row['side']:28} peak {int(str(row['peak_bytes'])) / 1e9:6.2f} GB {row['duration_s']:>8} s")
    bars = [
        {"name": row["side"], "value": row["peak_bytes"], "goal": GOAL_BYTES, "at_least": False} for row in rows[:2]
    ]
    report = {
        "name": "convert_memory",
        "machine": describe_machine(),
        "versions": describe_versions(),
        "checkpoint_bytes": num_bytes,
        "rows": rows,
        "bars": bars,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
