"""What the tasks on texts share: an encoder of `transformers` on padded rows of tokens.

    table -> tokenizer -> samples, all in memory -> batches padded to their longest row -> model -> loss of the task

A task says which columns it reads and what a row becomes (`encode`); the tokenizer is that of the data settings, else
that of the folder which training begins with, else one is trained on the texts. All texts are tokenized when the data
are opened, 4 MB in about a second, so that a step only puts rows together.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from deepseek.artifact.reading import find_model_folder
from deepseek.core.errors import ConfigError
from deepseek.core.events import Event
from deepseek.data.config import TableConfig
from deepseek.data.corpus import TOKENIZER_FOLDER, TokenizerReady, provide_tokenizer
from deepseek.data.documents import Document
from deepseek.data.samples import SampleList, SampleLoader, evaluation_batches, order_samples
from deepseek.data.table_rows import TableColumns, TableRow, digest_rows, read_split
from deepseek.data.text_collate import TextBatch
from deepseek.data.tokenizing import Tokenizer, load_tokenizer
from deepseek.models import text_zoo
from deepseek.models.starting_weights import HeadSpec
from deepseek.models.transformers_models.model import TransformersModel
from deepseek.train.task import Task, TaskData

S = TypeVar("S")
B = TypeVar("B", bound=TextBatch)


class TextTask(Task, Generic[B]):
    """A task whose model is an encoder of `transformers`."""

    _input_names: tuple[str, ...] = ()
    """What the model of `build_model` takes."""

    @property
    def init_folder(self) -> Path | None:
        """The folder that training begins with, where `init` is one."""
        folder = None if self.config.init is None else find_model_folder(self.config.init)
        return folder if folder is not None and folder.is_dir() else None

    def open_encoder(self, tokenizer: Tokenizer, head: HeadSpec, *, max_len: int) -> TransformersModel:
        """Open the model that `init` names; raises `ConfigError` where the tokenizer or the rows do not fit it."""
        is_encoder = isinstance(text_zoo.MODELS.get(str(self.config.init)), Mapping)
        known = {"vocab_size": tokenizer.vocab_size, "pad_token_id": find_pad_id(tokenizer)} if is_encoder else {}
        model = self.open_init(replace(head, settings=known))
        source = self.config.init
        if not isinstance(model, TransformersModel) or not model.is_text:
            raise ConfigError(
                f"init={source} is a {type(model).__name__} and the task {self.config.task.kind} trains text encoders "
                "of transformers; give one of them, bert-base for example"
            )
        size = int(model.config["vocab_size"])
        if tokenizer.vocab_size > size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model of init={source} {size}; take the "
                "tokenizer that the model was made with, or raise vocab_size in init_settings"
            )
        if model.max_length is not None and max_len > model.max_length:
            raise ConfigError(
                f"rows may have {max_len} tokens and the model of init={source} takes {model.max_length}; lower "
                "max_len or sequence_length of the data, or choose another model"
            )
        self._input_names = model.input_names
        return model

    def inputs(self, batch: B) -> tuple[Tensor, ...]:
        """Return the tokens, and the mask and segments that the model takes and the batch needs."""
        return tuple(batch.inputs[name] for name in self._input_names if name in batch.inputs)

    def forward(self, model: nn.Module, batch: B) -> Any:
        """Call the model with the inputs that it takes."""
        assert isinstance(model, TransformersModel)
        return model(**self.named_inputs(model, batch))

    @staticmethod
    def named_inputs(model: TransformersModel, batch: B) -> dict[str, Tensor]:
        """Return the inputs of `batch` that `model` takes, by name."""
        return {name: tensor for name, tensor in batch.inputs.items() if name in model.input_names}


class TableTask(TextTask[B], Generic[S, B]):
    """A task that learns from the rows of a table."""

    @property
    @abstractmethod
    def text_columns(self) -> tuple[str, ...]:
        """The columns that hold texts."""

    @property
    def columns(self) -> TableColumns:
        """All columns that are read."""
        return TableColumns(self.text_columns)

    @abstractmethod
    def encode(self, rows: Sequence[TableRow], tokenizer: Tokenizer, *, is_heldout: bool) -> list[S]:
        """Turn rows into samples, with what they are to be answered with."""

    @abstractmethod
    def collate(self, samples: list[S]) -> B:
        """Put samples together."""

    @property
    def data_settings(self) -> TableConfig:
        """The settings of the data, with the tokenizer of the model that training begins with unless they name one."""
        return self.with_tokenizer_of_init(self.config.data_of(TableConfig))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run, once the data are open."""
        raise AssertionError("open_data comes first")

    @cached_property
    def rows(self) -> tuple[list[TableRow], list[TableRow] | None]:
        """The training rows and the held-out rows."""
        return read_split(self.data_settings, self.columns)

    def prepare(self, folder: Path) -> Iterator[Event]:
        """Load the tokenizer, or train one on the texts of the training rows."""
        documents = _TextsOfRows(self)
        tokenizer, is_reused = provide_tokenizer(self.data_settings, documents, folder / TOKENIZER_FOLDER)
        yield TokenizerReady(tokenizer.vocab_size, is_reused)

    def open_data(self, folder: Path) -> TaskData:
        """Read the table and tokenize its texts."""
        settings = self.data_settings
        self.tokenizer = tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
        train, heldout = self.rows
        samples = SampleList(self.encode(train, tokenizer, is_heldout=False), self._digest(train, tokenizer))
        loader = SampleLoader(samples, batch_size=settings.batch_size, collate=self.collate, seed=settings.seed)
        if heldout is None:
            return TaskData(loader, len(samples), None, tokenizer)
        # A table is often sorted, and `evaluation_units` may read its beginning only.
        heldout = [heldout[index] for index in order_samples(len(heldout), seed=0, epoch=0)]
        kept = SampleList(self.encode(heldout, tokenizer, is_heldout=True), self._digest(heldout, tokenizer))
        batches = lambda: evaluation_batches(kept, settings.batch_size, self.collate)  # noqa: E731 - made once
        return TaskData(loader, len(samples), batches, tokenizer)

    def _digest(self, rows: Sequence[TableRow], tokenizer: Tokenizer) -> str:
        return f"{digest_rows(rows)}-{tokenizer.digest}-{self.data_settings.max_len}"


class _TextsOfRows:
    """The texts of the training rows as documents, to be read as often as needed."""

    def __init__(self, task: TableTask[Any, Any]) -> None:
        self._task = task

    def __iter__(self) -> Iterator[Document]:
        for row in self._task.rows[0]:
            for column in self._task.text_columns:
                value = row.values.get(column)
                if isinstance(value, str):
                    yield Document(f"{row.name}.{column}", value)


def find_pad_id(tokenizer: Tokenizer) -> int:
    """Return the number of the token that fills rows up, 0 where the tokenizer has none."""
    token = tokenizer.special_tokens.get("pad_token")
    number = tokenizer.backend.token_to_id(token) if token is not None else None
    return 0 if number is None else number
