"""The settings of a training run: one config that says everything, so that a run is a recipe plus overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import Field, JsonValue, field_validator, model_validator

from deepseek.checkpoint.activations import Policy
from deepseek.compiler.passes.memory.recomputation import check_budget
from deepseek.core.config import Config, list_kinds
from deepseek.core.errors import ConfigError
from deepseek.core.names import explain_unknown
from deepseek.data.config import ChatConfig, DataConfig, DataSettings
from deepseek.mixed_precision.amp_levels import Level
from deepseek.models.decoder.model import DecoderConfig
from deepseek.nn.lora import LoRAConfig
from deepseek.optim.optimizers import OptimizerConfig
from deepseek.train.task_settings import AnyTaskSettings, CausalLMSettings, TaskSettings

D = TypeVar("D", bound=Config)


class StoppingConfig(Config):
    """When a run ends early, and which of its states it keeps."""

    metric: str = "heldout_loss"
    """Metric of the evaluations that decides: `heldout_loss`, or one that the task measures."""
    patience: int = Field(default=0, ge=0)
    """Evaluations in a row without a better metric after which the run ends; 0 goes on to the last step."""
    min_change: float = Field(default=0.0, ge=0)
    """Least change of the metric that counts as better."""
    keep_best: bool = False
    """Keep the model of the best evaluation instead of that of the last step."""

    @property
    def is_used(self) -> bool:
        """Whether evaluations decide anything."""
        return self.patience > 0 or self.keep_best


class TrainConfig(Config):
    """One training run."""

    other_names: ClassVar[Mapping[str, str]] = {"ds_grad_clip": "optimizer.grad_clip"}

    folder: str = "runs/train"
    """Folder of the run; data caches, checkpoints, events and the finished model go there."""
    task: TaskSettings = CausalLMSettings()
    """What is learned; a task without settings may be written as its name: `causal_lm`."""
    resume_from: str | None = None
    """Checkpoint of another run, runs/a/checkpoints/step-00000500 for example, that a run without checkpoints goes on
    from."""
    init: str | None = None
    """What training begins with, `model` aside: the folder of an artifact or of Hugging Face, or the name of a model,
    which has random weights unless `init_weights` leads to others. None begins with `model` and random weights."""
    init_weights: str | None = None
    """A safetensors file or a model folder with weights for a model that `init` names, torchvision's for example."""
    init_settings: dict[str, JsonValue] = Field(default_factory=dict)
    """Settings of a model that `init` names which are changed: {"width": 16}."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameters, or of modules, that stay as they are: [embed, "layers.[0-3]"]; batch norms in them keep
    their statistics."""
    adapter: LoRAConfig | None = None
    """Trains a low-rank correction beside the frozen weights of `init`, and saves it alone: {rank: 8, targets:
    [q_proj, v_proj]}. None trains the weights themselves."""
    model: DecoderConfig = DecoderConfig()
    """Shape of a decoder that begins with random weights; not read where `init` is given."""
    data: DataSettings = DataConfig()
    """What is learned from, and how it becomes batches; without a `kind`, of the kind that the task asks for."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule and learning rate."""
    num_steps: int = Field(default=1000, ge=1)
    """Optimizer steps of the whole run."""
    accum_steps: int = Field(default=1, ge=1)
    """Micro-batches whose gradients are added up before each optimizer step, of all ranks of a plan together."""
    precision: Literal["auto", "fp32", "bf16", "dynamic"] = "auto"
    """Precision of matmuls: `bf16`, `fp32`, `auto` for bf16 where it is faster, or `dynamic` for a
    choice per layer from its gradients, which also keeps activations in bf16."""
    ds_amp_level: Level | None = None
    """`O0` computes in fp32 whatever `precision` says, `O1` as it says; none asks the environment's `DS_AMP_LEVEL`."""
    ds_activation_checkpoint: Policy | float = "none"
    """Part that the backward pass recomputes: nothing (`none`), the cheap part of each block (`selective`), blocks as a
    whole (`block`, `full`), or, for a number, blocks chosen by measurement so that this share of the bytes is kept."""
    ds_memory_profiler: bool = False
    """Record what one step needs its memory for, as an event and as the page `memory.html` in the run's folder, and
    watch for leaks at every step that is logged."""
    memory_profiler_step: int = Field(default=3, ge=1)
    """Step that is recorded, counted from 1 in each process."""
    compile: Literal["none", "blocks"] = "none"
    """Compile each kind of block once, or run eagerly; compiling pays on runs of more than a few minutes."""
    device: str = "cpu"
    """Torch device that the run computes on."""
    seed: int = Field(default=0, ge=0)
    """Decides the initial weights; the order of the data has its own seed."""
    on_bad_step: Literal["skip", "stop", "rewind"] = "stop"
    """Answer to a loss or gradient that is no number: leave the update out and go on (`skip`), end the run with the
    position of the batch (`stop`), or go back to the last checkpoint and leave that batch out (`rewind`)."""
    max_bad_steps: int = Field(default=10, ge=1)
    """Bad steps in a row after which `skip` and `rewind` end the run as well."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Share that an average of the weights keeps at each step; it is evaluated and becomes the model. None keeps no
    average."""
    stopping: StoppingConfig = StoppingConfig()
    """When the run ends early, and which of its states becomes the model."""
    checkpoint_every: int = Field(default=500, ge=1, le=500)
    """Optimizer steps between two checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints that stay on disk."""
    evaluate_every: int = Field(default=0, ge=0)
    """Optimizer steps between two held-out losses; 0 evaluates at the end only."""
    evaluation_units: int = Field(default=0, ge=0)
    """Held-out units (tokens, images, ...) that each evaluation reads; 0 reads all of them."""
    log_every: int = Field(default=10, ge=1)
    """Optimizer steps between two `StepDone` events."""

    def override(self, changes: Mapping[str, Any]) -> Self:
        """A copy with dotted keys changed; another task brings its kind of data, unless one is chosen as well."""
        kind = changes.get("task", changes.get("task.kind"))
        settings = list_kinds(type(self), "task").get(kind) if isinstance(kind, str) else None
        if settings is not None and not changes.keys() & {"data", "data.kind"}:
            assert issubclass(settings, AnyTaskSettings)
            if self.data.kind not in settings.data_kinds:
                changes = {"data.kind": settings.data_kinds[0]} | dict(changes)
        return super().override(changes)

    def data_of(self, kind: type[D]) -> D:
        """Return the settings of the data, which have to be a `kind`; raises `ConfigError` where they are another."""
        if not isinstance(self.data, kind):
            wanted = kind.model_fields["kind"].get_default()
            raise ConfigError(
                f"the task {self.task.kind} learns from data of the kind {wanted} and data.kind is {self.data.kind}; "
                f"set data.kind={wanted}, or choose another task"
            )
        return self.data

    @model_validator(mode="before")
    @classmethod
    def _choose_data_kind(cls, values: Any) -> Any:
        """Data without a kind is of the kind that the task asks for."""
        if not isinstance(values, dict):
            return values
        task, data = values.get("task"), values.get("data", {})
        while isinstance(task, dict) and isinstance(task.get("of"), str | dict):
            task = task["of"]  # what a teacher teaches decides
        kind = task.get("kind") if isinstance(task, dict) else getattr(task, "kind", task)
        settings = list_kinds(cls, "task").get(kind) if isinstance(kind, str) else None
        if settings is None or not isinstance(data, dict):
            return values
        assert issubclass(settings, AnyTaskSettings)
        return values | {"data": {"kind": settings.data_kinds[0]} | data}

    @field_validator("ds_activation_checkpoint", mode="before")
    @classmethod
    def _check_activation_checkpoint(cls, value: object) -> object:
        if isinstance(value, str) and value not in get_args(Policy):
            known = explain_unknown("ds_activation_checkpoint", value, get_args(Policy))
            raise ConfigError(f"{known}; or a number over 0 and up to 1, the share of bytes to keep")
        return check_budget(float(value)) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _check_init(self) -> Self:
        if self.init is None and (self.init_weights is not None or self.init_settings):
            raise ConfigError("init_weights and init_settings belong to a model that init names; give init, too")
        if self.init is None and self.adapter is not None:
            raise ConfigError(
                "an adapter is trained on weights that exist, and init is not given; give a folder as init"
            )
        if self.init is not None and self.model != DecoderConfig():
            raise ConfigError(
                f"init={self.init} brings the model's shape, and model is set as well; leave model out, or leave init "
                "out to begin with random weights"
            )
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        # The lengths of a model that init names are known when it is open; other tasks do not learn from rows.
        if self.init is None and isinstance(self.task, CausalLMSettings):
            self.check_lengths(self.model.max_length, "model.max_length is", "raise model.max_length")
        return self

    def check_lengths(self, max_length: int, seen: str, way_out: str = "choose another model") -> None:
        """Raise `ConfigError` where a row of the data is longer than `max_length`, which `seen` introduces."""
        if not isinstance(self.data, DataConfig | ChatConfig):
            return
        is_packed = self.data.batching != "token_budget"
        lengths = {"max_len": self.data.max_len} if isinstance(self.data, DataConfig) and not is_packed else {}
        if is_packed or self.data.has_heldout:  # held-out text is always read in packed rows
            lengths["sequence_length"] = self.data.sequence_length
        name = max(lengths, key=lambda key: lengths[key])
        if lengths[name] > max_length:
            raise ConfigError(
                f"data.{name} makes rows of {lengths[name]} tokens and {seen} {max_length}; "
                f"shorten the rows or {way_out}"
            )

    @model_validator(mode="after")
    def _check_stopping(self) -> Self:
        settings = self.stopping
        if settings.is_used and not self.evaluate_every:
            raise ConfigError(
                "stopping.patience and stopping.keep_best compare evaluations and evaluate_every is 0; "
                "set evaluate_every to a number of steps"
            )
        return self

    @model_validator(mode="after")
    def _check_memory_profiler(self) -> Self:
        if self.ds_memory_profiler and self.compile != "none":
            raise ConfigError(
                f"ds_memory_profiler sees what operators allocate and compile is {self.compile}, whose code allocates "
                "unseen; set compile=none for the run that is looked at"
            )
        return self

    @model_validator(mode="after")
    def _check_averages(self) -> Self:
        if self.ema_decay is not None and self.optimizer.name == "schedule_free":
            raise ConfigError(
                f"ema_decay is {self.ema_decay} and optimizer.name is schedule_free, which averages the weights "
                "itself; leave ema_decay out, or choose another optimizer"
            )
        return self

    @property
    def sequences_per_step(self) -> int:
        """Rows that one optimizer step learns from: sequences, images, ..."""
        return self.data.rows_per_batch * self.accum_steps
