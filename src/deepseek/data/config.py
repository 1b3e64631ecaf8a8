"""The settings of the data: which text, which tokenizer, and how tokens become batches."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from deepseek.core.config import Config


class DataConfig(Config):
    """Where the text comes from and how it is cut into batches."""

    sources: tuple[str, ...] = Field(default=("stdlib",), min_length=1)
    """Folders, globs, text, JSONL or Parquet files or URLs; `stdlib` is Python's own source code."""
    heldout_sources: tuple[str, ...] = ()
    """Sources of the held-out text; when empty, documents of `sources` are held out."""
    heldout_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of documents that are held out, chosen by a hash of their names; unused with `heldout_sources`."""
    text_field: str = "text"
    """Field of a JSONL object, or column of a Parquet file, that holds the text."""
    document_separator: str | None = Field(default=None, min_length=1)
    """Cuts plain text files into several documents, for example `<|endoftext|>`; a file is one document without it."""
    tokenizer: str | None = None
    """A `tokenizer.json` or a folder that holds one; without it a byte-level BPE is trained on the training text."""
    vocab_size: int = Field(default=4096, ge=257)
    """Tokens of the tokenizer that is trained; unused when `tokenizer` is given."""
    batching: Literal["packed", "token_budget"] = "packed"
    """`packed`: rows of one length cut from all text; `token_budget`: whole documents of similar lengths, padded."""
    sequence_length: int = Field(default=256, ge=1)
    """Tokens of a row in packed batches."""
    batch_size: int = Field(default=16, ge=1)
    """Rows of one packed batch of one rank."""
    max_tokens: int = Field(default=4096, ge=1)
    """Tokens of one token-budget batch of one rank, padding included."""
    max_len: int = Field(default=2048, ge=1)
    """Tokens after which a document is cut off in token-budget batches."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of documents and rows; the same seed gives the same order on any number of ranks."""

    @property
    def has_heldout(self) -> bool:
        """Whether some text is kept from training."""
        return bool(self.heldout_sources) or self.heldout_fraction > 0

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.batching == "token_budget" and self.max_len > self.max_tokens:
            raise ValueError(
                f"max_len={self.max_len} is over max_tokens={self.max_tokens}, so the longest document fits no batch; "
                "lower max_len or raise max_tokens"
            )
        return self
