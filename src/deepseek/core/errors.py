"""Every exception that deepseek raises on purpose, drawn once.

    DeepSeekError
    |-- PermanentError            trying again gives the same answer
    |   |-- ConfigError           a setting is unknown, malformed or contradicts another (also a ValueError)
    |   |   `-- InfeasibleError   every setting is fine, and nothing meets them all together
    |   |-- DataError             a corpus, a tokenizer or a data cache cannot be used
    |   |-- ArtifactError         a model folder cannot be used
    |   |   |-- CorruptArtifactError      its bytes are not the bytes that were written
    |   |   |-- UnsafeFileError           it would have to be unpickled
    |   |   `-- UnsupportedSchemaError    a newer deepseek wrote it
    |   |-- CheckpointError       no checkpoint here can be resumed from
    |   |-- TrainingError         the loss or a gradient stopped being a number
    |   |-- CollectiveMismatchError       ranks called different collectives
    |   |-- RequestError          a request to a server cannot be served (carries status, param and code)
    |   `-- MissingExtraError     an optional library is not installed (also an ImportError)
    `-- TemporaryError            the same call may succeed later
        |-- CommunicationError    a rank is late or gone, and the others cannot go on
        |-- StorageError          a disk is full, read-only or not ours (also an OSError)
        |-- AddressInUseError     another process listens on the port (also an OSError)
        `-- OverloadedError       the server's queue is full

The two halves answer one question for a caller: may this be retried? A message is one sentence that says
what was seen, what was expected, and what to do next.
"""

from __future__ import annotations


class DeepSeekError(Exception):
    """Root of all errors raised on purpose; catching it never hides a bug in deepseek."""


class PermanentError(DeepSeekError):
    """Trying again gives the same answer: a user error, a damaged file, a missing library."""


class TemporaryError(DeepSeekError):
    """The same call may succeed later: storage, ports, load."""


class ConfigError(PermanentError, ValueError):
    """A setting is unknown, malformed or contradicts another one."""


class InfeasibleError(ConfigError):
    """Every setting is fine, and nothing meets them all together: a limit is too tight, or a cluster too small."""


class DataError(PermanentError):
    """A corpus, a tokenizer or a data cache cannot be used."""


class ArtifactError(PermanentError):
    """A model folder cannot be used."""


class CorruptArtifactError(ArtifactError):
    """The bytes on disk are not the bytes that were written."""


class UnsafeFileError(ArtifactError):
    """The file would have to be unpickled, which runs code chosen by whoever wrote it."""


class UnsupportedSchemaError(ArtifactError):
    """The folder was written by a newer deepseek than this one."""


class CheckpointError(PermanentError):
    """No checkpoint in the folder can be resumed from, or it belongs to another run."""


class CollectiveMismatchError(PermanentError):
    """Ranks of one group called different collectives, or one with different shapes, dtypes or order."""


class TrainingError(PermanentError):
    """The loss or a gradient stopped being a finite number."""


def first_line(error: BaseException) -> str:
    """Say what went wrong in one line: the type and the beginning of the message of a library's error.

    >>> first_line(ValueError("no such file\\nat line 3"))
    'ValueError: no such file'
    """
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


class RequestError(PermanentError):
    """A request to a server cannot be served; `status`, `param` and `code` go into the HTTP answer."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class MissingExtraError(PermanentError, ImportError):
    """An optional library is needed here and is not installed."""


class CommunicationError(TemporaryError):
    """A rank is late, gone, or failed, and the others cannot go on; starting all of them again may succeed."""


class StorageError(TemporaryError, OSError):
    """A disk is full, read-only, or does not belong to this user."""

    def __str__(self) -> str:
        """The sentence alone; the number is in `errno`."""
        return self.strerror or super().__str__()


class AddressInUseError(TemporaryError, OSError):
    """Another process already listens on the requested port."""


class OverloadedError(TemporaryError):
    """The server's queue is full; the request was not started."""
