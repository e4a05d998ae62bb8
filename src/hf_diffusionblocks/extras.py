"""Packages that an extra installs, and the library alone does not: imported where they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtraError(ImportError):
    """A package of an extra is not installed; says which, and how to get it."""


@contextmanager
def from_extra(package: str, what: str, extra: str = "recipes") -> Iterator[None]:
    """Around the import of a package, for the sake of `what`.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{what} needs {package}: pip install hf-diffusionblocks[{extra}]") from error
