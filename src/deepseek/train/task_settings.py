"""The settings of every task, one class each; `kind` in a config says which of them it is."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deepseek.core.config import Config, name_kind
from deepseek.core.errors import ConfigError
from deepseek.models.yolov7.training_loss import DetectionLossConfig


class AnyTaskSettings(Config):
    """What the settings of all tasks have."""

    data_kinds: ClassVar[tuple[str, ...]] = ("text",)
    """Kinds of data that the task learns from; the first is taken where a config names none."""


class CausalLMSettings(AnyTaskSettings):
    """Predict each next token of a text, or of what the assistant says in chats."""

    data_kinds: ClassVar[tuple[str, ...]] = ("text", "chat")

    kind: Literal["causal_lm"] = "causal_lm"
    """Name of the task."""


class ImageClassificationSettings(AnyTaskSettings):
    """Choose the class of an image."""

    data_kinds: ClassVar[tuple[str, ...]] = ("images",)

    kind: Literal["image_classification"] = "image_classification"
    """Name of the task."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of the target that is spread over all classes."""
    mixup: float = Field(default=0.0, ge=0)
    """Blends each batch with itself in another order, by a share from the beta distribution with this parameter; 0
    blends nothing."""


class DetectionSettings(AnyTaskSettings):
    """Find the objects of an image, as boxes with classes."""

    data_kinds: ClassVar[tuple[str, ...]] = ("boxes",)

    kind: Literal["detection"] = "detection"
    """Name of the task."""
    anchors: Literal["model", "data"] = "model"
    """Typical boxes that predictions start from: those of the model, or ones fitted to the training boxes, for a model
    with random weights."""
    loss: DetectionLossConfig = DetectionLossConfig()
    """Gains of the loss."""


class MaskedLMSettings(AnyTaskSettings):
    """Predict the tokens that are hidden in a text."""

    kind: Literal["masked_lm"] = "masked_lm"
    """Name of the task."""
    mask_share: float = Field(default=0.15, gt=0, le=1)
    """Share of the tokens that are to be predicted; of these 80 % are hidden, 10 % replaced and 10 % left."""
    whole_words: bool = False
    """Hide whole words instead of tokens."""


class SequenceClassificationSettings(AnyTaskSettings):
    """Choose the class of a text or a pair of texts, or estimate a number for it."""

    data_kinds: ClassVar[tuple[str, ...]] = ("table",)

    kind: Literal["sequence_classification"] = "sequence_classification"
    """Name of the task."""
    text: str = "text"
    """Column with the text."""
    text_pair: str | None = None
    """Column with the second text of each pair."""
    label: str = "label"
    """Column with the class, by name or number, or with the number that is to be estimated."""
    labels: tuple[str, ...] = ()
    """Names of the classes in their order; none takes those of the training rows."""
    is_regression: bool = False
    """Estimate a number instead of choosing a class."""


class QuestionAnsweringSettings(AnyTaskSettings):
    """Find the answer to a question in a text."""

    data_kinds: ClassVar[tuple[str, ...]] = ("table",)

    kind: Literal["question_answering"] = "question_answering"
    """Name of the task."""
    question: str = "question"
    """Column with the question."""
    context: str = "context"
    """Column with the text that the answer is in."""
    answers: str = "answers"
    """Column with the answers as SQuAD has them, {"text": [...], "answer_start": [...]}, or with one text."""
    answer_start: str = "answer_start"
    """Column with the character where the answer begins, where `answers` holds one text."""
    stride: int = Field(default=32, ge=0)
    """Tokens that the windows of a long context share with the one before."""
    max_answer_tokens: int = Field(default=30, ge=1)
    """Most tokens of an answer that an evaluation takes."""
    no_answer: bool = False
    """Whether questions may have no answer."""


class SentenceEmbeddingSettings(AnyTaskSettings):
    """Give texts that belong together vectors that lie together."""

    data_kinds: ClassVar[tuple[str, ...]] = ("table",)

    kind: Literal["sentence_embedding"] = "sentence_embedding"
    """Name of the task."""
    text: str = "text"
    """Column with the first text of each pair."""
    text_pair: str = "text_pair"
    """Column with the second one."""
    score: str | None = None
    """Column with a number that says how much the texts belong together; evaluations compare similarities with it."""
    min_score: float | None = None
    """Least score of the pairs that are trained on; none trains on all."""
    temperature: float = Field(default=0.05, gt=0)
    """Divides the similarities before the softmax."""
    symmetric: bool = True
    """Also look for the first text among the first texts of all pairs."""
    pooling: Literal["mean", "cls", "max"] = "mean"
    """How one vector comes from those of the tokens."""

    @model_validator(mode="after")
    def _check_score(self) -> Self:
        if self.min_score is not None and self.score is None:
            raise ConfigError("task.min_score is a bound for scores and task.score names no column; give it, too")
        return self


DistilledSettings = Annotated[
    CausalLMSettings | MaskedLMSettings | SequenceClassificationSettings | ImageClassificationSettings,
    Field(discriminator="kind"),
    BeforeValidator(name_kind("causal_lm")),
]
"""The settings of the tasks that can be learned from a teacher, too."""


class DistillationSettings(AnyTaskSettings):
    """Learn another task from the probabilities of a teacher, beside the labels."""

    data_kinds: ClassVar[tuple[str, ...]] = ("text", "table", "images")

    kind: Literal["distillation"] = "distillation"
    """Name of the task."""
    teacher: str
    """Model that teaches: the folder of an artifact or of Hugging Face, trained for the same classes or tokens."""
    of: DistilledSettings
    """The task that is learned."""
    temperature: float = Field(default=2.0, gt=0)
    """Divides the logits of both before they are compared; above 1 unlikely answers count more."""
    hard_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the loss with the labels; the rest is that with the teacher."""

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        if isinstance(self.of, SequenceClassificationSettings) and self.of.is_regression:
            raise ConfigError(
                "a regression has no classes that a teacher could have probabilities for; train on the numbers that "
                "the teacher estimates"
            )
        return self


TaskSettings = Annotated[
    CausalLMSettings
    | MaskedLMSettings
    | SequenceClassificationSettings
    | QuestionAnsweringSettings
    | SentenceEmbeddingSettings
    | DistillationSettings
    | ImageClassificationSettings
    | DetectionSettings,
    Field(discriminator="kind"),
    BeforeValidator(name_kind("causal_lm")),
]
"""The settings of any task; a task without settings of its own may be written as its name."""
