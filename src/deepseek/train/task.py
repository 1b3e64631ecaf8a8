"""What the training loop does not know: which data, which model, what the loss is, and how good the model is.

    class Rings(Task):
        unit = "points"

        def open_data(self, folder):
            return TaskData(loader=SampleLoader(points, batch_size=32), num_train_units=len(points))

        def build_model(self, data):
            return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))

        def inputs(self, batch):
            return (batch["position"],)

        def loss(self, outputs, batch):
            return F.cross_entropy(outputs, batch["ring"], reduction="sum")

        def count_units(self, batch):
            return len(batch["ring"])

    for event in train(config, task=Rings): ...

The loop (`loop.py`) calls a task in the order of its methods: data first, then the model, then `inputs`, `forward` and
`loss` for every batch, and at evaluations `new_metrics`. The loss of a batch is a *sum* over its units (tokens, images,
...), which the loop divides by the units of the whole step: N micro-batches give the gradient of the one big batch,
however many units each of them has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from deepseek.artifact.format import Manifest
from deepseek.artifact.reading import find_model_folder, is_adapter
from deepseek.core.errors import ConfigError
from deepseek.core.events import Event
from deepseek.data.config import ChatConfig, DataConfig, TableConfig
from deepseek.data.tokenizing import Tokenizer
from deepseek.models.adapters import adapts_just, continue_adapter, save_adapter
from deepseek.models.architectures import is_known
from deepseek.models.loading import save_model, save_own_model, tokenizer_files
from deepseek.models.starting_weights import HeadSpec, StartingModel, find_tokenizer, open_start
from deepseek.nn.lora import ALL_LINEAR
from deepseek.train.config import TrainConfig

T = TypeVar("T", DataConfig, ChatConfig, TableConfig)

LOSS = "heldout_loss"
"""The metric that every evaluation has: the mean loss per unit over held-out data."""


class Loader(Protocol):
    """Batches without end, with a position that can be saved and restored."""

    def next_batch(self) -> Any:
        """Return the batch at the position, and move the position on."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as JSON values; after a batch, it points to the next one."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; raises `DataError` when it was saved in other data or another order."""


class Measurements(Protocol):
    """Measurements over the batches of one evaluation."""

    def update(self, outputs: Any, batch: Any) -> None:
        """Take in the outputs for one batch."""

    def compute(self) -> dict[str, float]:
        """Return the measurements over all batches, by name."""


@dataclass(frozen=True, eq=False)
class TaskData:
    """The data of one run."""

    loader: Loader
    """Batches to train on."""
    num_train_units: int
    """Units of one pass over them."""
    heldout: Callable[[], Iterable[Any]] | None = None
    """Batches of one evaluation, always the same; `None` where nothing is held out."""
    tokenizer: Tokenizer | None = None
    """The tokenizer that goes into the artifact."""


@dataclass(frozen=True, eq=False)
class UnitLosses:
    """The loss of a batch, unit by unit."""

    losses_N: Tensor
    """The loss of each unit that counts."""
    sources_N: Tensor | None = None
    """int64; equal for units that depend on each other, the tokens of a document for example, over all batches of an
    evaluation. `None`: none do."""


class Task(ABC):
    """A kind of training; see the file's header for the order of calls."""

    unit: ClassVar[str] = "samples"
    """What the loss is a mean over, in the plural."""
    lower_is_better: ClassVar[frozenset[str]] = frozenset({LOSS, "perplexity"})
    """Measurements that improve by falling; all others improve by rising."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.start: StartingModel | None = None
        """What `open_init` opened; the finished model names it as its parent."""

    def prepare(self, folder: Path) -> Iterator[Event]:
        """Make what `open_data` reads in `folder`, and report progress; a finished preparation is taken up."""
        yield from ()

    @abstractmethod
    def open_data(self, folder: Path) -> TaskData:
        """Open the data; `folder` is where `prepare` worked."""

    @abstractmethod
    def build_model(self, data: Any) -> nn.Module:
        """Build the model that the run begins with, from the data that `open_data` gave; torch is seeded."""

    def open_init(self, head: HeadSpec) -> nn.Module:
        """Open the model that `config.init` names, with the head that the task needs, for `build_model`.

        Raises `ConfigError` where nothing is named, and what `open_start` raises.
        """
        config = self.config
        if config.init is None:
            raise ConfigError(
                f"task {config.task.kind} begins with a model, and init is not given; give a folder or a name as init"
            )
        folder = find_model_folder(config.init)
        if is_adapter(folder):
            self.start = self._continue_adapter(folder, head)
            return self.start.model
        self.start = open_start(
            config.init,
            head,
            weights=config.init_weights,
            settings=config.init_settings,
            allow_int8=config.adapter is not None,
        )
        return self.start.model

    def _continue_adapter(self, folder: Path, head: HeadSpec) -> StartingModel:
        """Open the adapter that `init` names on its base, to go on with; what it adapts is its own setting."""
        start, own = continue_adapter(folder, head)
        asked = self.config.adapter
        changed = [
            f"{name}={getattr(asked, name)}"
            for name in ("rank", "alpha", "rank_stabilized")
            if asked is not None and getattr(asked, name) != getattr(own, name)
        ]
        # Patterns are other words for the same layers, so that they are held against the names.
        if asked is not None and ALL_LINEAR not in asked.targets and not adapts_just(start, asked.targets):
            changed.append(f"targets={list(asked.targets)}, which are other layers than its own")
        if changed:
            raise ConfigError(
                f"init={folder} is an adapter of rank={own.rank}, alpha={own.alpha}, "
                f"rank_stabilized={own.rank_stabilized}, and adapter has {', '.join(changed)}; leave adapter out to go "
                "on with it, or merge it first"
            )
        self.config = self.config.model_copy(update={"adapter": own})
        return start

    def with_tokenizer_of_init(self, settings: T) -> T:
        """Return the settings of the data, with the tokenizer of the model that `init` names unless they name one."""
        folder = find_tokenizer(self.config.init, self.config.init_weights)
        if settings.tokenizer is not None or folder is None:
            return settings
        return settings.override({"tokenizer": str(folder)})

    def on_step(self, model: nn.Module, step: int, *, is_evaluating: bool = False) -> None:  # noqa: B027 - may do nothing
        """Tell `model` how many steps are done, where it computes by that; evaluations see it as it will be loaded."""

    @abstractmethod
    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """Return what the model is called with for `batch`."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Run `model` on a batch on its device, in the precision of the run."""
        return model(*self.inputs(batch))

    @abstractmethod
    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the () sum of the loss over the units of `batch`, from what `forward` returned."""

    def loss_without_outputs(self, model: nn.Module, batch: Any) -> Tensor | None:
        """Return the () sum of the loss where the task computes it without outputs, which a training step needs not.

        `None`, as here, means `forward` and then `loss`. Runs in the precision of the run, as `forward` does.
        """
        return None

    @abstractmethod
    def count_units(self, batch: Any) -> int:
        """Count the units of `batch`, which its loss is weighted with."""

    def unit_losses(self, outputs: Any, batch: Any) -> UnitLosses | None:
        """Return the loss of each unit of `batch`, which its interval comes from; `None` has batches resampled."""
        return None

    def class_logits(self, outputs: Any, batch: Any) -> Tensor:
        """Return the (N, K) scores of the classes, or tokens, of each unit, by which it learns from a teacher, too."""
        raise ConfigError(
            f"the task {self.config.task.kind} has no classes or tokens that a teacher could have probabilities for"
        )

    def new_metrics(self) -> Measurements | None:
        """Return empty measurements for one evaluation; `None` measures the loss alone."""
        return None

    def save(self, model: nn.Module, data: Any, folder: Path, **record: Any) -> Manifest:
        """Write the finished model, or the adapter alone, as the artifact `folder`; `record` goes into its manifest.

        Of a model whose class is your own, `load_weights_` reads the weights back.
        """
        adapter, start = self.config.adapter, self.start
        if adapter is not None and start is not None:
            files = tokenizer_files(data.tokenizer) | record.pop("files", {})
            return save_adapter(model, folder, start, adapter, files=files, overwrite=True, **record)
        if not is_known(model):
            return save_own_model(model, folder, tokenizer=data.tokenizer, overwrite=True, **record)
        origin = None if start is None or self.config.init_weights is not None else start.folder
        return save_model(model, folder, tokenizer=data.tokenizer, origin=origin, overwrite=True, **record)
