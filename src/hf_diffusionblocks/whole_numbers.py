"""Checks of whole numbers that users give: counts, sizes, numbers of blocks. (To Python, True is a number, too.)"""

from __future__ import annotations

from typing import Any

import numpy as np


def is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_whole(name: str, value: Any, least: int, otherwise: str = "") -> None:
    """Raise ValueError, which names the field, unless the value is a whole number from `least`.

    Args:
        otherwise: what else the caller allows, for the message: ", or None".
    """
    if not is_whole(value, least):
        raise ValueError(f"{name}={value!r} must be a whole number from {least}{otherwise}")


def whole(name: str, value: Any, least: int, otherwise: str = "") -> int:
    """The number as Python's, checked likewise: for arguments of calls, where NumPy's whole numbers are as good."""
    value = int(value) if isinstance(value, np.integer) else value
    check_whole(name, value, least, otherwise)
    return value
