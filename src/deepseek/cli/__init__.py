"""The command `deepseek`: one verb per file, each loaded when it is called.

    deepseek quickstart                 the main job, end to end
    deepseek train RECIPE ...           ->  an artifact
    deepseek quantize MODEL OUT         ->  a smaller artifact
    deepseek generate MODEL PROMPT      ->  text
    deepseek serve MODEL                ->  an HTTP server (also as `deepseek-serve`)
    deepseek info PATH                  ->  what a folder holds

Listing the verbs imports none of them, and none imports torch before it has read its arguments. Exit status: 0 done,
1 failed, 2 wrong usage, 130 stopped with Ctrl-C (143 with SIGTERM).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

import deepseek
from deepseek.core.errors import ConfigError, DeepSeekError

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

# Verb -> what it does, in one line; the verb's function has its file's name.
VERBS = {
    "quickstart": "Train, quantize and serve a small language model on this machine, in minutes.",
    "train": "Train a model from a recipe or a config file.",
    "quantize": "Make an int8 version of a model, and say what it costs.",
    "generate": "Continue a text with a model.",
    "serve": "Serve a model over HTTP, with the OpenAI API.",
    "info": "Say what a model folder holds, and verify it.",
}


def build_app() -> App:
    """The command with all its verbs, none of them loaded."""
    app = App(
        name="deepseek",
        help="One framework that takes a model from training, through compression, to serving.",
        version=deepseek.__version__,
    )
    for verb, purpose in VERBS.items():
        app.command(f"deepseek.cli.{verb}:{verb}", name=verb, help=purpose)
    app.register_install_completion_command()
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(build_app(), list(sys.argv[1:] if arguments is None else arguments)))


def serve_main() -> None:
    """The command `deepseek-serve`."""
    main(["serve", *sys.argv[1:]])


def run(app: App, arguments: list[str]) -> int:
    """Run one verb; errors come out as one sentence on standard error and a status."""
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _fail(str(error), WRONG_USAGE)
    except ConfigError as error:
        return _fail(str(error), WRONG_USAGE)
    except DeepSeekError as error:
        return _fail(str(error), FAILED)
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on where it was", INTERRUPTED)
    return DONE


def _fail(message: str, status: int) -> int:
    print(f"deepseek: {message}", file=sys.stderr)
    return status
