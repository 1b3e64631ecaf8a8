"""Training tasks, each against its peer at the same settings, in turns; `all` runs every section.

    python -m benchmarks.train_tasks lora        LoRA on SmolLM2-135M: at most 0.9x the step time of peft
    python -m benchmarks.train_tasks full        the same model in all its weights: at most 1.0x
    python -m benchmarks.train_tasks images      image classification: 1.3x a plain eager loop, 1.0x Lightning Fabric
    python -m benchmarks.train_tasks masked_lm   BERT: 1.2x the tokens/s of the `transformers` Trainer
    python -m benchmarks.train_tasks detection   YOLOv7-tiny: at least the mAP@0.5 of the published recipe
    python -m benchmarks.train_tasks resume      every task: n + n steps are bit-equal to 2n

Each section is a file in `training/`, where every side is a process of its own. `lora` and `full` are one.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import Bar, add_options, print_bars, write_json

SECTIONS = {
    "lora": "fine_tuning",
    "full": "fine_tuning",
    "images": "images",
    "masked_lm": "masked_lm",
    "detection": "detection",
    "resume": "resume",
}
"""Sections and their files."""


def main() -> None:
    """Run one section, or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    sections = parser.add_subparsers(dest="section", required=True)
    for name in SECTIONS:
        find_section(name).add_options(sections.add_parser(name))
    add_options(sections.add_parser("all"))
    arguments = parser.parse_args()
    if arguments.section == "all":
        run_all(arguments)
    else:
        find_section(arguments.section).run(arguments)


def find_section(name: str) -> Any:
    """Return the module of a section: its `add_options(parser)` and `run(arguments)`."""
    return importlib.import_module(f"benchmarks.training.{SECTIONS[name]}")


def run_all(arguments: argparse.Namespace) -> None:
    """Run every section in a process of its own, so that none inherits memory or compiled code; join their results."""
    rows: list[dict[str, Any]] = []
    bars: list[Bar] = []
    pages: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        result, page = Path(temporary) / "result.json", Path(temporary) / "page.md"
        for name in SECTIONS:
            command = [sys.executable, "-m", "benchmarks.train_tasks", name]
            command += ["--json", str(result), "--markdown", str(page), *(["--quick"] if arguments.quick else [])]
            subprocess.run(command, check=True)
            section = json.loads(result.read_text(encoding="utf-8"))
            rows += [{"section": name, "unit": section["unit"]} | row for row in section["rows"]]
            bars += [Bar(**bar | {"name": f"{name}: {bar['name']}"}) for bar in section["bars"]]
            pages.append(page.read_text(encoding="utf-8"))
    print_bars(bars)
    if arguments.json:
        write_json(arguments.json, "train_tasks all", "as each row says", rows, bars)
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
