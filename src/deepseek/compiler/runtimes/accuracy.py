"""How near a backend's answers are to those of the model itself, in FP32: error, cosine, and the same largest entry.

`check_numbers` runs what was built on the samples and on what it was calibrated on, and compares; whether that is near
enough is decided in `selection_policy.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from deepseek.compiler.runtimes.backends.interface import BackendError, Built, Job
from deepseek.compiler.runtimes.selection_policy import Numbers, Tolerance, merge_numbers

CHECK_S = 2.0
"""Of checking one candidate's answers to more than the samples."""
GROSS = 3.0
"""Times the bound: an error on the samples that no others can make up for."""


def check_numbers(job: Job, built: Built, tolerance: Tolerance) -> Numbers:
    """Return how the answers of `built` compare with FP32 eager: to the samples, then to what int8 is calibrated on.

    The mean over all batches that `CHECK_S` has time for: one row alone, which a batch may be, says little. An answer
    to the samples that is beyond all bounds needs no others.
    """
    began_s = time.monotonic()
    found = [compare(job.flattened.outputs, _answer(built, job.inputs), tolerance)]
    if not found[0].is_finite or found[0].relative_error > GROSS * tolerance.relative_error:
        return found[0]
    for index, inputs in enumerate(job.further):
        if time.monotonic() - began_s > CHECK_S:
            break
        expected = job.once(("answers", index), partial(_answer, Built(job.flattened.model), inputs))
        found.append(compare(expected, _answer(built, inputs), tolerance))
    return merge_numbers(found)


def _answer(built: Built, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Copies, since a runtime may answer the next call in the same memory."""
    try:
        with torch.no_grad():
            return [answer.clone() for answer in built.run(*inputs)]
    except Exception as error:
        raise BackendError(f"it fails on the samples: {type(error).__name__}: {str(error)[:200]}") from error


def compare(references: Sequence[Tensor], answers: Sequence[Tensor], tolerance: Tolerance) -> Numbers:
    """Return the worst over all outputs of relative error, cosine and top-1 agreement. Raises `BackendError` on other
    shapes."""
    if [reference.shape for reference in references] != [answer.shape for answer in answers]:
        raise BackendError(
            f"its answers have shapes {[tuple(answer.shape) for answer in answers]} instead of "
            f"{[tuple(reference.shape) for reference in references]}"
        )
    found = [_compare_one(*pair, tolerance) for pair in zip(references, answers, strict=True)]
    agreements = [numbers.agreement for numbers in found if numbers.agreement is not None]
    raw = [numbers.raw_agreement for numbers in found if numbers.raw_agreement is not None]
    return Numbers(
        relative_error=max(numbers.relative_error for numbers in found),
        cosine=min(numbers.cosine for numbers in found),
        agreement=min(agreements, default=None),
        raw_agreement=min(raw, default=None),
        is_finite=all(numbers.is_finite for numbers in found),
    )


def _compare_one(reference: Tensor, answer: Tensor, tolerance: Tolerance) -> Numbers:
    expected, given = reference.detach().double(), answer.detach().double()
    if not given.isfinite().all():
        return Numbers(float("inf"), -1.0, None, is_finite=False)
    size = float(expected.norm())
    error = float((given - expected).norm())
    relative = error / size if size > 0 else (0.0 if error == 0 else float("inf"))
    cosine = (
        float(torch.nn.functional.cosine_similarity(expected.flatten(), given.flatten(), dim=0)) if size > 0 else 1.0
    )
    if relative == 0:
        cosine = 1.0
    agreement, raw = _agreement(expected, given, tolerance) if _is_scores(reference) else (None, None)
    return Numbers(relative, cosine, agreement, raw)


def _is_scores(reference: Tensor) -> bool:
    """Return whether an output looks like rows of class scores."""
    return reference.is_floating_point() and reference.ndim == 2 and reference.shape[1] > 1


def _agreement(expected: Tensor, given: Tensor, tolerance: Tolerance) -> tuple[float | None, float]:
    """Return the top-1 agreement among rows that an allowed error cannot flip, and among all rows."""
    same = expected.argmax(1) == given.argmax(1)
    best = expected.topk(2, dim=1).values
    spread = expected.std(dim=1, correction=0)
    is_decided = (best[:, 0] - best[:, 1]) > 2 * tolerance.relative_error * spread
    raw = float(same.double().mean())
    return (float(same[is_decided].double().mean()) if is_decided.any() else None), raw
