"""Putting a model and its tensors together: built without weights, then given the memory-mapped tensors themselves.

Nothing is initialized first and nothing is copied, so that a model is there in the time it takes to read its files.
Used by everything that loads: decoders, the vision models of the zoo. `stored_tensors` is the way back: what of a model
goes into a file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from deepseek.core.errors import ArtifactError, ConfigError
from deepseek.core.names import explain_unknown

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DATA_PARALLEL = "module"
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
NUM_NAMED = 3
"""Names of tensors that an error lists of each kind."""
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()} | {torch.int8: "int8"}


def build_without_values(build: Callable[[], nn.Module]) -> nn.Module:
    """Call `build`; the parameters hold nothing yet, the buffers hold what they should."""
    with _parameters_without_values():
        return build()


def fill_(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, *, source: Path | str) -> None:
    """Make `tensors` the parameters of `model`, in place and as `dtype`; tied names get one parameter.

    Raises `ArtifactError` naming `source` where a tensor is missing, left over or of another shape.
    """
    parameters = dict(model.named_parameters())
    aliases = {
        alias: owner
        for alias, owner in tied_names(model).items()
        if alias not in tensors or owner not in tensors or torch.equal(tensors[alias], tensors[owner])
    }
    state = {
        name: nn.Parameter(tensor.to(dtype or tensor.dtype)) if name in parameters else tensor
        for name, tensor in tensors.items()
        if name not in aliases  # a file may hold a copy; where it holds another tensor, they are two
    }
    state |= {alias: state[owner] for alias, owner in aliases.items() if owner in state}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ArtifactError(f"the weights in {source} do not fit the model: {_explain_misfit(model, state)}") from error


def _explain_misfit(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Describe the names and shapes that do not fit, a few of each, and the next step."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {list(tensor.shape)} instead of {list(expected[name].shape)}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    kinds = ((missing, "missing"), (unknown, "left over"), (shapes, ""))
    problems = "; ".join(f"{_some(names)} {what}".rstrip() for names, what in kinds if names)
    return f"{problems}; give the weights of this very model, or mend its config"


def _some(names: Sequence[str]) -> str:
    """Return the first few of `names`, and how many more there are."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return f"{', '.join(names[:NUM_NAMED])}{more}"


def strip_wrappers(tensors: Mapping[str, Tensor], known: Collection[str], *, source: Path) -> dict[str, Tensor]:
    """Strip from the names of tensors what wrappers of torch added, where that leaves a `known` name.

    `DistributedDataParallel` and `AveragedModel` write `module.`, `torch.compile` `_orig_mod.`, FSDP and checkpointing
    names of their own, anywhere in a name and inside each other. Raises `ArtifactError` where two become one.

    >>> list(strip_wrappers({"module.fc._orig_mod.bias": torch.ones(1)}, {"fc.bias"}, source=Path("file")))
    ['fc.bias']
    """
    stripped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        chosen = name if name in known else _strip(name, known)
        if chosen in stripped:
            raise ArtifactError(
                f"{source} holds {chosen!r} twice, with and without the name of a wrapper; save only one of them"
            )
        if chosen not in known and name.partition(".")[0] == "n_averaged":
            continue  # how many models an AveragedModel is the mean of
        stripped[chosen] = tensor
    return stripped


def _strip(name: str, known: Collection[str]) -> str:
    """`name` without wrappers; `module` may be a layer of a model, and counts where it leads or hides a known name."""
    parts = name.split(".")
    plain = ".".join(part for part in parts if part not in (*WRAPPERS, DATA_PARALLEL))
    if plain in known or parts[0] in (*WRAPPERS, DATA_PARALLEL):
        return plain
    return ".".join(part for part in parts if part not in WRAPPERS)


def stored_tensors(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the parameters by name, as `dtype` and tied ones once, and buffers as they are."""
    aliases, parameters = tied_names(model), dict(model.named_parameters())
    return {
        name: tensor.to(dtype or tensor.dtype) if name in parameters else tensor
        for name, tensor in model.state_dict().items()
        if name not in aliases
    }


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the names of stored tensors that alias another one, with that one's name."""
    owners: dict[int, str] = {}
    named = model.state_dict(keep_vars=True).items()
    names = {name: owners.setdefault(id(tensor), name) for name, tensor in named}
    return {name: owner for name, owner in names.items() if name != owner}


def main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype of the largest tensor."""
    return max(tensors.values(), key=torch.numel).dtype


def name_precision(dtype: torch.dtype) -> str:
    """Return the manifest's name for `dtype`."""
    if dtype not in PRECISIONS:
        raise ArtifactError(f"the weights are {dtype}; convert them to one of {', '.join(PRECISIONS.values())}")
    return PRECISIONS[dtype]


def dtype_of(precision: str | None) -> torch.dtype | None:
    """Return the dtype that `precision` names."""
    if precision is not None and precision not in DTYPES:
        raise ConfigError(explain_unknown("precision", precision, DTYPES))
    return None if precision is None else DTYPES[precision]


def is_int8(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether layers of int8 are among `tensors`."""
    return any(tensor.dtype is torch.int8 for tensor in tensors.values())


@contextmanager
def _parameters_without_values() -> Iterator[None]:
    """Modules built inside by this thread get parameters on the meta device, and buffers with their real values.

    `torch.device("meta")` would take the values of the buffers too, and tables of angles stand in no file.
    """
    owner = threading.get_ident()

    def strip(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != owner:
            return None  # keeps the parameter as it is
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch's annotation leaves out that what a hook returns takes the parameter's place.
    handle = register_module_parameter_registration_hook(strip)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
