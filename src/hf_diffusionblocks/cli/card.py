"""`diffusionblocks card`: a saved model's card, written again from its config."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .. import cards
from ..backbones import backbone_for
from ..models import MODELS, DiffusionBlocksPreTrainedModel
from .inspect import read_config
from .operands import parse_verb


@dataclass
class CardArguments:
    stdout: bool = field(default=False, metadata={"help": "Print the card; write nothing."})
    force: bool = field(default=False, metadata={"help": "Replace a card that a person wrote or edited."})


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
        print(cards.render(model, folder.resolve().name))
    elif _write(model, folder, options.force):
        print(f"{folder / cards.CARD}: written")
    else:
        print(f"{folder / cards.CARD}: kept, a person wrote or edited it; --force replaces it")


def _empty_model(folder: Path) -> DiffusionBlocksPreTrainedModel:
    """The model without memory for its weights: a card is a function of its config and its parameters' shapes."""
    config = read_config(str(folder))
    with torch.device("meta"):
        return MODELS[backbone_for(config.source_config).task](config)


def _write(model: DiffusionBlocksPreTrainedModel, folder: Path, force: bool) -> bool:
    """Whether the card was written. It is written aside first: a failure leaves the old one whole."""
    with TemporaryDirectory(prefix=".card-", dir=folder) as aside:
        card = Path(aside) / cards.CARD
        if force:
            card.write_text(cards.render(model, folder.resolve().name))
        else:
            cards.write(model, Path(aside), keep_from=folder)
        if not card.is_file():
            return False
        os.replace(card, folder / cards.CARD)
        return True
