"""The engine: several requests generated at once by one model with a KV cache, one `step` at a time.

    submit(sequences) -> [step() -> outputs] until nothing has work

`step` is the whole story: drop what was cancelled, let the scheduler decide, run the model, choose tokens, report.
Policy is in `scheduling.py`, text in `detokenizing.py`, chance in `sampling.py`; here they meet the tensors. `submit`
and `cancel` may be called from any thread, `step` from one. For a script, `generate` and `run` drive the steps; for a
server, `engine_thread.py` does so in a thread.

Memory: max_num_seqs * max_length positions of KV cache, taken at once, so that nothing can run out of it later.
Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from deepseek.core.errors import ConfigError, RequestError
from deepseek.data.tokenizing import StreamDecoder, Tokenizer
from deepseek.models.decoder.model import Decoder
from deepseek.nn.kv_cache import KVCache
from deepseek.serve.config import EngineConfig
from deepseek.serve.detokenizing import TextWriter
from deepseek.serve.sampling import choose, score
from deepseek.serve.scheduling import Chunk, Plan, Scheduler
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

GREEDY = Sampling(temperature=0)


class Engine:
    """A model, its KV cache and the sequences in it. The model is put into evaluation mode.

    Raises `ConfigError` when `config.max_length` is longer, or the tokenizer's vocabulary larger, than the model's, and
    when the cache does not fit into memory.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, config: EngineConfig | None = None) -> None:
        config = config or EngineConfig()
        check_fit(model, tokenizer, config)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config = config
        self.max_length = config.max_length or model.config.max_length
        self._device = next(chain(model.parameters(), model.buffers())).device
        self._cache = _new_cache(model, config.max_num_seqs, self.max_length)
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
        choice: int = 0,
    ) -> GenerationRequest:
        """Build a request for `prompt`, checked against the context length; no `max_tokens` is as many as fit.

        Text is encoded with the special tokens that the tokenizer's own rules add; token ids are taken as they are.
        Raises `RequestError` for an empty prompt, one that does not fit, and token ids outside the vocabulary.
        """
        ids = tuple(self.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt)
        vocab_size = self.model.config.vocab_size
        if not all(0 <= id_ < vocab_size for id_ in ids):
            raise RequestError(f"the prompt holds token ids outside 0 to {vocab_size - 1}", param="prompt")
        room = fit(len(ids), max_tokens, self.max_length)
        return GenerationRequest(ids, room, sampling, tuple(stop), ignore_eos, choice)

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
        plan = self._plan()
        if not plan.choosing and not plan.chunks:
            return cancelled
        logits_BV = self._forward(plan)
        outputs = self._choose(plan.choosing, logits_BV)
        self._drop([sequence for sequence in plan.choosing if sequence.finish_reason])
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
        for _ in self.run([GenerationRequest(prompt=(0,), max_tokens=2, sampling=GREEDY, ignore_eos=True)]):
            pass

    def _new_writer(self, request: GenerationRequest) -> TextWriter:
        """Build a writer that has seen the last prompt token, if its text is whole, since a space may depend on it."""
        before = request.prompt[-1:]
        is_whole = not self.tokenizer.decode(before).endswith("\N{REPLACEMENT CHARACTER}")
        return TextWriter(StreamDecoder(self.tokenizer, before if is_whole else ()), request.stop)

    def _submit_some(self, unsent: list[LiveSequence]) -> None:
        """Move sequences from the end of `unsent` into the queue, as many as find room."""
        while unsent and self._scheduler.num_free:
            self.submit([unsent.pop()])

    def _plan(self) -> Plan:
        with self._lock:
            plan = self._scheduler.plan()
        for chunk in plan.chunks:
            if chunk.sequence.started_s is None:
                chunk.sequence.started_s = time.perf_counter()
        return plan

    def _forward(self, plan: Plan) -> Tensor:
        """Return logits (B, V) for `plan.choosing`, in that order."""
        rows = [(chunk, self._read(chunk)) for chunk in plan.chunks]
        logits = [logits_1V for chunk, logits_1V in rows if chunk.is_last]
        if plan.decode:
            logits.append(self._decode(plan.decode))
        return torch.cat(logits) if logits else torch.empty(0, self.model.config.vocab_size)

    def _read(self, chunk: Chunk) -> Tensor:
        """Put a part of a prompt into the cache; logits (1, V) after its last token."""
        tokens_1T = torch.tensor([chunk.sequence.request.prompt[chunk.start : chunk.stop]], device=self._device)
        positions_1T = torch.arange(chunk.start, chunk.stop, device=self._device)[None]
        view = self._cache.view(chunk.slot, 1, chunk.stop)
        logits_11V: Tensor = self.model(tokens_1T, positions_BT=positions_1T, cache=view, last_only=True)
        return logits_11V[:, -1]

    def _decode(self, sequences: Sequence[LiveSequence]) -> Tensor:
        """Put each sequence's newest token into the cache; logits (B, V) after it."""
        tokens_B1 = torch.tensor([[sequence.tokens[-1]] for sequence in sequences], device=self._device)
        positions_B1 = torch.tensor([[sequence.num_cached] for sequence in sequences], device=self._device)
        length = max(sequence.num_cached for sequence in sequences) + 1
        view = self._cache.view(0, len(sequences), length)
        logits_B1V: Tensor = self.model(tokens_B1, positions_BT=positions_B1, cache=view, last_only=True)
        return logits_B1V[:, -1]

    def _choose(self, sequences: Sequence[LiveSequence], logits_BV: Tensor) -> list[Output]:
        if not sequences:
            return []
        samplings = [sequence.request.sampling for sequence in sequences]
        uniforms = [sequence.random.random() for sequence in sequences]
        tokens = choose(logits_BV, samplings, uniforms)
        return [
            self._append(sequence, token, _logprobs(sampling, logits_V, token))
            for sequence, sampling, token, logits_V in zip(sequences, samplings, tokens, logits_BV, strict=True)
        ]

    def _append(self, sequence: LiveSequence, token: int, logprobs: Logprobs | None) -> Output:
        """Add a token to `sequence`, end it if this was its last, and report it."""
        sequence.tokens.append(token)
        writer = self._writers[sequence.id]
        is_eos = token == self.tokenizer.eos_id and not sequence.request.ignore_eos
        text, tokens = ("", ()) if is_eos else writer.push(token, logprobs)
        if is_eos or writer.is_stopped or len(sequence.tokens) == sequence.request.max_tokens:
            rest, rest_tokens = writer.finish()
            text, tokens = text + rest, tokens + rest_tokens
            sequence.finish_reason = FinishReason.STOP if is_eos or writer.is_stopped else FinishReason.LENGTH
        now_s = time.perf_counter()
        token_s = now_s - (sequence.last_token_s or sequence.submitted_s)
        sequence.last_token_s = now_s
        return _output(sequence, now_s, text=text, tokens=tokens, token_s=token_s)

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
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}; "
            f"use the tokenizer that the model was trained with"
        )


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
    token_s: float | None = None,
) -> Output:
    return Output(
        sequence_id=sequence.id,
        request=sequence.request,
        text=text,
        tokens=tokens,
        num_generated=len(sequence.tokens),
        finish_reason=sequence.finish_reason,
        is_first=token_s is not None and len(sequence.tokens) == 1,
        queued_s=(sequence.started_s or now_s) - sequence.submitted_s,
        elapsed_s=now_s - sequence.submitted_s,
        token_s=token_s,
    )
