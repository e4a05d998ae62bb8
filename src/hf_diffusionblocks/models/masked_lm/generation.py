"""Generation of text from masks: reveal some tokens, look again, reveal more.

The bound (`nll_bound`) describes one sampler: positions in uniformly random order, one token a step, drawn at temperature
1. Options carry the names they have for LLaDA (arXiv 2502.09992).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import TopPLogitsWarper
from transformers.utils import ModelOutput

from ...diffusion.masking import draw_masked
from ...diffusion.randomness import Generators, draw, invert_cdf
from ..active import without_dropout
from .text import MaskedText

REMASKING = ("random", "low_confidence")


@dataclass
class UnmaskedText(ModelOutput):
    """What [`DiffusionBlocksForMaskedLM.generate`] and `infill` return with `return_dict_in_generate`.

    Args:
        sequences: `[N, S]`, the texts.
        steps: `[N, S]`, the step from 0 that revealed each token; -1 for those that were given.
        blocks: `[N, S]`, the block that revealed it; -1 likewise.
    """

    sequences: torch.LongTensor | None = None
    steps: torch.LongTensor | None = None
    blocks: torch.LongTensor | None = None


@dataclass(frozen=True)
class Sampling:
    """How masked tokens are chosen and drawn.

    Args:
        remasking: which tokens a step reveals: "random", or "low_confidence": those whose drawn token is the most likely
            (the rest stay masked), which reads better at few steps, and is not the sampler of the bound.
        temperature: of the draws; 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that have this probability together.
        cfg_scale: w of guidance by what is given, `none + (w + 1) * (given - none)`; 0 is none. Above, each step also looks
            at the texts with all that was given masked.
        generator: of all draws; or one a text, N of them.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """

    remasking: str = "random"
    temperature: float = 1.0
    top_p: float = 1.0
    cfg_scale: float = 0.0
    generator: Generators = None

    def __post_init__(self):
        if self.remasking not in REMASKING:
            raise ValueError(f"remasking={self.remasking!r} must be one of {', '.join(map(repr, REMASKING))}")
        for name, allowed, holds in (
            ("temperature", "from 0", self.temperature >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("cfg_scale", "from 0", self.cfg_scale >= 0),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {allowed}")

    def draw_tokens(self, logits: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """A token `[R]` for each row of logits `[R, V]`, which are of the positions `where` of texts (bool, `[N, S]`)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_p < 1:
            logits = TopPLogitsWarper(self.top_p)(None, logits)
        # In float64: the noise of float32 draws would lower the temperature, and say nothing (arXiv 2409.02908).
        uniform = draw(torch.rand, where.shape, self.generator, dtype=torch.float64).to(where.device)
        return invert_cdf(logits, uniform[where][:, None])


class UnmaskingGeneration:
    """The part of a masked diffusion model that generates."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        *,
        max_new_tokens: int,
        num_inference_steps: int | None = None,
        block_length: int | None = None,
        streamer=None,
        return_dict_in_generate: bool = False,
        **sampling,
    ) -> torch.LongTensor | UnmaskedText:
        """Write on after prompts: as many MASKs follow each, and are revealed step by step. A step runs one block's layers
        (of texts of different length, the blocks that own their shares).

        Args:
            input_ids: `[N, P]` prompts; shorter ones are padded on the left, where `attention_mask` is 0.
            max_new_tokens: how many.
            num_inference_steps: T; None is the config's, and then one token a step.
            block_length: reveal the new text in parts of so many tokens, one after the other, each in its share of the
                steps; None: as a whole. (Nothing to do with blocks of layers.)
            streamer: of Transformers, for one text: gets the prompt, and each part of the new text when it is finished; a
                `TextDiffusionStreamer` shows the drafts between.
            return_dict_in_generate: whether to tell which step and block revealed each token.
            sampling: fields of [`Sampling`]: `remasking`, `temperature`, `top_p`, `cfg_scale`, `generator`.

        Returns:
            `[N, P + max_new_tokens]`, or [`UnmaskedText`].

        Raises:
            ValueError: names the argument, its value and what is allowed.
        """
        num_texts, prompt = input_ids.shape
        parts = self._parts(prompt, max_new_tokens, block_length)
        self._check_prompts(input_ids, attention_mask)
        new = input_ids.new_full((num_texts, max_new_tokens), self.mask_token_id)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(new.shape)], 1)
        if token_type_ids is not None:
            token_type_ids = torch.cat([token_type_ids, token_type_ids[:, -1:].expand(new.shape)], 1)
        text = _positioned(MaskedText(torch.cat([input_ids, new], 1), attention_mask, None, token_type_ids))
        columns = torch.arange(text.input_ids.shape[1], device=input_ids.device)
        regions = [((columns >= start) & (columns < stop)).expand(text.input_ids.shape) for start, stop in parts]
        steps = min(self.config.num_inference_steps or max_new_tokens, max_new_tokens)
        steps = steps if num_inference_steps is None else num_inference_steps
        if steps < 1 or steps % len(parts):
            raise ValueError(f"num_inference_steps={steps} must be a multiple of the {len(parts)} parts of the new text")
        unmasking = self._unmask(text, regions, steps // len(parts), Sampling(**sampling))
        found = _streamed(unmasking, streamer, input_ids, parts) if streamer is not None else list(unmasking)[-1][1]
        return found if return_dict_in_generate else found.sequences

    @torch.no_grad()
    def infill(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        num_inference_steps: int | None = None,
        streamer=None,
        return_dict_in_generate: bool = False,
        **sampling,
    ) -> torch.LongTensor | UnmaskedText:
        """Fill in the MASKs of texts `[N, S]`, which may be padded anywhere; the rest is as for [`generate`], but that a
        streamer gets the whole text, when it is finished, and its drafts.

        Raises:
            ValueError: names the argument, its value and what is allowed; or there is no MASK.
        """
        text = _positioned(MaskedText(input_ids, attention_mask, None, token_type_ids))
        masks = text.holds(self.mask_token_id)
        most = int(masks.sum(1).max())
        if most == 0:
            raise ValueError(f"input_ids must hold mask_token_id={self.mask_token_id} where there is something to fill in")
        steps = self.config.num_inference_steps or most if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps} must be at least 1")
        unmasking, whole = self._unmask(text, [masks], steps, Sampling(**sampling)), [(0, input_ids.shape[1])]
        found = _streamed(unmasking, streamer, input_ids[:, :0], whole) if streamer is not None else list(unmasking)[-1][1]
        return found if return_dict_in_generate else found.sequences

    def _parts(self, prompt: int, new: int, block_length: int | None) -> list[tuple[int, int]]:
        """Where the parts of the new text begin and end."""
        if new < 1:
            raise ValueError(f"max_new_tokens={new} must be at least 1")
        block_length = new if block_length is None else block_length
        if block_length < 1 or new % block_length:
            raise ValueError(f"block_length={block_length} must divide max_new_tokens={new}")
        longest = self.config.source_config.max_position_embeddings
        if prompt + new > longest:
            raise ValueError(f"max_new_tokens={new} after {prompt} must make at most max_position_embeddings={longest}")
        return [(start, start + block_length) for start in range(prompt, prompt + new, block_length)]

    def _check_prompts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask must be 0 on the left alone: prompts are padded there (padding_side='left')")
        if bool(MaskedText(input_ids, attention_mask).holds(self.mask_token_id).any()):
            raise ValueError(f"input_ids must not hold mask_token_id={self.mask_token_id}: infill() fills these in")

    def _unmask(
        self, text: MaskedText, regions: list[torch.Tensor], num_steps: int, sampling: Sampling
    ) -> Iterator[tuple[int, UnmaskedText]]:
        """Reveal regions (bool, `[N, S]`) one after the other, each in so many steps: gives its number, and the draft."""
        given = text.attended & ~text.holds(self.mask_token_id)
        revealed = torch.full_like(text.input_ids, -1)
        draft, step = UnmaskedText(sequences=text.input_ids, steps=revealed, blocks=revealed), 0
        with without_dropout(self):
            for number, region in enumerate(regions):
                for left in range(num_steps, 0, -1):
                    masked = text.holds(self.mask_token_id) & region
                    if not bool(masked.any()):
                        break
                    counts = -(-masked.sum(1) // left)
                    chosen, tokens, blocks = self._reveal(text, masked, counts, given, sampling)
                    text = text._replace(input_ids=torch.where(chosen, tokens, text.input_ids))
                    draft = UnmaskedText(
                        sequences=text.input_ids,
                        steps=draft.steps.masked_fill(chosen, step),
                        blocks=torch.where(chosen, blocks, draft.blocks),
                    )
                    step += 1
                    yield number, draft

    def _reveal(
        self, text: MaskedText, masked: torch.Tensor, counts: torch.Tensor, given: torch.Tensor, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`counts` `[N]` of the masked positions, what stands there, and the blocks that say so; `[N, S]` each."""
        random = sampling.remasking == "random"
        where = draw_masked(counts, masked, sampling.generator) if random else masked
        logits, blocks = self._logits_at(text, where)
        if sampling.cfg_scale:
            none, _ = self._logits_at(text.masked(given, self.mask_token_id), where)
            logits = none + (sampling.cfg_scale + 1) * (logits - none)
            logits[:, self.mask_token_id] = -torch.inf  # (it was, in both: their difference is not a number)
        drawn = sampling.draw_tokens(logits, where)
        chosen = where
        if not random:
            surety = torch.full(where.shape, -1.0, device=where.device)
            surety[where] = logits.softmax(-1).gather(-1, drawn[:, None])[:, 0]
            chosen = surety.argsort(1, descending=True).argsort(1) < counts[:, None]
        tokens, of = torch.zeros_like(text.input_ids), torch.zeros_like(text.input_ids)
        tokens[where], of[where] = drawn, blocks
        return chosen, tokens, of

    def _logits_at(self, text: MaskedText, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[R, V]` float32 of some positions of texts (bool, `[N, S]`), in their order, and whose they are."""
        row_of = where.nonzero()[:, 0]
        logits = torch.empty((len(row_of), self.config.vocab_size), device=where.device)
        blocks = torch.empty_like(row_of)
        for block, rows, hidden in self.answers(text):
            of_block = torch.isin(row_of, rows)
            logits[of_block] = self.logits(block, hidden[where[rows]]).float()
            blocks[of_block] = block.index
        return logits, blocks


def _positioned(text: MaskedText) -> MaskedText:
    """Tokens are counted from the first that is no padding."""
    if text.attention_mask is None:
        return text
    return text._replace(position_ids=(text.attention_mask.long().cumsum(1) - 1).clamp(min=0))


def _streamed(unmasking: Iterator, streamer, input_ids: torch.Tensor, parts: list[tuple[int, int]]) -> UnmaskedText:
    """Run a sampler to its end, and show it."""
    streamer.put(input_ids.cpu())
    shown, draft = 0, None
    for number, draft in unmasking:
        for start, stop in parts[shown:number]:
            streamer.put(draft.sequences[:, start:stop].cpu())
        shown = number
        if hasattr(streamer, "put_draft"):
            streamer.put_draft(draft.sequences[:, parts[number][0] :].cpu())
    for start, stop in parts[shown:]:
        streamer.put(draft.sequences[:, start:stop].cpu())
    streamer.end()
    return draft
