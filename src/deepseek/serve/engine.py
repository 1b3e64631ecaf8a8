"""The engine: several requests generated at once by one model with a KV cache, one `step` at a time.

    submit(sequences) -> [step() -> outputs] until nothing has work

`step` is the whole story: drop what was cancelled, let the scheduler decide, run the model, choose tokens, report.
Policy is in `scheduling.py`, text in `detokenizing.py`, chance in `sampling.py`; here they meet the tensors. `submit`
and `cancel` may be called from any thread, `step` from one. For a script, `generate` and `run` drive the steps; for a
server, `engine_loop.py` does so.

What goes wrong with one sequence (logits that are no numbers, text that cannot be decoded, a prompt that the model
fails on) ends that sequence with an error, and the others go on. Where the model cannot read a single token any more,
it is the engine that failed, and `step` raises.

Memory: max_num_seqs * max_length positions of KV cache, taken at once, so that nothing can run out of it later.
Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from deepseek.compiler.runtimes.cuda_graphs import Record
from deepseek.core.errors import ConfigError, RequestError
from deepseek.core.machine import measure_free_bytes
from deepseek.data.tokenizing import StreamDecoder, Tokenizer
from deepseek.models.decoder.model import Decoder
from deepseek.nn.kv_cache import KVCache
from deepseek.serve.config import EngineConfig
from deepseek.serve.detokenizing import TextWriter
from deepseek.serve.recorded_decoding import RecordedDecoding, Row
from deepseek.serve.sampling import choose, score
from deepseek.serve.scheduling import Chunk, Schedule, Scheduler
from deepseek.serve.sequences import (
    FinishReason,
    Generation,
    GenerationRequest,
    LiveSequence,
    Logprobs,
    Output,
    Sampling,
    Token,
    collect,
    fit,
)

logger = logging.getLogger(__name__)

GREEDY = Sampling(temperature=0)
SHORTEST_CONTEXT = 512
"""A context that is never cut to fit into memory; where even that does not fit, it is an error."""
_NOT_FINITE = "the model returned logits that are not finite numbers for this request"
KEY_BLOCK = 64
"""Attention reads whole blocks of so many key positions; what lies beyond a sequence is masked and adds zeros."""


class Engine:
    """A model, its KV cache and the sequences in it. The model is put into evaluation mode.

    `record` is how a decoding step is recorded (`compiler/runtimes/cuda_graphs.py`); none is on a CUDA device.

    Raises `ConfigError` when `config.max_length` is longer, or the tokenizer's vocabulary larger, than the model's,
    when the cache does not fit into memory, and for `cuda_graphs="on"` without CUDA.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, config: EngineConfig | None = None, *, record: Record | None = None
    ) -> None:
        config = config or EngineConfig()
        check_fit(model, tokenizer, config)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config = config
        self._device = next(chain(model.parameters(), model.buffers())).device
        self.max_length = config.max_length or _fitting_length(model, config.max_num_seqs, self._device)
        self._cache = _new_cache(model, config.max_num_seqs, self.max_length)
        self._recorded: RecordedDecoding | None = None
        if config.cuda_graphs == "on" or (config.cuda_graphs == "auto" and self._device.type == "cuda"):
            self._recorded = RecordedDecoding(
                partial(self._decode_rows, 0), self._device, max_num_seqs=config.max_num_seqs, record=record
            )
        self._scheduler = Scheduler(config.max_num_seqs, config.max_queue, config.prefill_tokens)
        self._writers: dict[int, TextWriter] = {}
        self._lock = threading.Lock()  # held while the scheduler changes, never while the model runs

    # Requests

    def request(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        prompt_logprobs: int | None = None,
        choice: int = 0,
    ) -> GenerationRequest:
        """Build a request for `prompt`, checked against the context length; no `max_tokens` is as many as fit.

        Text is encoded with the special tokens that the tokenizer's own rules add; token ids are taken as they are.
        An empty text is the beginning of a document: the token that begins one, or that ends the one before. A stop
        string that is a special token stops at that token. With `prompt_logprobs`, the prompt is scored, and
        `max_tokens` may be 0. Raises `RequestError` for a prompt without token ids, one that does not fit, and token
        ids outside the vocabulary.
        """
        ids = tuple(self._encode(prompt) if isinstance(prompt, str) else prompt)
        vocab_size = self.model.config.vocab_size
        if not all(0 <= id_ < vocab_size for id_ in ids):
            raise RequestError(f"the prompt holds token ids outside 0 to {vocab_size - 1}", param="prompt")
        room = fit(len(ids), max_tokens, self.max_length)
        stop_ids = tuple(self.tokenizer.find_special(stop))
        return GenerationRequest(ids, room, sampling, tuple(stop), ignore_eos, stop_ids, prompt_logprobs, choice)

    def submit(self, sequences: Sequence[LiveSequence]) -> None:
        """Queue all of `sequences` or, with an `OverloadedError`, none of them."""
        writers = {sequence.id: self._new_writer(sequence.request) for sequence in sequences}
        with self._lock:
            self._scheduler.submit(sequences)
            self._writers.update(writers)

    def cancel(self, sequence: LiveSequence) -> None:
        """Give up `sequence`, wherever it is; the next step frees its slot. Finished ones are left as they are."""
        sequence.is_cancelled = True

    def require_room(self, num_sequences: int) -> None:
        """Raise `OverloadedError` when so many more sequences cannot be taken now."""
        with self._lock:
            self._scheduler.require_room(num_sequences)

    # Load

    @property
    def capacity(self) -> int:
        """Sequences that can be here at once, running or waiting."""
        return self._scheduler.capacity

    @property
    def num_running(self) -> int:
        """Sequences with a slot of the KV cache."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._scheduler.waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._scheduler.running or self._scheduler.waiting)

    @property
    def cache_usage(self) -> float:
        """Fraction of the KV cache's positions that hold something, 0 to 1."""
        with self._lock:
            num_used = sum(sequence.num_cached for sequence in self._scheduler.running)
        return num_used / (self.config.max_num_seqs * self.max_length)

    # The work

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Read some prompts, decode one token for each running sequence, and report what came out."""
        cancelled = self._drop_cancelled()
        schedule = self._schedule()
        if not schedule.choosing and not schedule.chunks:
            return cancelled
        logits_V = self._forward(schedule)
        outputs = self._choose(schedule.choosing, logits_V)
        failed = [sequence for sequence in schedule.taking_part if sequence.error and sequence not in schedule.choosing]
        outputs += [_output(sequence, time.perf_counter()) for sequence in failed]
        self._drop([sequence for sequence in schedule.taking_part if sequence.finish_reason])
        return cancelled + outputs

    def run(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, Output]]:
        """Work until `requests` are done; yields (index of the request, output). Not while a thread drives the engine.

        There may be more requests than the queue holds. Those still open when the caller stops reading are cancelled.
        """
        sequences = [LiveSequence(request) for request in requests]
        index_of = {sequence.id: index for index, sequence in enumerate(sequences)}
        unsent = sequences[::-1]
        num_open = len(sequences)
        try:
            while num_open:
                self._submit_some(unsent)
                for output in self.step():
                    if output.sequence_id in index_of:
                        num_open -= output.finish_reason is not None
                        yield index_of[output.sequence_id], output
        finally:
            for sequence in sequences:
                self.cancel(sequence)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int | None = None,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """Answer `prompts`, several generated at once, in the order of the prompts; greedy by default."""
        requests = [
            self.request(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, ignore_eos=ignore_eos)
            for prompt in prompts
        ]
        outputs: list[list[Output]] = [[] for _ in requests]
        for index, output in self.run(requests):
            outputs[index].append(output)
        return [collect(outputs_of_one) for outputs_of_one in outputs]

    def warm_up(self) -> None:
        """Run the model once in each way, so that the first request does not pay for it and a broken model shows."""
        request = GenerationRequest(prompt=(0,), max_tokens=2, sampling=GREEDY, ignore_eos=True)
        collect([output for _, output in self.run([request])])

    def _new_writer(self, request: GenerationRequest) -> TextWriter:
        """Build a writer that has seen the last prompt token, if its text is whole, since a space may depend on it."""
        before = request.prompt[-1:]
        is_whole = not self.tokenizer.decode(before).endswith("\N{REPLACEMENT CHARACTER}")
        return TextWriter(StreamDecoder(self.tokenizer, before if is_whole else ()), request.stop)

    def _submit_some(self, unsent: list[LiveSequence]) -> None:
        """Move sequences from the end of `unsent` into the queue, as many as find room."""
        while unsent and self._scheduler.num_free:
            self.submit([unsent.pop()])

    def _schedule(self) -> Schedule:
        with self._lock:
            schedule = self._scheduler.plan()
        for chunk in schedule.chunks:
            if chunk.sequence.started_s is None:
                chunk.sequence.started_s = time.perf_counter()
        return schedule

    def _encode(self, text: str) -> Sequence[int]:
        beginning = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        return self.tokenizer.encode(text, add_special_tokens=True) or ([] if text else [beginning])

    def _forward(self, schedule: Schedule) -> dict[int, Tensor]:
        """Return logits (V,) by sequence id, for those of `schedule.choosing` that did not fail."""
        logits: dict[int, Tensor] = {}
        for chunk in schedule.chunks:
            logits |= self._guard((chunk.sequence,), partial(self._read, chunk))
        for slot, sequence in enumerate(schedule.decode):
            if sequence.num_cached == self.model.config.reread_length:
                self._guard((sequence,), partial(self._read_again, slot, sequence))
        if schedule.decode:
            logits |= self._guard(schedule.decode, partial(self._decode, schedule.decode))
        return logits

    def _guard(self, sequences: Sequence[LiveSequence], work: Callable[[], dict[int, Tensor]]) -> dict[int, Tensor]:
        """Return what `work` on `sequences` gives; where it raises, find out whose fault that is.

        The failing ones of several are found by working on each alone, which writes the same keys and values again.
        """
        try:
            return work()
        except Exception as error:  # whatever the model raises
            if len(sequences) > 1:
                parts = [self._guard((sequence,), partial(self._decode_one, sequence)) for sequence in sequences]
                return {key: logits_V for part in parts for key, logits_V in part.items()}
            self._require_working_model()
            logger.exception("one sequence failed and the others go on")
            self._fail(sequences[0], f"the model failed on this request ({type(error).__name__}: {error})")
            return {}

    def _require_working_model(self) -> None:
        """Raise what the model raises when it cannot even read one token."""
        self.model(torch.zeros(1, 1, dtype=torch.long, device=self._device))

    def _fail(self, sequence: LiveSequence, message: str) -> None:
        sequence.finish_reason = FinishReason.ERROR
        sequence.error = RequestError(
            f"{message}; change the prompt or the settings", status=500, code="sequence_failed"
        )

    def _read(self, chunk: Chunk) -> dict[int, Tensor]:
        """Put part of a prompt into the cache, score it where that was asked; the last token's logits if it is done."""
        request = chunk.sequence.request
        is_scored = request.prompt_logprobs is not None
        ids, num_tokens = request.prompt[chunk.start : chunk.stop], len(request.prompt)
        logits_1TV = self._read_part(ids, chunk.start, chunk.slot, num_tokens, last_only=not is_scored)
        if is_scored and (logits_1TV.isnan() | logits_1TV.isposinf()).any():
            self._fail(chunk.sequence, _NOT_FINITE)
            return {}
        if is_scored:
            following = request.prompt[chunk.start + 1 : chunk.stop + 1]
            scores = [
                score(logits_V, token, request.prompt_logprobs or 0)
                for logits_V, token in zip(logits_1TV[0], following, strict=False)
            ]
            chunk.sequence.prompt_scores += scores
        return {chunk.sequence.id: logits_1TV[0, -1]} if chunk.is_last else {}

    def _read_again(self, slot: int, sequence: LiveSequence) -> dict[int, Tensor]:
        """Fill the cache of a text that has grown to the length beyond which all its angles are others.

        It happens once in a text, and the others wait for it.
        """
        ids = (*sequence.request.prompt, *sequence.tokens[:-1])
        for start in range(0, len(ids), self.config.prefill_tokens):
            part = ids[start : start + self.config.prefill_tokens]
            self._read_part(part, start, slot, len(ids) + 1, last_only=True)
        return {}

    def _read_part(self, ids: Sequence[int], start: int, slot: int, num_tokens: int, *, last_only: bool) -> Tensor:
        """Put the tokens from `start` on of a text of `num_tokens` into the cache; their logits (1, T, V)."""
        tokens_1T = torch.tensor([ids], device=self._device)
        positions_1T = torch.arange(start, start + len(ids), device=self._device)[None]
        view = self._cache.view(slot, 1, self._round_up(start + len(ids)))
        scaling = self.model.config.rope_scaling
        lengths: dict[str, Tensor] = {}
        if scaling is not None and scaling.is_length_dependent:
            lengths["lengths_B1"] = torch.tensor([[num_tokens]], device=self._device)
        logits_1TV: Tensor = self.model(
            tokens_1T, positions_BT=positions_1T, cache=view, last_only=last_only, **lengths
        )
        return logits_1TV

    def _decode(self, sequences: Sequence[LiveSequence]) -> dict[int, Tensor]:
        """Put each sequence's newest token into the cache; logits (V,) after it by sequence id."""
        if self._recorded is None:
            return self._decode_slots(sequences, 0)
        rows = [(sequence.tokens[-1], sequence.num_cached) for sequence in sequences]
        rows += map(self._fill_row, range(len(rows), self._recorded.num_rows(len(rows))))
        length = max(position for _, position in rows) + 1
        logits_B1V = self._recorded(rows, self._round_up(length))
        return {sequence.id: logits_V for sequence, logits_V in zip(sequences, logits_B1V[:, -1], strict=False)}

    def _fill_row(self, slot: int) -> Row:
        """Return a token for a slot that is not decoded now, at a position that will be written before it is read."""
        running = self._scheduler.running
        return 0, min(running[slot].num_cached, self.max_length - 1) if slot < len(running) else 0

    def _decode_one(self, sequence: LiveSequence) -> dict[int, Tensor]:
        return self._decode_slots((sequence,), self._scheduler.running.index(sequence))

    def _decode_slots(self, sequences: Sequence[LiveSequence], first_slot: int) -> dict[int, Tensor]:
        tokens_B1 = torch.tensor([[sequence.tokens[-1]] for sequence in sequences], device=self._device)
        positions_B1 = torch.tensor([[sequence.num_cached] for sequence in sequences], device=self._device)
        length = max(sequence.num_cached for sequence in sequences) + 1
        logits_B1V = self._decode_rows(first_slot, tokens_B1, positions_B1, self._round_up(length))
        return {sequence.id: logits_V for sequence, logits_V in zip(sequences, logits_B1V[:, -1], strict=True)}

    def _decode_rows(self, first_slot: int, tokens_B1: Tensor, positions_B1: Tensor, length: int) -> Tensor:
        """Return logits (B, 1, V) after one token of each of the slots from `first_slot` on."""
        view = self._cache.view(first_slot, len(tokens_B1), length)
        logits_B1V: Tensor = self.model(tokens_B1, positions_BT=positions_B1, cache=view, last_only=True)
        return logits_B1V

    def _round_up(self, length: int) -> int:
        """Return a number of key positions that sums are made over in the same order whoever else is in the batch."""
        return min(-(-length // KEY_BLOCK) * KEY_BLOCK, self.max_length)

    def _choose(self, sequences: Sequence[LiveSequence], logits_V: Mapping[int, Tensor]) -> list[Output]:
        """Choose a token for each sequence that has logits, and report all of them."""
        chosen: dict[int, int] = {}
        choosing = [sequence for sequence in sequences if sequence.id in logits_V and sequence.request.max_tokens]
        if choosing:
            samplings = [sequence.request.sampling for sequence in choosing]
            uniforms = [sequence.random.random() for sequence in choosing]
            logits_BV = torch.stack([logits_V[sequence.id] for sequence in choosing])
            tokens = choose(logits_BV, samplings, uniforms)
            chosen = {sequence.id: token for sequence, token in zip(choosing, tokens, strict=True) if token is not None}
        return [self._continue(sequence, chosen.get(sequence.id), logits_V.get(sequence.id)) for sequence in sequences]

    def _continue(self, sequence: LiveSequence, token: int | None, logits_V: Tensor | None) -> Output:
        """Report one step of `sequence`: its token, its end, or what went wrong with it."""
        if sequence.error is None and logits_V is not None and sequence.request.max_tokens == 0:
            sequence.finish_reason = FinishReason.LENGTH
        elif sequence.error is None and (token is None or logits_V is None):
            self._fail(sequence, _NOT_FINITE)
        elif sequence.error is None and token is not None and logits_V is not None:
            logprobs = _logprobs(sequence.request.sampling, logits_V, token)
            try:
                return self._append(sequence, token, logprobs)
            except Exception as error:  # the library that decodes text raises plain Exception
                logger.exception("one sequence failed and the others go on")
                self._fail(sequence, f"the text of this request cannot be decoded ({error})")
        return _output(sequence, time.perf_counter(), prompt_tokens=self._prompt_tokens(sequence))

    def _append(self, sequence: LiveSequence, token: int, logprobs: Logprobs | None) -> Output:
        """Add a token to `sequence`, end it if this was its last, and report it."""
        request = sequence.request
        writer = self._writers[sequence.id]
        is_end = (token in self.tokenizer.end_ids and not request.ignore_eos) or token in request.stop_ids
        text, tokens = ("", ()) if is_end else writer.push(token, logprobs)
        sequence.tokens.append(token)
        if is_end or writer.is_stopped or len(sequence.tokens) == request.max_tokens:
            rest, rest_tokens = writer.finish()
            text, tokens = text + rest, tokens + rest_tokens
            sequence.finish_reason = FinishReason.STOP if is_end or writer.is_stopped else FinishReason.LENGTH
        now_s = time.perf_counter()
        token_s = now_s - (sequence.last_token_s or sequence.submitted_s)
        sequence.last_token_s = now_s
        prompt_tokens = self._prompt_tokens(sequence) if len(sequence.tokens) == 1 else ()
        return _output(sequence, now_s, text=text, tokens=tokens, prompt_tokens=prompt_tokens, token_s=token_s)

    def _prompt_tokens(self, sequence: LiveSequence) -> tuple[Token, ...]:
        """Return the scored prompt; `offset` counts from its start. Empty where no scores were asked for."""
        request = sequence.request
        if request.prompt_logprobs is None or sequence.error is not None:
            return ()
        decoder, offset, tokens = StreamDecoder(self.tokenizer), 0, []
        for token_id, logprobs in zip(request.prompt, sequence.prompt_scores, strict=True):
            tokens.append(Token(token_id, offset, logprobs))
            offset += len(decoder.push(token_id))
        return tuple(tokens)

    def _drop_cancelled(self) -> list[Output]:
        with self._lock:
            cancelled = self._scheduler.cancelled()
        for sequence in cancelled:
            sequence.finish_reason = FinishReason.CANCELLED
        self._drop(cancelled)
        return [_output(sequence, time.perf_counter()) for sequence in cancelled]

    def _drop(self, sequences: Iterable[LiveSequence]) -> None:
        """Forget sequences, and keep the slots of the others together."""
        for sequence in sequences:
            if sequence.error is not None:
                self._cache.clear_slot(self._scheduler.running.index(sequence))
            with self._lock:
                moves = self._scheduler.remove(sequence)
                del self._writers[sequence.id]
            for move in moves:
                self._cache.copy_slot(move.source, move.target)


def check_fit(model: Decoder, tokenizer: Tokenizer, config: EngineConfig) -> None:
    """Raise `ConfigError` when model, tokenizer and config contradict each other."""
    if config.max_length and config.max_length > model.config.max_length:
        raise ConfigError(
            f"max_length={config.max_length} and the model was made for {model.config.max_length} tokens; "
            f"choose at most that"
        )
    if tokenizer.num_learned > model.config.vocab_size:  # tokens added beyond the model's rows never come out of it
        raise ConfigError(
            f"the tokenizer has {tokenizer.num_learned} tokens and the model {model.config.vocab_size}; "
            f"use the tokenizer that the model was trained with"
        )


def _fitting_length(model: Decoder, num_slots: int, device: torch.device) -> int:
    """Return the length that the model was made for, or less where its cache would take over half of the free memory.

    Models of today are made for 131,072 tokens, for which eight sequences of a small one take more than 30 GB.
    """
    if device.type == "cpu":
        free_bytes = measure_free_bytes()
    elif device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0]
    else:
        return model.config.max_length
    position_bytes = max(1, model.new_cache(1, KEY_BLOCK).memory_bytes // KEY_BLOCK * num_slots)
    fitting = free_bytes // 2 // position_bytes // KEY_BLOCK * KEY_BLOCK
    return min(model.config.max_length, max(fitting, SHORTEST_CONTEXT))


def _new_cache(model: Decoder, num_slots: int, max_length: int) -> KVCache:
    try:
        return model.new_cache(num_slots, max_length)
    except RuntimeError as error:  # torch's out-of-memory errors have no narrower class in common
        raise ConfigError(
            f"a KV cache for max_num_seqs={num_slots} of max_length={max_length} tokens does not fit into memory "
            f"({error}); lower one of them"
        ) from error


def _logprobs(sampling: Sampling, logits_V: Tensor, token: int) -> Logprobs | None:
    return None if sampling.num_logprobs is None else score(logits_V, token, sampling.num_logprobs)


def _output(
    sequence: LiveSequence,
    now_s: float,
    *,
    text: str = "",
    tokens: tuple[Token, ...] = (),
    prompt_tokens: tuple[Token, ...] = (),
    token_s: float | None = None,
) -> Output:
    return Output(
        sequence_id=sequence.id,
        request=sequence.request,
        text=text,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        num_generated=len(sequence.tokens),
        finish_reason=sequence.finish_reason,
        error=sequence.error,
        is_first=token_s is not None and len(sequence.tokens) == 1,
        queued_s=(sequence.started_s or now_s) - sequence.submitted_s,
        elapsed_s=now_s - sequence.submitted_s,
        token_s=token_s,
    )
