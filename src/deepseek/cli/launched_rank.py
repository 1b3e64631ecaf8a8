"""A rank that `deepseek launch` has started: `python -m deepseek.cli.launched_rank train ...`.

It is the command `deepseek`, except that what ends it goes to the launcher, which says it once for all ranks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from deepseek.cli import FAILED, build_app, explain, prepare, run
from deepseek.core.errors import CommunicationError, DeepSeekError, PermanentError

_LOOK_S = 1.0


def main() -> None:
    """Run one verb and exit with its status."""
    words = prepare(sys.argv[1:])
    _end_with(os.getppid())
    try:
        status = run(build_app(asked=words[0] if words else None), words, say=_record)
    except Exception as error:  # noqa: BLE001 - the launcher shows its traceback
        _write(error)
        status = FAILED
    sys.exit(status)


def _record(error: BaseException) -> None:
    """Tell the launcher what ended this rank; whoever stopped all of them knows it."""
    if isinstance(error, KeyboardInterrupt):
        return
    kind = CommunicationError if isinstance(error, CommunicationError) else PermanentError
    sentence: DeepSeekError = kind(explain(error))
    _write(sentence)


def _write(error: BaseException) -> None:
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


def _end_with(parent: int) -> None:
    """Stop as after SIGTERM when the launcher is gone: nobody would end this rank with the others any more."""

    def look() -> None:
        pause = threading.Event()
        while os.getppid() == parent:
            pause.wait(_LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, name="deepseek-launcher-watch", daemon=True).start()


if __name__ == "__main__":
    main()
