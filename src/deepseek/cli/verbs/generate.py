"""`deepseek generate`: continue a text, shown as it is written."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

DEFAULT_TOKENS = 64


def generate(
    model: Path,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    *,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: list[str] | None = None,
    json: bool = False,
) -> None:
    """Continue PROMPT with MODEL.

    Example: deepseek generate runs/quickstart/model-int8 "def " --max-tokens 40

    Or from a pipe: cat start.py | deepseek generate runs/quickstart/model-int8

    Parameters
    ----------
    model
        Folder of an artifact, a Hugging Face model, or an adapter, which is put on its base.
    prompt
        Text to continue; left out or `-`, standard input is read to its end.
    max_tokens
        Tokens to write at most; left out, 64 or what fits behind the prompt.
    temperature
        0 always takes the likeliest token; 1 samples from the model's own distribution.
    top_p
        Share of probability that sampling chooses from.
    seed
        Makes sampling repeatable.
    stop
        Text that ends the answer; may be given several times.
    json
        Print one JSON object at the end instead of the text as it comes.
    """
    from deepseek.artifact.reading import find_model_folder
    from deepseek.core.errors import ConfigError
    from deepseek.data.tokenizing import load_tokenizer
    from deepseek.models.adapters import find_tokenizer_folder
    from deepseek.models.loading import load_decoder
    from deepseek.serve.config import EngineConfig
    from deepseek.serve.engine import Engine
    from deepseek.serve.sequences import Sampling, collect

    if prompt is None and sys.stdin.isatty():
        raise ConfigError("there is no prompt and nothing comes through a pipe; give the text to continue")
    if prompt in (None, "-"):
        prompt = sys.stdin.read()
    model = find_model_folder(model)
    engine = Engine(
        load_decoder(model, packed=True), load_tokenizer(find_tokenizer_folder(model)), EngineConfig(max_num_seqs=1)
    )
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    request = engine.request(prompt, max_tokens=max_tokens, sampling=sampling, stop=tuple(stop or ()))
    if max_tokens is None:
        request = replace(request, max_tokens=min(request.max_tokens, DEFAULT_TOKENS))
    outputs = []
    if not json:
        sys.stdout.write(prompt)
    for _, output in engine.run([request]):
        if output.error is not None:
            raise output.error
        outputs.append(output)
        if not json:
            sys.stdout.write(output.text)
            sys.stdout.flush()
    if not json:
        sys.stdout.write("\n")
        return
    from json import dumps

    generation = collect(outputs)
    sys.stdout.write(
        dumps({"prompt": prompt} | {k: v for k, v in asdict(generation).items() if "tokens" not in k or "num" in k})
        + "\n"
    )
