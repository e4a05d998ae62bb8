"""Ledgers as a table, and sizes as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .ledger import Ledger, Parts

UNITS = {"": 1} | {f"{prefix}iB": 2 ** (10 * k) for k, prefix in enumerate("KMGT", 1)}
UNITS |= {f"{prefix}B": 10 ** (3 * k) for k, prefix in enumerate("KMGT", 1)}
#: What a table's first row has to hold at least, and the unit and decimals then: small parts of it (a hundredth) show.
SCALES = ((10 * 2**30, "GiB", 1), (1000 * 2**20, "MiB", 0), (100 * 2**20, "MiB", 1), (0, "KiB", 0))
#: Column -> the parts that it sums.
COLUMNS = {
    "weights": ("shared", "blocks", "adaln"), "gradients": ("gradients",), "optimizer": ("optimizer",),
    "averages": ("averages",), "activations": ("activations",), "logits": ("logits",),
}  # fmt: skip


def parse_bytes(size: int | str, name: str = "budget") -> int:
    """Bytes of "24GiB", "500 MB" or a number.

    Args:
        name: of what is given, for the error.

    Raises:
        ValueError: it is no size above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    found = float(match[1]) * UNITS[match[2]] if match and match[2] in UNITS else 0
    if found < 1:
        units = ", ".join(filter(None, UNITS))
        raise ValueError(f"{name}={size!r} must be a number of bytes, or one with a unit: {units}")
    return int(found)


def bytes_as_text(size: int) -> str:
    """The size in the largest unit that divides it."""
    unit = max((unit for unit in UNITS if unit.endswith("iB") and size % UNITS[unit] == 0), key=UNITS.get, default="")
    return f"{size // UNITS[unit]} {unit or 'bytes'}"


def table_unit(ledgers: Mapping[str, Ledger]) -> tuple[str, int]:
    """Unit and decimals of a table, by its first row."""
    base = next(iter(ledgers.values())).total
    return next((unit, decimals) for least, unit, decimals in SCALES if base >= least)


def in_column(parts: Parts, column: str) -> int:
    """Bytes of a column of the table."""
    return sum(getattr(parts, part) for part in COLUMNS[column])


def ledger_table(ledgers: Mapping[str, Ledger], columns: Mapping[str, Mapping[str, str]] = {}) -> str:
    """Markdown: of each way, the parts on the device at their largest and their sum, the peak, the peak over the first's (end
    to end), and what is in host memory. Averages, and host memory, are left out where there are none.

    Args:
        columns: more of them: heading -> way -> cell; a way that is not named has none.
    """
    base = next(iter(ledgers.values()))
    unit, decimals = table_unit(ledgers)

    def cell(size: int) -> str:
        return f"{size / UNITS[unit]:,.{decimals}f}"

    shown = [name for name in COLUMNS if name != "averages" or any(each.parts.averages for each in ledgers.values())]
    if any(ledger.host for ledger in ledgers.values()):
        columns = {"host": {name: cell(ledger.host) for name, ledger in ledgers.items() if ledger.host}, **columns}
    rows = [[unit, *shown, "sum", "device, at the peak", "over end to end", *columns]]
    for name, ledger in ledgers.items():
        sizes = (*(in_column(ledger.parts, column) for column in shown), ledger.parts.total, ledger.total)
        cells = [*map(cell, sizes), f"{ledger.total / base.total:.2f}x"]
        rows.append([name, *cells, *(column.get(name, "") for column in columns.values())])
    return as_table(rows)


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown, of cells as wide as their columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [" | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join(f"| {line} |" for line in (lines[0], " | ".join("-" * width for width in widths), *lines[1:]))
