"""`diffusionblocks card`: a saved model's card, written again from its config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..configuration import option
from ..saving import cards
from ..tasks import TASKS
from .inspect import read_config
from .arguments import parse_verb


@dataclass
class CardArguments:
    stdout: bool = option(False, "Print the card; write nothing.")
    force: bool = option(False, "Replace a card that a person wrote or edited.")


def run(args: list[str]) -> None:
    options, folder = parse_verb(
        "card",
        [CardArguments],
        {"FOLDER": "folder of a DiffusionBlocks model"},
        args,
        description="Write a saved model's card (README.md) again, from its config.",
    )
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"FOLDER={folder} is not a folder")
    model = _empty_model(folder)
    if options.stdout:
        print(cards.render(model, folder))
        return
    if options.force:
        cards.replace(model, folder, folder)
    elif not cards.write(model, folder, keep_from=folder):
        print(f"{folder / cards.CARD}: kept, a person wrote or edited it; --force replaces it")
        return
    print(f"{folder / cards.CARD}: written")


def _empty_model(folder: Path) -> PreTrainedModel:
    """The model without memory for its weights: a card is a function of its config and its parameters' shapes."""
    config = read_config(str(folder))
    with torch.device("meta"):
        return TASKS[config.task].model_class(config)
