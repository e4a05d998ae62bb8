"""The console command `diffusionblocks`: a module a verb, imported when the verb is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from .._version import __version__

#: Verb -> its line in `--help`. The module of that name has `run(args)`.
VERBS = {
    "convert": "cut a plain model, or a config, into blocks and save it",
    "train": "train by one of the recipes, in blocks or streamed, through accelerate",
    "generate": "make images or text with a saved model",
    "merge": "join the saved models of jobs that trained different blocks",
    "estimate": "print what training would hold in memory, by ways to train and parts",
    "inspect": "print what a saved model's blocks hold, without loading its weights",
    "card": "write a saved model's card (README.md) again",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run one verb.

    Args:
        args: the command line; None is `sys.argv[1:]`.

    Exits with one line on standard error: status 2 if the command line is wrong, 1 if what it names is.
    """
    args = list(sys.argv[1:] if args is None else args)
    verb = args[0] if args else None
    if verb in ("-h", "--help"):
        print(_help())
    elif verb == "--version":
        print(f"diffusionblocks {__version__}")
    elif verb not in VERBS:
        what = "a verb is missing" if verb is None else f"{verb!r} is not a verb"
        _fail(2, f"diffusionblocks: error: {what}; verbs are {', '.join(VERBS)}")
    else:
        _run(verb, args[1:])


def _run(verb: str, args: list[str]) -> None:
    try:
        import_module(f".{verb}", __name__).run(args)
    except Exception as error:
        if not isinstance(error, _bad_input()):
            raise
        _fail(1, f"diffusionblocks {verb}: error: {' '.join(str(error).split())}")


def _fail(status: int, line: str) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(status)


def _bad_input() -> tuple[type[Exception], ...]:
    """What the libraries below raise on bad input, and missing packages; anything else is a bug and keeps its traceback."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from ..extras import MissingExtraError

    return MissingExtraError, OSError, TypeError, ValueError, SafetensorError, StrictDataclassError


def _help() -> str:
    verbs = "\n".join(f"  {verb:9} {line}" for verb, line in VERBS.items())
    return (
        "usage: diffusionblocks VERB ... | --help | --version\n\n"
        "Train Hugging Face transformers that do not fit in memory, by streamed layers, or block by block\n"
        "(DiffusionBlocks, arXiv 2506.14202).\n\n"
        f"verbs:\n{verbs}\n\n"
        "`diffusionblocks VERB --help` lists a verb's options. `--config FILE.yaml` gives them from a file, and the\n"
        "command line overrides it."
    )
