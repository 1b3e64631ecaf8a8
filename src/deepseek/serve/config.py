"""Settings of the engine and of the server around it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deepseek.core.config import Config


class EngineConfig(Config):
    """How much the engine works on at once."""

    max_num_seqs: int = Field(default=8, ge=1)
    """Sequences that are generated at once; each holds `max_length` positions of the KV cache."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest prompt and answer together, in tokens; none is what the model was made for, or what half of the free
    memory holds."""
    max_queue: int = Field(default=128, ge=0)
    """Sequences that may wait for a free slot; more are refused with status 503."""
    prefill_tokens: int = Field(default=256, ge=1)
    """Prompt tokens read between two decoding steps; fewer keep the streams even, more read long prompts faster."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Whether decoding steps are recorded as CUDA graphs: `auto` where the model is on a CUDA device."""


class ServeConfig(EngineConfig):
    """The HTTP server. A key is no setting, since settings are printed and recorded; `serve` takes it by itself."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on; 0.0.0.0 is every IPv4 address of the machine."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port to listen on; 0 takes a free one."""
    model_name: str = Field(default="deepseek", min_length=1)
    """Name that requests give as `model`, and that `/v1/models` lists."""
    max_body_bytes: int = Field(default=4 << 20, ge=1)
    """Longest request body; longer ones are refused with status 413."""
    body_timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """How long a request body may take to arrive; a slower one is refused with status 408."""
    shutdown_timeout_s: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """How long requests may go on after SIGTERM or Ctrl-C; then they are ended with an error."""
    stall_timeout_s: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """`/healthz` fails when the engine has not finished a step for so long."""
    allowed_origins: tuple[str, ...] = ("http://localhost:*", "http://127.0.0.1:*")
    """Web pages whose scripts may ask this server, by origin; `*` stands for anything, and alone for every page."""
    retry_after_s: int = Field(default=1, ge=0)
    """How long a refused client is asked to wait, as `Retry-After`."""
