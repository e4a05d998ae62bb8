"""What a verb takes without a name (SOURCE, OUT_DIR), on top of the options of `arguments.parse`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

from .arguments import OPTIONS_USAGE, parse


class _Operand(argparse.Action):
    """Keeps its value itself: `parse` returns the dataclasses alone."""

    value: str | list[str]

    def __call__(self, parser, namespace, values, option_string=None):
        self.value = values


def parse_verb(
    verb: str, dataclass_types: Sequence[type], operands: Mapping[str, str], args: Sequence[str], description: str
) -> tuple:
    """An instance of each dataclass, then the operands.

    Args:
        operands: name -> help. A name that ends in "..." takes one or more, and gives a list.
        the rest: as in [`parse`].
    """
    parent = argparse.ArgumentParser(add_help=False)
    actions = [
        parent.add_argument(name, action=_Operand, help=text, nargs="+" if name.endswith("...") else None)
        for name, text in operands.items()
    ]
    args = _explicit_flags(dataclass_types, args)
    usage = f"%(prog)s {' '.join(operands)} {OPTIONS_USAGE}"
    parsed = parse(
        dataclass_types, args, prog=f"diffusionblocks {verb}", usage=usage, description=description, parents=[parent]
    )
    return (*parsed, *(action.value for action in actions))


def _explicit_flags(dataclass_types: Sequence[type], args: Sequence[str]) -> list[str]:
    # HfArgumentParser's flags take an optional value: `--json FOLDER` would read the folder as the flag's.
    fields = [field for dataclass_type in dataclass_types for field in dataclasses.fields(dataclass_type)]
    flags = {f"--{field.name}" for field in fields if isinstance(field.default, bool)}
    return [f"{arg}=true" if arg in flags else arg for arg in args]
