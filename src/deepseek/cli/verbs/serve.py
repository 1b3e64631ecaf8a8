"""`deepseek serve` and `deepseek-serve`: a model behind the OpenAI API."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from deepseek.data.tokenizing import Tokenizer
    from deepseek.models.decoder.model import Decoder

API_KEY_VARIABLE = "DEEPSEEK_API_KEY"


def serve(
    model: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str = "deepseek",
    quantize: Literal["int8"] | None = None,
    max_num_seqs: int = 8,
    max_length: int | None = None,
    max_queue: int = 128,
    shutdown_timeout_s: float = 30.0,
    allowed_origins: list[str] | None = None,
    json: bool = False,
) -> None:
    """Serve MODEL over HTTP until Ctrl-C or SIGTERM.

    The API is OpenAI's, at /v1/completions and /v1/chat/completions; /healthz, /readyz and /metrics are for operators.
    With DEEPSEEK_API_KEY in the environment, /v1 asks for it as a bearer token.

    Example: deepseek serve runs/quickstart/model-int8 --port 8080

    Parameters
    ----------
    model
        Folder of an artifact, a Hugging Face model, or an adapter, which is put on its base.
    host
        Address to listen on; 0.0.0.0 is every address of the machine.
    port
        Port to listen on; 0 takes a free one.
    model_name
        Name that clients ask for.
    quantize
        `int8` makes the model int8 in memory first.
    max_num_seqs
        Sequences that are generated at once.
    max_length
        Longest prompt and answer together, in tokens; left out, the model's own limit or what half of the free memory
        holds.
    max_queue
        Sequences that may wait for a slot; more are refused.
    shutdown_timeout_s
        How long open requests may go on after a stop signal.
    allowed_origins
        Web pages that may ask this server from a browser, such as https://chat.example.org; may be given several
        times, and '*' is every page. Without it, pages on this machine.
    json
        Print events as JSON lines.
    """
    from deepseek.artifact.reading import find_model_folder
    from deepseek.cli.screen.events import printing_beside
    from deepseek.data.tokenizing import load_tokenizer
    from deepseek.models.adapters import find_tokenizer_folder
    from deepseek.models.loading import load_decoder, make_int8_
    from deepseek.nn.packed import pack_
    from deepseek.serve.config import ServeConfig
    from deepseek.serve.server import serve_loading

    config = ServeConfig(
        host=host,
        port=port,
        model_name=model_name,
        max_num_seqs=max_num_seqs,
        max_length=max_length,
        max_queue=max_queue,
        shutdown_timeout_s=shutdown_timeout_s,
    )
    if allowed_origins is not None:
        config = config.override({"allowed_origins": tuple(allowed_origins)})
    model = find_model_folder(model)

    def load() -> tuple[Decoder, Tokenizer]:
        decoder = load_decoder(model)
        return pack_(make_int8_(decoder) if quantize == "int8" else decoder), load_tokenizer(
            find_tokenizer_folder(model)
        )

    api_key = os.environ.get(API_KEY_VARIABLE)
    with printing_beside(as_json=json) as show:
        serve_loading(load, config, api_key=api_key, listen=show)
