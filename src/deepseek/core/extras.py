"""Optional libraries, each behind one sentence.

Rooms that need a library which a plain install does not bring call `require` where they use it, never at import:

    pyarrow = require("pyarrow.parquet", extra="data")

so that `import deepseek` stays cheap and a missing library is an instruction instead of a traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from deepseek.core.errors import MissingExtraError

DISTRIBUTION = "deepseek-engine"


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises `MissingExtraError` when the library itself is absent; an error inside the library is passed on as it is.

    >>> require("json", extra="data").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        raise MissingExtraError(
            f"{library} is needed here and is not installed: pip install '{DISTRIBUTION}[{extra}]'"
        ) from error


def has_library(module: str) -> bool:
    """Whether `module` could be imported, without importing it.

    >>> has_library("json"), has_library("no_such_library")
    (True, False)
    """
    return importlib.util.find_spec(module.partition(".")[0]) is not None
