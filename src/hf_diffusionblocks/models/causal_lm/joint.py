"""Text whose layers see z: a stream of noisy tokens, modulated by sigma, that reads the clean one (the paper's)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ...diffusion.gaussian import precondition
from ...diffusion.objectives import IGNORED
from ..base import BlockOutput, DiffusionBlocksPreTrainedModel
from ..block import Block
from .streams import CleanKeys, Streams
from .text import Text
from .walk import TextWalk


class JointText:
    """A noisy token per clean one: at the next one's position, it sees the clean tokens up to its own, and itself."""

    modulated = True
    embeds_noisy = True
    walks = True  #: whether a token's logits are the end of a walk

    def __init__(self, model: DiffusionBlocksPreTrainedModel):
        self.model = model
        if model.config.readout_layers:
            raise ValueError(
                f"readout_layers={model.config.readout_layers} must be 0 with denoiser='joint' for text: a noisy token's "
                "local head would need clean keys, and a cache, of its own"
            )

    @staticmethod
    def check_attention(requested: str | None) -> None:
        if requested not in (None, "sdpa", "eager"):
            raise ValueError(
                f"attn_implementation={requested!r} must be 'sdpa' or 'eager' with denoiser='joint': a noisy token sees "
                "the clean ones before it and itself, a mask that the others ignore or cannot express"
            )

    def shape_of_levels(self, targets: torch.Tensor) -> tuple[int, ...]:
        """A noise level for each sequence: it modulates the layers."""
        return targets.shape[:1]

    def run(self, block: Block, text: Text, z: torch.Tensor, sigma: torch.Tensor) -> BlockOutput:
        """What tokens 1 to S-1 are read out from, `[N, S-1, D]`; what has left the block is of noisy tokens, and of no use to
        the next."""
        model, text = self.model, text.without_last()
        x = model.clean(text)
        clean = model.entering(block, x, text.block_input)
        kept = torch.arange(clean.shape[1], device=clean.device)
        streams = Streams(model, clean, text, kept, CleanKeys())
        clean = streams.enter(block, clean)
        streams.run_clean(block, clean, block.clean_modulations(), output=False)
        c_in = precondition(sigma, model.sigma_data).input[..., None]
        noisy = streams.embed_noisy(block, (c_in * z).to(clean.dtype))
        # With dropout, PyTorch's attention on the CPU keeps all scores: those that say nothing are worth leaving out.
        keeps_scores = noisy.device.type == "cpu" and model.training and model.architecture.attention_dropout(model.backbone)
        run = streams.run_noisy_in_groups if keeps_scores else streams.run_noisy
        hidden = run(block, noisy, block.modulations(sigma[:, 0]))
        return BlockOutput(hidden, hidden)

    def new_walk(self, num_steps: int | None) -> TextWalk:
        """What goes to the next tokens, in so many evaluations; None is the config's number."""
        return TextWalk(self.model, num_steps=num_steps)

    def predict(self, text: Text, kept: torch.Tensor, text_walk: TextWalk) -> torch.Tensor:
        """Label-free logits `[N, Q, V]` of the tokens after the clean tokens `kept`: the end of a walk."""
        return text_walk.logits(text, kept)

    def loss(self, text: Text, labels: torch.Tensor, num_items, text_walk: TextWalk) -> torch.Tensor:
        """Their mean cross-entropy, without ever holding all of them."""
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        nats = text_walk.losses(text, following)
        # Added up as a cross-entropy is, whose last bit it then has: each token's nats are those of its one class.
        total = F.nll_loss(-nats[:, None], following.clamp(max=0), reduction="mean" if num_items is None else "sum")
        return total if num_items is None else total / num_items

    def prior_logits(self, text: Text) -> torch.Tensor:
        """Every block's at sigma_max, from keyed noise: `[N, B, S, V]`."""
        return TextWalk(self.model).prior_logits(text)

