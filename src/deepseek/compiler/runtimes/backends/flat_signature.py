"""A model as a function from tensors to tensors, whatever its own signature is.

Runtimes take a list of tensors and give one back; models take keywords, tuples and dicts and return objects.
Flattening notes the structure of the sample inputs and of the outputs once, so that a runtime sees only tensors and a
user only the model's own convention. What is not a tensor is part of the program: a flag of the samples stays as it
was, and a call with another value is refused.

Cost: about ten microseconds a call for nested values, one for plain positional tensors.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepseek.compiler.runtimes.selection_policy import Traits
from deepseek.core.errors import ConfigError

_ADVICE = "pass one tensor, a tuple of positional arguments, or a dict of keywords, as the model is called"


class Structure:
    """How a call is put together from leaves; the same object in every copy of a model, since it never changes."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        return self


class FlatModel(nn.Module):
    """`model` behind a list of tensors: fills the constants in, calls it, and keeps the tensors of what it returns."""

    def __init__(self, model: nn.Module, leaves: Sequence[Any], spec: Any) -> None:
        super().__init__()
        self.model = model
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        self._structure = Structure(spec)
        self.kept: tuple[int, ...] | None = None
        """Which of the returned tensors a runtime has to give; all where it is not said."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        returned = [leaf for leaf in pytree.tree_leaves(self.call(*tensors)) if isinstance(leaf, Tensor)]
        return tuple(returned if self.kept is None else (returned[index] for index in self.kept))

    def call(self, *tensors: Tensor) -> Any:
        """Return the model's own result."""
        remaining = iter(tensors)
        leaves = [
            next(remaining) if is_tensor else constant
            for is_tensor, constant in zip(self._is_tensor, self._constants, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure.spec)
        return self.model(*args, **kwargs)


@dataclass(frozen=True)
class Flattened:
    """A flat model, its sample inputs and answers, and the structures on both sides."""

    model: FlatModel
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    input_spec: Any
    input_leaves: tuple[Any, ...]
    output_spec: Any
    output_leaves: tuple[Any, ...]
    output_sources: tuple[tuple[str, int], ...]
    """Where each returned tensor comes from: an answer of the flat model, or an input that is handed through."""
    is_plain: bool
    """Positional tensors in and one tensor out: nothing has to be taken apart or put together."""
    names: tuple[str, ...] = ()
    """Names of the model's positional arguments, in order, as far as its signature tells."""
    seconds: float = 0.0
    """Seconds that the answers took."""

    @property
    def shapes(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Return the shape and type of each input."""
        return tuple((tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for tensor in self.inputs)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the weights."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    @property
    def traits(self) -> Traits:
        """Return the traits of the model that the selection policy decides by."""
        modules = list(self.model.modules())
        return Traits(
            num_convolutions=sum(isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in modules),
            num_linears=sum(isinstance(module, nn.Linear) for module in modules),
            batch_size=self.inputs[0].shape[0] if self.inputs[0].ndim else 1,
            num_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            device=self.inputs[0].device.type,
        )

    def read_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Return the tensors of a call, in order; raises `ConfigError` for a call that is not like the samples."""
        tensors = self.bind(args, kwargs)
        if not self.has_shapes(tensors):
            raise ConfigError(
                f"the inputs are {', '.join(map(_show, tensors))}; this was compiled for "
                f"{', '.join(map(_show, self.inputs))}: call it with those, or select again with other samples"
            )
        return tensors

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Return the tensors of a call, in order and of any shape; arguments are bound by name where they were not in
        order.

        Raises `ConfigError` for other arguments than those of the samples, and for another constant.
        """
        if self.is_plain and not kwargs and len(args) == len(self.inputs):
            leaves: Sequence[Any] = args
        else:
            leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
            if spec != self.input_spec:
                leaves, spec = pytree.tree_flatten(self._rebind(args, kwargs))
            if spec != self.input_spec:
                raise self._explain_call(args, kwargs)
        leaves = [self._take_array(given, sample) for given, sample in zip(leaves, self.input_leaves, strict=True)]
        self._require_constants(leaves)
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def _take_array(self, given: Any, sample: Any) -> Any:
        """Return an array as a tensor in the width of the sample's numbers, since NumPy's own are of 64 bits."""
        if not isinstance(sample, Tensor) or not isinstance(given, numpy.ndarray):
            return given
        tensor = torch.from_numpy(given)
        is_alike = tensor.is_floating_point() == sample.is_floating_point() and torch.can_cast(
            tensor.dtype, sample.dtype
        )
        return tensor.to(sample.dtype) if is_alike else tensor

    def has_shapes(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether `tensors` have the shapes and types of the samples."""
        return all(
            given.shape == sample.shape and given.dtype == sample.dtype
            for given, sample in zip(tensors, self.inputs, strict=True)
        )

    def restore_samples(self, inputs: Sequence[Tensor]) -> tuple[Any, ...] | dict[str, Any]:
        """Sample inputs in the model's own form, with `inputs` in place of its tensors."""
        tensors = iter(inputs)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self.input_leaves]
        args: tuple[Any, ...]
        kwargs: dict[str, Any]
        args, kwargs = pytree.tree_unflatten(leaves, self.input_spec)
        return kwargs or args

    @property
    def answers_tensors_only(self) -> bool:
        """Return whether nothing among the answers, such as a length, could be another one for other inputs."""
        return all(isinstance(leaf, Tensor) for leaf in self.output_leaves)

    def _rebind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the same call with arguments in order and by name as in the samples, as far as names tell."""
        given = dict(zip(self.names, args, strict=False)) | dict(kwargs)
        sample_args, sample_kwargs = pytree.tree_unflatten(list(self.input_leaves), self.input_spec)
        in_order = self.names[: len(sample_args)]
        if len(args) > len(self.names) or set(given) != {*in_order, *sample_kwargs} or len(in_order) < len(sample_args):
            return args, dict(kwargs)
        return tuple(given[name] for name in in_order), {name: given[name] for name in sample_kwargs}

    def _explain_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ConfigError:
        sample_args, sample_kwargs = pytree.tree_unflatten(list(self.input_leaves), self.input_spec)
        return ConfigError(
            f"the call has {_show_call(args, kwargs)}, and the samples had {_show_call(sample_args, sample_kwargs)}; "
            "call it like them, or select again with other samples"
        )

    def read_samples(self, samples: Any) -> tuple[Tensor, ...]:
        """Return the tensors of further samples, in order."""
        return self.read_inputs(*split_samples(samples))

    def fits(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether a call has the structure, shapes and types of the samples."""
        try:
            self.read_inputs(args, kwargs)
        except ConfigError:
            return False
        return True

    def restore_outputs(self, answers: Sequence[Tensor], inputs: Sequence[Tensor]) -> Any:
        """Return the model's own result for `inputs`, from the answers of the flat model."""
        if self.is_plain:
            return answers[0]
        sources = {"answer": answers, "input": inputs}
        tensors = iter([sources[source][index] for source, index in self.output_sources])
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self.output_leaves]
        return pytree.tree_unflatten(leaves, self.output_spec)

    def read_answers(self, answers: Any) -> tuple[Tensor, ...]:
        """Return the tensors of what a model or a runtime returned, in order; arrays of numpy become tensors."""
        leaves = pytree.tree_leaves(answers)
        return tuple(leaf if isinstance(leaf, Tensor) else torch.from_numpy(leaf) for leaf in leaves if _is_array(leaf))

    def _require_constants(self, leaves: Sequence[Any]) -> None:
        for given, expected in zip(leaves, self.input_leaves, strict=True):
            if isinstance(expected, Tensor) != isinstance(given, Tensor) or (
                not isinstance(expected, Tensor) and given != expected
            ):
                raise ConfigError(
                    f"an argument is {_show(given)} and was {_show(expected)} in the samples, where it became part of "
                    "the program; call it with the same, or select again with other samples"
                )


def split_samples(samples: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Sample inputs as positional and keyword arguments.

    >>> split_samples({"x": 1}), split_samples([2, 3])
    (((), {'x': 1}), ((2, 3), {}))
    """
    if samples is None:
        raise ConfigError(f"sample inputs are missing, and speed can only be measured on some; {_ADVICE}")
    if isinstance(samples, Tensor):
        return (samples,), {}
    if isinstance(samples, Mapping):
        return (), dict(samples)
    if isinstance(samples, Sequence) and not isinstance(samples, str | bytes):
        return tuple(samples), {}
    raise ConfigError(f"sample inputs are {_show(samples)}; {_ADVICE}")


def flatten_model(model: nn.Module, samples: Any) -> Flattened:
    """`model` behind flat tensors, with its answers to `samples` in the precision it has.

    Raises `ConfigError` for a model that is not a module in evaluation mode, and for samples without a tensor.
    """
    args, kwargs = split_samples(samples)
    require_model(model)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    inputs = tuple(leaf.detach() for leaf in leaves if isinstance(leaf, Tensor))
    if not inputs:
        raise ConfigError(f"there is no tensor among the sample inputs; {_ADVICE}")
    flat = FlatModel(model, leaves, spec).eval()
    began_s = time.perf_counter()
    with torch.no_grad():
        answer = flat.call(*inputs)
    seconds = time.perf_counter() - began_s
    output_leaves, output_spec = pytree.tree_flatten(answer)
    returned = [leaf for leaf in output_leaves if isinstance(leaf, Tensor)]
    if not returned:
        raise ConfigError(f"the model returns {_show(answer)}, in which there is no tensor; return at least one")
    flat.kept, sources = trace_outputs(returned, inputs)
    return Flattened(
        model=flat,
        inputs=inputs,
        outputs=tuple(returned[index] for index in flat.kept),
        input_spec=spec,
        input_leaves=tuple(leaves),
        output_spec=output_spec,
        output_leaves=tuple(output_leaves),
        output_sources=sources,
        is_plain=not kwargs and len(inputs) == len(args) and isinstance(answer, Tensor),
        names=read_names(model),
        seconds=seconds,
    )


def read_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the positional arguments of `model`, in order: its own `input_names`, or those of its forward
    pass.

    >>> read_names(nn.Linear(2, 2)), read_names(nn.Bilinear(2, 2, 2))
    (('input',), ('input1', 'input2'))
    """
    named = getattr(model, "input_names", None)
    if isinstance(named, tuple):
        return named
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(
        parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )


def trace_outputs(
    returned: Sequence[Tensor], inputs: Sequence[Tensor]
) -> tuple[tuple[int, ...], tuple[tuple[str, int], ...]]:
    """Return which returned tensors must be computed, and where each comes from: inputs and repetitions need no
    runtime.

    Runtimes are at their worst with these: OpenVINO cannot convert a tensor that is returned twice, and reads its
    inputs from the memory given for an answer that is one. A model that computes nothing keeps its first answer.
    """
    positions = {id(tensor): index for index, tensor in enumerate(inputs)}
    kept: dict[int, int] = {}
    for index, tensor in enumerate(returned):
        if id(tensor) not in positions and id(tensor) not in kept:
            kept[id(tensor)] = index
    if not kept:
        del positions[id(returned[0])]
        kept[id(returned[0])] = 0
    order = {identity: number for number, identity in enumerate(kept)}
    sources = [
        ("input", positions[id(tensor)]) if id(tensor) in positions else ("answer", order[id(tensor)])
        for tensor in returned
    ]
    return tuple(kept.values()), tuple(sources)


def require_model(model: Any) -> None:
    """Raise `ConfigError` for what is no module in evaluation mode."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model is {_show(model)}; give a torch.nn.Module (wrap a function in one)")
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ConfigError(f"{training[0]} is in training mode, where answers are random; call model.eval() first")


def _is_array(value: Any) -> bool:
    """Return whether `value` is a tensor or numpy's array."""
    return isinstance(value, Tensor) or type(value).__name__ == "ndarray"


def _show_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return the arguments of a call in words."""
    shown = [_show(value) for value in args] + [f"{name}={_show(value)}" for name, value in kwargs.items()]
    return f"the arguments {', '.join(shown)}" if shown else "no arguments"


def _show(value: Any) -> str:
    """Return a value as an error names it."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)[:60]
