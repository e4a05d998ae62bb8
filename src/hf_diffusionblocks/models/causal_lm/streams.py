"""The two streams of a joint text denoiser: clean tokens, and noisy ones that become the tokens after them.

Noisy token p stands at the position of clean token p + 1, which it is to become. It sees the clean tokens up to p and
itself; clean tokens see clean tokens only. Hence the clean stream is an ordinary causal pass, and the noisy stream
reads its keys and values. Sources: DiffusionBlocks (arXiv 2506.14202), appendix on autoregressive models.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from ...backbones.modulation import Modulation
from ...cache_name import CACHE
from ...diffusion.gaussian import precondition
from ...streaming import weights_on_device
from ..base import DiffusionBlocksPreTrainedModel
from ..block import Block


class Text(NamedTuple):
    """x: clean tokens, by id or embedded."""

    input_ids: torch.Tensor | None = None  #: `[N, S]`
    inputs_embeds: torch.Tensor | None = None  #: `[N, S, D]`
    attention_mask: torch.Tensor | None = None  #: `[N, P + S]`, 0 for padding; or who sees whom, `[N, 1, S, P + S]`
    position_ids: torch.Tensor | None = None  #: `[N or 1, S]`
    past_key_values: Any = None  #: of the P tokens before

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Text:
        """Of a batch as `forward` takes it."""
        return cls(*map(batch.get, cls._fields))

    @property
    def tokens(self) -> torch.Tensor:
        return self.input_ids if self.inputs_embeds is None else self.inputs_embeds

    @property
    def positions(self) -> torch.Tensor:
        """`[N or 1, S]`, of these tokens."""
        if self.position_ids is not None:
            return self.position_ids
        past, tokens = 0 if self.past_key_values is None else self.past_key_values.get_seq_length(), self.tokens
        return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]

    def without_last(self) -> Text:
        """All tokens but the last, which is no context of any target."""
        text = Text(*[each if each is None else each[:, :-1] for each in self])
        if self.attention_mask is not None and self.attention_mask.dim() == 4:
            text = text._replace(attention_mask=self.attention_mask[:, :, :-1, :-1])
        return text


class CleanKeys:
    """What the clean pass of a training step leaves for the noisy one: each layer's keys and values.

    Stands in for a cache in the stock attention module, but starts anew at every call, so that a layer that gradient
    checkpointing runs twice does not see its own keys twice.
    """

    def __init__(self):
        self.layers: dict[int, SimpleNamespace] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_index: int, *args, **kwargs):
        self.layers[layer_index] = SimpleNamespace(keys=keys, values=values)
        return keys, values


class StreamsCache:
    """What the stock attention module is given as its cache when noisy tokens run through it.

    Of the tokens that run, the first `num_clean` are clean and are added to the `clean` cache; the others are noisy,
    see it, and are forgotten.
    """

    def __init__(self, clean, num_clean: int):
        self.clean, self.num_clean = clean, num_clean

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_index: int, *args, **kwargs):
        clean = self.num_clean
        if clean:
            clean_keys, clean_values = self.clean.update(keys[:, :, :clean], values[:, :, :clean], layer_index)
        else:
            stored = self.clean.layers[layer_index]
            clean_keys, clean_values = stored.keys, stored.values
        return torch.cat([clean_keys, keys[:, :, clean:]], 2), torch.cat([clean_values, values[:, :, clean:]], 2)


def noisy_mask(clean_mask: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Who sees whom among [clean ; noisy] keys, for the noisy queries: their clean token's row, and themselves.

    Args:
        clean_mask: explicit causal mask `[N, 1, S, P + S]`: boolean, or added to the scores.
        kept: `[Q]`, the clean tokens (of the S) that have a noisy one.

    Returns:
        `[N, 1, Q, P + S + Q]`.
    """
    rows = clean_mask[:, :, kept]
    own = torch.eye(len(kept), dtype=torch.bool, device=rows.device)
    return torch.cat([rows, _like(own, rows)], -1)


def streams_mask(clean_mask: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The mask of one pass over [clean ; noisy]: `[N, 1, S + Q, P + S + Q]`; arguments as in [`noisy_mask`]."""
    nothing = torch.zeros(clean_mask.shape[2], len(kept), dtype=torch.bool, device=clean_mask.device)
    return torch.cat([torch.cat([clean_mask, _like(nothing, clean_mask)], -1), noisy_mask(clean_mask, kept)], 2)


def _like(visible: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A boolean `[Q, K]` in the form and number of rows of a mask."""
    if mask.dtype != torch.bool:
        visible = torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, torch.finfo(mask.dtype).min)
    return visible.expand(*mask.shape[:2], *visible.shape)


def join(clean: Modulation, noisy: Modulation, num_clean: int, num_noisy: int) -> Modulation:
    """The modulation of [clean ; noisy] tokens, each field `[N or 1, S + Q, D]`."""
    rows = max(clean[0].shape[0], noisy[0].shape[0])
    return Modulation(
        *(torch.cat([c.expand(rows, num_clean, -1), n.expand(rows, num_noisy, -1)], 1) for c, n in zip(clean, noisy))
    )


class Streams:
    """A batch of clean tokens with noisy ones over them, run through one block after another.

    [`run_clean`] then [`run_noisy`] is the fast way over many tokens: the clean pass is ordinary causal attention.
    [`run_together`] is one masked pass over [clean ; noisy]: the same function, and the fast way over one new token.

    Args:
        model: whose layers run.
        text: the clean tokens.
        kept: `[Q]`, the clean tokens (of the S) that have a noisy one.
        cache: keys and values of clean tokens: the P earlier ones', and soon these'.
    """

    def __init__(self, model: DiffusionBlocksPreTrainedModel, text: Text, kept: torch.Tensor, cache):
        self.model, self.architecture, self.cache, self.kept = model, model.architecture, cache, kept
        self._text, self._position_ids, tokens = text, text.positions, text.tokens
        self.num_clean = tokens.shape[1]
        #: hidden states of no width, for their shape, dtype and device
        self._hidden = torch.empty((*tokens.shape[:2], 0), dtype=model.dtype, device=tokens.device)
        self.noisy_position_ids = self._position_ids[:, kept] + 1
        self._prelude_output: torch.Tensor | None = None
        # Masks are made before anything runs: they count the tokens that the cache holds now. One row of an explicit
        # mask serves the whole batch where rows do not differ.
        differ = text.attention_mask is not None or len(self._position_ids) > 1
        past = cache if hasattr(cache, "get_seq_length") else None
        asked = (text.attention_mask, text.position_ids, past)
        make = self.architecture.causal_mask
        self._explicit_mask = make(model.backbone, self._hidden if differ else self._hidden[:1], *asked, explicit=True)
        self._clean_mask = make(model.backbone, self._hidden, *asked) if self.num_clean > 1 else self._explicit_mask

    @cached_property
    def _clean_positions(self) -> dict:
        return self.architecture.positions(self.model.backbone, self._hidden, self._position_ids)

    @cached_property
    def _clean_attention(self) -> dict:
        return {"attention_mask": self._clean_mask, CACHE: self.cache, **self._clean_positions}

    @cached_property
    def _noisy_attention(self) -> dict:
        return {
            "attention_mask": noisy_mask(self._explicit_mask, self.kept),
            CACHE: StreamsCache(self.cache, num_clean=0),
            **self.architecture.positions(self.model.backbone, self._hidden, self.noisy_position_ids),
        }

    @cached_property
    def _joint_attention(self) -> dict:
        positions = torch.cat([self._position_ids, self.noisy_position_ids], 1)
        return {
            "attention_mask": streams_mask(self._explicit_mask, self.kept),
            CACHE: StreamsCache(self.cache, self.num_clean),
            **self.architecture.positions(self.model.backbone, self._hidden, positions),
        }

    def enter(self, block: Block) -> torch.Tensor:
        """Clean tokens `[N, S, D]`, as they enter the block's first layer. What the prelude makes of them, noisy tokens are
        told, too."""
        parts, text = block.embedding_parts, self._text
        embedded = self.architecture.embed(parts, text.input_ids, text.inputs_embeds, self._position_ids)
        run = partial(self.model.run_layer, modulation=None, **self._clean_attention)
        self._prelude_output, entering = self.architecture.enter(parts, embedded, run)
        return entering

    def _embed_noisy(self, block: Block, z: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """`c_in z`, as tokens at their positions that enter the block's first layer; once clean ones have entered theirs."""
        embeds = precondition(sigma, self.model.config.sigma_data).input[..., None] * z.reshape(-1, len(self.kept), z.shape[-1])
        return self.architecture.embed_noisy(
            block.embedding_parts, embeds.to(self._hidden.dtype), self.noisy_position_ids, self._prelude_output, self.kept
        )

    def run_clean(self, block: Block, hidden: torch.Tensor, modulations) -> None:
        """Clean tokens `[N, S, D]` through a block, for their keys and values: the last layer computes nothing else."""
        *first, last = block.layers
        for layer, modulation in zip(first, modulations):
            hidden = self.model.run_layer(layer, hidden, modulation, **self._clean_attention)
        with weights_on_device(last):
            keys, values = self.architecture.keys_and_values(last, hidden, modulations[-1], **self._clean_positions)
        self.cache.update(keys, values, getattr(last, self.architecture.attention_name).layer_idx)

    def run_noisy(self, block: Block, z: torch.Tensor, sigma: torch.Tensor, modulations) -> torch.Tensor:
        """Noisy tokens `[N, Q, D]` or `[N * Q, D]`, at levels `[N, Q]` or `[1]`, through a block that the clean ones have run
        through: `[N, Q, D]`."""
        return block.run(self._embed_noisy(block, z, sigma), modulations, **self._noisy_attention)

    def run_together(
        self, block: Block, clean: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor, modulations
    ) -> torch.Tensor:
        """The same, of clean tokens `[N, S, D]` that enter the block, too, in one pass over both; modulations from [`join`]."""
        both = torch.cat([clean, self._embed_noisy(block, z, sigma)], 1)
        return block.run(both, modulations, **self._joint_attention)[:, clean.shape[1] :]
