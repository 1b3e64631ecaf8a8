"""The command `deepseek`: one verb per file, each loaded when it is called.

    deepseek quickstart                 the main job, end to end
    deepseek plan MODEL --cluster ...   ->  a parallel plan, its time and memory
    deepseek train RECIPE ...           ->  an artifact
    deepseek launch --ranks N train ... ->  the same from several processes, under a plan
    deepseek quantize MODEL OUT         ->  a smaller artifact
    deepseek convert MODEL OUT          ->  an artifact of a Hugging Face folder, or in another precision
    deepseek merge-adapter ADAPTER OUT  ->  an artifact of an adapter and its base
    deepseek generate MODEL PROMPT      ->  text
    deepseek evaluate MODEL --data D    ->  its metrics, with intervals
    deepseek predict MODEL INPUT...     ->  classes, boxes or vectors of images and texts
    deepseek serve MODEL                ->  an HTTP server (also as `deepseek-serve`)
    deepseek info PATH                  ->  what a folder holds
    deepseek advise ...                 ->  a generation, and why
    deepseek migrate PATH               ->  what an upgrade breaks (also as `deepseek-migrate --check PATH`)
    deepseek check-compatibility        ->  what this machine can run (also as `deepseek-cli check-compatibility`)
    deepseek benchmark MODEL            ->  latency, memory and accuracy, side by side (also as `deepseek-benchmark`)
    deepseek explain MODEL              ->  how it was decided to run, and why
    deepseek doctor                     ->  settings that pay on this machine

Listing the verbs imports none of them, and none imports torch before it has read its arguments. Exit status: 0 done,
1 failed, 2 wrong usage, 130 stopped with Ctrl-C (143 with SIGTERM, 129 with SIGHUP), 141 the reader of a pipe left. An
error is one line on standard error.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError, UnusedCliTokensError

import deepseek
from deepseek.core.errors import ConfigError, DeepSeekError, InfeasibleError
from deepseek.core.openmp import yield_cores

DONE, FAILED, WRONG_USAGE = 0, 1, 2

# Verb -> what it does, in one line; the verb's function and file have its name, with _ for -.
VERBS = {
    "quickstart": "Train, quantize and serve a small language model on this machine, in minutes.",
    "plan": "Find the fastest parallel plan for a model on a cluster, with its time and memory.",
    "train": "Train a model from a recipe or a config file.",
    "launch": "Start the ranks of a training run on this machine, and end them together.",
    "verify": "Hold parallel plans of a run against one process: every gradient, every weight.",
    "quantize": "Make an int8 version of a model, and say what it costs.",
    "convert": "Make an artifact of a Hugging Face folder, or of an artifact in another precision.",
    "merge-adapter": "Make one model of an adapter and the model it was trained on.",
    "generate": "Continue a text with a model.",
    "evaluate": "Measure a model on data: loss, perplexity, accuracy, F1 or mAP, with intervals.",
    "predict": "Say what a model finds in images or texts: classes, boxes, vectors.",
    "serve": "Serve a model over HTTP, with the OpenAI API.",
    "info": "Say what a model folder holds, and verify it.",
    "advise": "Recommend a generation for a model and the place it runs in.",
    "migrate": "Find what an upgrade breaks in configs, code and checkpoints, and write a migrated copy.",
    "check-compatibility": "Say what this machine can run, with the next step for what it cannot.",
    "benchmark": "Compare a model as several generations, or backends and precisions, side by side.",
    "explain": "Say how a model was decided to run here: what was measured, what was refused, and why.",
    "doctor": "Measure settings of the environment that may pay on this machine.",
}

_EPILOGUE = (
    "Beside other programs the threads of every command sleep instead of spinning while they wait, unless "
    "GOMP_SPINCOUNT or OMP_WAIT_POLICY are set. `deepseek doctor` measures what that brings here."
)
# Verbs with subcommands: `build_app` in the verb's file adds them.
GROUPS = frozenset({"plan"})


class Stopped(KeyboardInterrupt):
    """A signal ended work that a later call goes on with."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__("stopped; the same command goes on where it was")
        self.number = number


def build_app(asked: str | None = None) -> App:
    """The command with all its verbs, none of them loaded; the verb that is `asked` for explains itself in full."""
    app = App(
        name="deepseek",
        help="One framework that takes a model from training, through compression, to serving.",
        help_epilogue=_EPILOGUE,
        version=deepseek.__version__,
        default_parameter=Parameter(negative_iterable=()),  # no `--empty-set` beside `--set`
        suppress_keyboard_interrupt=False,
    )
    for verb, purpose in VERBS.items():
        # One line of help is there without loading the verb; without it, the help is the docstring of its function.
        name = verb.replace("-", "_")
        if verb == asked and verb in GROUPS:
            app.command(importlib.import_module(f"deepseek.cli.verbs.{name}").build_app())
        else:
            app.command(f"deepseek.cli.verbs.{name}:{name}", name=verb, help=None if verb == asked else purpose)
    app.register_install_completion_command()
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    words = prepare(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(build_app(asked=words[0] if words else None), words))


def prepare(arguments: Sequence[str]) -> list[str]:
    """Set up this process as one that runs a verb, and return the arguments as `run` takes them."""
    yield_cores()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no such character shows "?"
    warnings.formatwarning = lambda message, *_, **__: f"deepseek: warning: {_one_line(str(message))}\n"
    return _set_apart(_as_options(list(arguments)))


def _as_options(words: list[str]) -> list[str]:
    """`help`, `help VERB` and `version` as the options that they are in other programs' words.

    >>> _as_options(["help", "train"]), _as_options(["version"]), _as_options(["train", "help"])
    (['train', '--help'], ['--version'], ['train', 'help'])
    """
    match words:
        case ["help", *rest]:
            return [*rest, "--help"]
        case ["version"]:
            return ["--version"]
    return words


def _set_apart(words: list[str]) -> list[str]:
    """Mark the command that `launch` runs as one, so that its options are not read as those of `launch`.

    >>> _set_apart(["launch", "--ranks", "2", "train", "decoder_tiny", "--plan", "dp=2"])
    ['launch', '--ranks', '2', '--', 'train', 'decoder_tiny', '--plan', 'dp=2']
    """
    if words[:1] != ["launch"] or "--" in words:
        return words
    begin = next((index for index, word in enumerate(words) if index and word in VERBS), len(words))
    return words if begin == len(words) else [*words[:begin], "--", *words[begin:]]


def serve_main() -> None:
    """The command `deepseek-serve`."""
    main(["serve", *sys.argv[1:]])


def migrate_main() -> None:
    """The command `deepseek-migrate`."""
    main(["migrate", *sys.argv[1:]])


def benchmark_main() -> None:
    """The commands `deepseek-benchmark` and `ds-benchmark`."""
    main(["benchmark", *sys.argv[1:]])


def print_error(error: BaseException) -> None:
    """Say in one sentence on standard error what ended a verb."""
    print(f"deepseek: {_one_line(explain(error))}", file=sys.stderr)


def run(app: App, arguments: list[str], say: Callable[[BaseException], None] = print_error) -> int:
    """Run one verb; errors come out as one sentence, which `say` says, and a status.

    A verb that returns a number has chosen its status itself.
    """
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except (CycloptsError, DeepSeekError, OSError, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):  # as in `deepseek ... | head`: a filter says nothing about that
            abandon_output()
            return 128 + signal.SIGPIPE
        say(error)
        return _status_of(error)
    return status if isinstance(status, int) else DONE


def _status_of(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)
    if isinstance(error, InfeasibleError):  # the command was right, and the answer is no
        return FAILED
    return WRONG_USAGE if isinstance(error, CycloptsError | ConfigError) else FAILED


def explain(error: BaseException) -> str:
    """Say what ended a verb, and what to do next."""
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return (
            f"{' '.join(error.unused_tokens)!r} is not expected here; options are written --name value, text with "
            "spaces is quoted, and --help lists what there is"
        )
    if isinstance(error, UnknownOptionError) and error.command_chain and error.command_chain[0] == "train":
        from deepseek.cli.run_options import explain_option

        return explain_option(error.token.keyword or str(error.token.value))
    if isinstance(error, CycloptsError | DeepSeekError | Stopped):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    # What no room explains better: a file that this user may not read, for example.
    assert isinstance(error, OSError)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; check the path, its permissions and the disk"


def _one_line(message: str) -> str:
    """`message` without the line ends that libraries put into theirs."""
    return " ".join(message.split())


def abandon_output() -> None:
    """Let what is still to be written go nowhere, so that Python does not fail on it again while it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
