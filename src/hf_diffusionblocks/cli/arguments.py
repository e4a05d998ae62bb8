"""Options from a YAML file and the command line, shared by the command and the recipes; and what a verb takes without a name
(SOURCE, OUT_DIR)."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..configuration import CHOICES, USER_FIELDS


def _option(field: dataclasses.Field) -> tuple[str, Any, dataclasses.Field]:
    metadata = {"help": field.metadata["help"]}
    if field.name in CHOICES:
        metadata["choices"] = list(CHOICES[field.name])
    # None: not given, and left to the formulation.
    kind = field.type if field.type.endswith("| None") else f"{field.type} | None"
    metadata["help"] += "" if field.default is None else f" Not given: {field.default!r}."
    return field.name, kind, dataclasses.field(default=None, metadata=metadata)


#: The fields of DiffusionBlocksConfig as command-line options, with their help.
BlocksArguments = dataclasses.make_dataclass(
    "BlocksArguments",
    [_option(field) for field in USER_FIELDS.values()],
    namespace={"__module__": __name__},
)


def config_fields(arguments: BlocksArguments) -> dict[str, Any]:
    """Those that are given, for `convert`."""
    return {name: value for name, value in dataclasses.asdict(arguments).items() if value is not None}


class Parser(HfArgumentParser):
    """Errors are one line: with a hundred options, the usage that argparse prints before them hides them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(
    dataclass_types: Sequence[type],
    args: Sequence[str] | None = None,
    operands: Mapping[str, str] = {},
    **parser_kwargs,
) -> tuple:
    """Fill dataclasses from `--config FILE.yaml` and from options, which win.

    Args:
        dataclass_types: one instance of each is returned, in this order; then the operands.
        args: the command line; None is `sys.argv[1:]`.
        operands: what has no option's name: name -> help. A name that ends in "..." takes one or more, and gives a list.
        parser_kwargs: of `argparse.ArgumentParser` (prog, description, ...).

    Exits with status 2 and one line on standard error on a bad file, an unknown option or a bad value.
    """
    # (argparse's own usage names a hundred options.)
    usage = " ".join(["%(prog)s", *operands, "[--config FILE.yaml] [--option VALUE ...]"])
    parser = Parser(dataclass_types, usage=usage, allow_abbrev=False, **parser_kwargs)
    for name, text in operands.items():
        parser.add_argument(name, help=text, nargs="+" if name.endswith("...") else None)
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of options; the command line overrides it.")
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config_file = config_parser.parse_known_args(args)[0].config
    if config_file is not None:
        _take_defaults(parser, config_file)
    try:
        *options, others = parser.parse_args_into_dataclasses(args)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return (*options, *(getattr(others, name) for name in operands))


def _take_defaults(parser: Parser, config_file: str) -> None:
    try:
        with open(config_file) as stream:
            options = yaml.safe_load(stream) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"--config {config_file}: {' '.join(str(error).split())}")
    if not isinstance(options, dict):
        parser.error(f"--config {config_file}: must map option names to values")
    known = {action.dest: action for action in parser._actions}
    for name, value in options.items():
        if name not in known or name in ("help", "config"):
            parser.error(f"--config {config_file}: {name!r} is not an option")
        if value is False and "no" in (known[name].choices or ()):
            options[name] = value = "no"  # (which YAML reads as false)
        if known[name].choices is not None and value not in (*known[name].choices, None):
            parser.error(f"--config {config_file}: {name}={value!r} must be one of {known[name].choices}")
        known[name].required = known[name].required and value is None
    # (Numbers as they would be typed: the option's own type reads them.)
    given = {name: value for name, value in options.items() if value is not None}  # (null: as if it were not there)
    parser.set_defaults(**{name: str(value) if type(value) in (int, float) else value for name, value in given.items()})


def parse_verb(
    verb: str, dataclass_types: Sequence[type], operands: Mapping[str, str], args: Sequence[str], description: str
) -> tuple:
    """What [`parse`] gives for a verb, whose flags may stand before an operand."""
    # HfArgumentParser's flags take an optional value: `--json FOLDER` would read the folder as the flag's.
    fields = [field for dataclass_type in dataclass_types for field in dataclasses.fields(dataclass_type)]
    flags = {f"--{field.name}" for field in fields if isinstance(field.default, bool)}
    args = [f"{arg}=true" if arg in flags else arg for arg in args]
    return parse(dataclass_types, args, operands, prog=f"diffusionblocks {verb}", description=description)
