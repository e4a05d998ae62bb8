"""A recipe that must refuse what it is given."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def refusal(main: Callable, options: list[str], program: str, capsys) -> str:
    """The one line that a recipe's main program ends with, of bad input."""
    with pytest.raises(SystemExit) as stop:
        main(options)
    # A status that is a string is printed by the interpreter, which then exits with 1.
    printed = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code not in (0, None)
    assert printed.startswith(f"{program}: error: ") and len(printed.splitlines()) == 1
    return printed
