"""Options from a YAML file and the command line, shared by the command and the recipes."""

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
        metadata["choices"] = [choice for choice in CHOICES[field.name] if choice is not None]
    # argparse has no "number or word": sigma_data is read as a word and made a number in `config_fields`.
    kind = "str" if field.name == "sigma_data" else field.type
    return field.name, kind, dataclasses.field(default=field.default, metadata=metadata)


#: The fields of DiffusionBlocksConfig as command-line options, with their help.
BlocksArguments = dataclasses.make_dataclass(
    "BlocksArguments", [_option(field) for field in USER_FIELDS.values()], namespace={"__module__": __name__}
)


def config_fields(arguments: BlocksArguments) -> dict[str, Any]:
    """What to give `convert`.

    Raises:
        ValueError: sigma_data is neither a number nor 'auto'.
    """
    values = dataclasses.asdict(arguments)
    if values["sigma_data"] != "auto":
        try:
            values["sigma_data"] = float(values["sigma_data"])
        except ValueError:
            raise ValueError(f"sigma_data={values['sigma_data']!r} must be a number, or 'auto'") from None
    return values


OPTIONS_USAGE = "[--config FILE.yaml] [--option VALUE ...]"


class Parser(HfArgumentParser):
    """Errors are one line: with a hundred options, the usage that argparse prints before them hides them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(
    dataclass_types: Sequence[type],
    args: Sequence[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    **parser_kwargs,
) -> tuple:
    """Fill dataclasses from `--config FILE.yaml` and from options, which win.

    Args:
        dataclass_types: one instance of each is returned, in this order.
        args: the command line; None is `sys.argv[1:]`.
        defaults: in place of the dataclasses' own.
        parser_kwargs: of `argparse.ArgumentParser` (prog, description, ...).

    Exits with status 2 and one line on standard error on a bad file, an unknown option or a bad value.
    """
    parser_kwargs.setdefault("usage", f"%(prog)s {OPTIONS_USAGE}")  # argparse's own names a hundred options
    parser = Parser(dataclass_types, allow_abbrev=False, **parser_kwargs)
    parser.set_defaults(**defaults or {})
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of options; the command line overrides it.")
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config_file = config_parser.parse_known_args(args)[0].config
    if config_file is not None:
        _take_defaults(parser, config_file)
    try:
        return parser.parse_args_into_dataclasses(args)[: len(dataclass_types)]
    except (ValueError, TypeError) as error:
        parser.error(str(error))


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
        if known[name].choices is not None and value not in (*known[name].choices, None):
            parser.error(f"--config {config_file}: {name}={value!r} must be one of {known[name].choices}")
        known[name].required = False
    parser.set_defaults(**options)
