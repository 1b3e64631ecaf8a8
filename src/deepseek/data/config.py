"""The settings of the data, one class for each kind: `kind` in a config says which of them it is.

A kind that is loaded sample by sample (`samples.py`) inherits from `SamplesConfig`. Every kind says how many rows one
micro-batch has (`rows_per_batch`), which decides the learning rate, and whether anything is held out (`has_heldout`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from deepseek.core.config import Config, name_kind
from deepseek.data.packing import TooLong


def _list_one(value: Any) -> Any:
    """One source may be written without brackets."""
    return (value,) if isinstance(value, str) else value


Sources = Annotated[tuple[str, ...], BeforeValidator(_list_one)]
"""Names of files, folders, globs or URLs."""


class DataConfig(Config):
    """Where the text comes from and how it is cut into batches."""

    kind: Literal["text"] = "text"
    """Kind of the data."""
    sources: Sources = Field(default=("stdlib",), min_length=1)
    """Folders, globs, text, JSONL or Parquet files or URLs; `stdlib` is Python's own source code."""
    heldout_sources: Sources = ()
    """Sources of the held-out text; when empty, documents of `sources` are held out."""
    heldout_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of documents that are held out, chosen by a hash of their names; unused with `heldout_sources`."""
    text_field: str = "text"
    """Field of a JSONL object, or column of a Parquet file, that holds the text."""
    document_separator: str | None = Field(default=None, min_length=1)
    """Cuts plain text files into several documents, for example `<|endoftext|>`; a file is one document without it."""
    tokenizer: str | None = None
    """A `tokenizer.json` or a folder that holds one; without it one is trained on the training text."""
    tokenizer_kind: Literal["bpe", "wordpiece", "encoder_bpe"] = "bpe"
    """Kind of the tokenizer that is trained: byte-level BPE for decoders (`bpe`), BERT's WordPiece in lower case
    (`wordpiece`), or byte-level BPE with BERT's special tokens (`encoder_bpe`)."""
    vocab_size: int = Field(default=4096, ge=257)
    """Tokens of the tokenizer that is trained; unused when `tokenizer` is given."""
    batching: Literal["packed", "token_budget", "packed_documents"] = "packed"
    """`packed`: rows of one length cut from all text; `token_budget`: whole documents of similar lengths, padded;
    `packed_documents`: whole documents side by side in rows of one length, which do not see each other."""
    sequence_length: int = Field(default=256, ge=1)
    """Tokens of a row in packed batches."""
    batch_size: int = Field(default=16, ge=1)
    """Rows of one packed micro-batch; ranks of a plan deal the rows of a step out in smaller ones."""
    too_long: TooLong = "split"
    """What becomes of a document that is longer than a row of packed documents: it is cut off (`truncate`), left out
    (`drop`), or cut into pieces that do not see each other (`split`)."""
    max_tokens: int = Field(default=4096, ge=1)
    """Tokens of one token-budget micro-batch, padding included."""
    max_len: int = Field(default=2048, ge=1)
    """Tokens after which a document is cut off in token-budget batches."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of documents and rows; the same seed gives the same order on any number of ranks."""

    @property
    def rows_per_batch(self) -> int:
        """Rows of one micro-batch; a token budget counts as its number of longest rows."""
        return max(1, self.max_tokens // self.max_len) if self.batching == "token_budget" else self.batch_size

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


class ChatConfig(Config):
    """Chats and instructions: which of them, how they are written as text, and which of their tokens are learned."""

    kind: Literal["chat"] = "chat"
    """Kind of the data."""
    sources: Sources = Field(min_length=1)
    """JSONL, JSON, Parquet or CSV files, folders, globs or URLs, a chat in each row: `messages` with `role` and
    `content`, `conversations` with `from` and `value`, or `instruction`, `input` and `output`; `tools` if there are."""
    heldout_sources: Sources = ()
    """Sources of the held-out chats; when empty, chats of `sources` are held out."""
    heldout_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of chats that are held out, chosen by a hash of their names; unused with `heldout_sources`."""
    tokenizer: str | None = None
    """A `tokenizer.json` or a folder that holds one; none is that of the model that `init` names."""
    chat_template: str | None = None
    """A file with the Jinja template that chats are written by, or `chatml`; none is the tokenizer's own."""
    template_variables: dict[str, JsonValue] = Field(default_factory=dict)
    """What the template is told beside the messages: {"enable_thinking": false}."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that are learned: what the assistant says, with the end of its turn, its last turn only, or all."""
    sequence_length: int = Field(default=1024, ge=1)
    """Tokens of a row; several chats share one and do not see each other."""
    batch_size: int = Field(default=8, ge=1)
    """Rows of one micro-batch; ranks of a plan deal the rows of a step out in smaller ones."""
    too_long: TooLong = "truncate"
    """What becomes of a chat that is longer than a row: it is cut off (`truncate`), left out (`drop`), or cut into
    pieces that do not see each other (`split`)."""
    max_broken: int = Field(default=100, ge=0)
    """Chats that may be left out because they cannot be read or written, before preparing them ends with an error."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of chats and rows; the same seed gives the same order on any number of ranks."""

    @property
    def batching(self) -> Literal["packed_documents"]:
        """How chats become rows, as text has it as a setting."""
        return "packed_documents"

    @property
    def rows_per_batch(self) -> int:
        """Rows of one micro-batch."""
        return self.batch_size

    @property
    def has_heldout(self) -> bool:
        """Whether some chats are kept from training."""
        return bool(self.heldout_sources) or self.heldout_fraction > 0


class SamplesConfig(Config):
    """How samples that are loaded one by one become batches."""

    batch_size: int = Field(default=32, ge=1)
    """Samples of one micro-batch; ranks of a plan deal the samples of a step out in smaller ones."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of the samples and their random changes, on any number of workers and ranks."""
    num_workers: int | None = Field(default=None, ge=0)
    """Processes that load samples ahead; 0 loads in the training process, none takes as many as there are free cores.
    The samples are the same with any number."""
    max_broken: int = Field(default=100, ge=0)
    """Samples that may be left out because they cannot be read, before the run ends."""

    @property
    def rows_per_batch(self) -> int:
        """Samples of one micro-batch."""
        return self.batch_size


Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(gt=0, le=1)]


class AugmentationConfig(Config):
    """What training images go through, each with random numbers of its own; held-out images are left as they are."""

    min_area: float = Field(default=0.25, gt=0, le=1)
    """Least share of an image's area that is cut out and scaled to `image_size`; 1 only crops the middle."""
    max_stretch: float = Field(default=1.33, ge=1)
    """Largest ratio of the sides of what is cut out, width to height or height to width."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Share of images that are mirrored left to right; 0 where the sides mean something, as in digits and letters."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """Largest change of the brightness, as a share of it."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Largest change of the contrast, as a share of it."""
    saturation: float = Field(default=0.0, ge=0, lt=1)
    """Largest change of the saturation, as a share of it."""


class ImagesConfig(SamplesConfig):
    """Labelled images: folders with a folder for each class, or tables with a column of images and one of labels."""

    kind: Literal["images"] = "images"
    """Kind of the data."""
    sources: Sources = Field(min_length=1)
    """Folders with a folder for each class, or CSV, TSV, JSONL, JSON or Parquet tables; `digits` are the 1,797 digits
    of 8 x 8 pixels that scikit-learn brings."""
    heldout_sources: Sources = ()
    """The same for the held-out images; when empty, folders `train` and `val` below a source part it, and a share of
    the images is held out where there are none."""
    heldout_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of images that are held out, chosen by a hash of their names; unused where held-out ones are named."""
    image_column: str = "image"
    """Column of a table with the path of each image, or with the bytes of its file."""
    image_folder: str | None = None
    """Folder that paths in a table begin from; none takes the table's own."""
    label_column: str = "label"
    """Column of a table with the class of each image, as a text or an integer."""
    classes: tuple[str, ...] = ()
    """Names of the classes in their order; none takes those that occur, sorted."""
    image_size: int = Field(default=224, ge=1)
    """Height and width of the images as the model sees them, in pixels."""
    crop_share: float = Field(default=0.875, gt=0, le=1)
    """Share of the shorter side that an evaluation sees, in the middle."""
    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)
    """Red, green and blue that are taken from every pixel, of values from 0 to 1."""
    std: tuple[Spread, Spread, Spread] = (0.229, 0.224, 0.225)
    """Red, green and blue that every pixel is then divided by, more than 0 and at most 1."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Random changes of the training images."""

    @property
    def has_heldout(self) -> bool:
        """Whether some images are kept from training, as far as the settings say."""
        return bool(self.heldout_sources) or self.heldout_fraction > 0


class TableConfig(Config):
    """Rows with named columns, of texts and what is to be said about them; the task says which columns it reads."""

    kind: Literal["table"] = "table"
    """Kind of the data."""
    sources: Sources = Field(min_length=1)
    """CSV, TSV, JSONL, JSON or Parquet files, folders or globs of them, or URLs."""
    heldout_sources: Sources = ()
    """The same for the held-out rows; when empty, rows of `sources` are held out."""
    heldout_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of rows that are held out, chosen by a hash of file and row number; unused with `heldout_sources`."""
    tokenizer: str | None = None
    """A `tokenizer.json` or a folder that holds one; without it that of the folder which training begins with, or one
    that is trained on the training rows."""
    tokenizer_kind: Literal["wordpiece", "encoder_bpe"] = "wordpiece"
    """Kind of the tokenizer that is trained: BERT's WordPiece in lower case, or byte-level BPE with BERT's special
    tokens."""
    vocab_size: int = Field(default=4096, ge=6)
    """Tokens of the tokenizer that is trained; unused where there is another."""
    max_len: int = Field(default=128, ge=3)
    """Tokens after which a text or pair is cut off."""
    batch_size: int = Field(default=32, ge=1)
    """Rows, or windows of them, of one micro-batch; ranks of a plan deal those of a step out in smaller ones."""
    seed: int = Field(default=0, ge=0)
    """Decides the order of the rows."""
    max_broken: int = Field(default=100, ge=0)
    """Rows that may be left out because something is missing in them, before the run ends."""

    @property
    def rows_per_batch(self) -> int:
        """Rows of one micro-batch."""
        return self.batch_size

    @property
    def has_heldout(self) -> bool:
        """Whether some rows are kept from training."""
        return bool(self.heldout_sources) or self.heldout_fraction > 0


class BoxAugmentationConfig(Config):
    """What training images with boxes go through, each with random numbers of its own; held-out images do not."""

    mosaic: float = Field(default=1.0, ge=0, le=1)
    """Share of images that are put together with three others."""
    scale: float = Field(default=0.5, ge=0, lt=1)
    """Largest change of the size, as a share of it."""
    translate: float = Field(default=0.1, ge=0, lt=1)
    """Largest shift, across and down, as a share of `image_size`."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Share of images that are mirrored left to right; 0 where the sides mean something."""
    hue: float = Field(default=0.015, ge=0, le=0.5)
    """Largest turn of the hue, in rounds of the color circle."""
    saturation: float = Field(default=0.7, ge=0, le=1)
    """Largest change of the saturation, as a share of it."""
    brightness: float = Field(default=0.4, ge=0, le=1)
    """Largest change of the brightness, as a share of it."""


class BoxesConfig(SamplesConfig):
    """Images with boxes around their objects, as COCO's annotation files have them."""

    kind: Literal["boxes"] = "boxes"
    """Kind of the data."""
    annotations: str
    """JSON file with images, annotations and categories."""
    images: str
    """Folder that the file names of the images start from."""
    heldout_annotations: str | None = None
    """JSON file of the held-out images; none holds out a share of `images`."""
    heldout_images: str | None = None
    """Folder of the held-out images; none takes `images`."""
    heldout_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of images that are held out, chosen by a hash of their names; unused with `heldout_annotations`."""
    image_size: int = Field(default=640, ge=32, multiple_of=32)
    """Height and width of the images as the model sees them, in pixels."""
    bad_boxes: Literal["stop", "skip"] = "stop"
    """Answer to a box that has no size or lies outside its image: end with its name, or leave it out and count it."""
    augmentation: BoxAugmentationConfig = BoxAugmentationConfig()
    """Random changes of the training images."""

    @property
    def has_heldout(self) -> bool:
        """Whether some images are kept from training."""
        return self.heldout_annotations is not None or self.heldout_fraction > 0


DataSettings = Annotated[
    DataConfig | ImagesConfig | BoxesConfig | TableConfig | ChatConfig,
    Field(discriminator="kind"),
    BeforeValidator(name_kind("text")),
]
"""The settings of any kind of data; without a kind they are those of text."""
