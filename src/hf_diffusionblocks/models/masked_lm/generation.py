"""Generation of text from masks: reveal some tokens, look again, reveal more.

The bound (`nll_bound`) describes one sampler: positions in uniformly random order, one token a step, drawn at temperature
1. Options carry the names they have in Transformers, and for LLaDA (arXiv 2502.09992).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from ...diffusion.masking import draw_masked
from ...diffusion.randomness import check_generators
from ...whole_numbers import whole
from ...backbones.stock_run import without_dropout
from ..positions import positions_of
from .controls import CONTROLS, ENDS, Ends, Sampling, number_of_new, settle
from .text import MaskedText


@dataclass
class UnmaskedText(ModelOutput):
    """What [`DiffusionBlocksForMaskedLM.generate`] and `infill` return with `return_dict_in_generate`.

    Args:
        sequences: `[N, S]`, the texts.
        steps: `[N, S]`, the step from 0 that revealed each token; -1 for those that were given, or are padding after an end.
        blocks: `[N, S]`, the block that revealed it; -1 likewise.
    """

    sequences: torch.LongTensor | None = None
    steps: torch.LongTensor | None = None
    blocks: torch.LongTensor | None = None


class UnmaskingGeneration:
    """The part of a masked diffusion model that generates."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        num_inference_steps: int | None = None,
        block_length: int | None = None,
        streamer=None,
        **options,
    ) -> torch.LongTensor | UnmaskedText:
        """Write on after prompts: as many MASKs follow each, and are revealed step by step. A step runs one block's layers
        (of texts of different length, the blocks that own their shares).

        Args:
            input_ids: `[N, P]` prompts; shorter ones are padded on the left, where `attention_mask` is 0.
            generation_config: has what `options` leave out. None: the model's, if it was given one.
            num_inference_steps: T; None is the config's, and then one token a step.
            block_length: reveal the new text in parts of so many tokens, one after the other, each in its share of the
                steps; None: as a whole. (Nothing to do with blocks of layers.)
            streamer: of Transformers, for one text: gets the prompt, and each part of the new text when it is finished; a
                `TextDiffusionStreamer` shows the drafts between.
            options: as in Transformers `max_new_tokens` or `max_length`, one of which there must be; `do_sample` (None:
                tokens are drawn), `temperature`, `top_k`, `top_p`; `num_return_sequences`; `eos_token_id`, after which a text
                holds `pad_token_id` (None: the end token itself), and runs for no further part; `return_dict_in_generate`,
                whether to tell which step and block revealed each token. Of ours `remasking`, `generator`, as in
                [`Sampling`].

        Returns:
            `[N * num_return_sequences, P + max_new_tokens]`, or [`UnmaskedText`].

        Raises:
            ValueError: names the argument, its value and what is allowed.
        """
        config = generation_config or getattr(self, "generation_config", None)
        settled = settle("generate()", options, config, (*CONTROLS, *ENDS))
        self._check_texts(input_ids, attention_mask, token_type_ids)
        self._check_prompts(input_ids, attention_mask)
        prompt, given = input_ids.shape[1], (input_ids, attention_mask, token_type_ids)
        max_new_tokens = number_of_new(settled, prompt, self._longest)
        ends = Ends.of(settled, prompt, self.config.vocab_size, self.mask_token_id)
        steps = min(self.config.num_inference_steps or max_new_tokens, max_new_tokens)
        steps = steps if num_inference_steps is None else whole("num_inference_steps", num_inference_steps, 1, ", or None")
        parts = _parts(prompt, max_new_tokens, block_length)
        if steps % len(parts):
            raise ValueError(f"num_inference_steps={steps} must be a multiple of the {len(parts)} parts of the new text")
        given, sampling = _several(given, settled)
        text = self._with_masks(*given, max_new_tokens)
        columns = torch.arange(text.input_ids.shape[1], device=input_ids.device)
        regions = [((columns >= start) & (columns < stop)).expand(text.input_ids.shape) for start, stop in parts]
        unmasking = self._unmask(text, regions, steps // len(parts), sampling, ends)
        found = list(unmasking)[-1][1] if streamer is None else _streamed(unmasking, streamer, given[0], parts, ends)
        return found if settled.get("return_dict_in_generate") else found.sequences

    @torch.no_grad()
    def infill(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        num_inference_steps: int | None = None,
        streamer=None,
        generation_config: GenerationConfig | None = None,
        **options,
    ) -> torch.LongTensor | UnmaskedText:
        """Fill in the MASKs of texts `[N, S]`, which may be padded anywhere; the rest is as for [`generate`], but that a
        streamer gets the whole text, when it is finished, and its drafts, and that nothing is said of length and end.

        Raises:
            ValueError: names the argument, its value and what is allowed; or there is no MASK.
        """
        config = generation_config or getattr(self, "generation_config", None)
        settled = settle("infill()", options, config, CONTROLS)
        self._check_texts(input_ids, attention_mask, token_type_ids)
        if input_ids.shape[1] > self._longest:
            raise ValueError(
                f"input_ids of {input_ids.shape[1]} tokens a text must be at most max_position_embeddings={self._longest}"
            )
        given, sampling = _several((input_ids, attention_mask, token_type_ids), settled)
        text = _positioned(MaskedText(given[0], given[1], None, given[2]))
        masks = text.holds(self.mask_token_id)
        most = int(masks.sum(1).max())
        if most == 0:
            raise ValueError(f"input_ids must hold mask_token_id={self.mask_token_id} where there is something to fill in")
        steps = self.config.num_inference_steps or most
        steps = steps if num_inference_steps is None else whole("num_inference_steps", num_inference_steps, 1, ", or None")
        unmasking, whole_text = self._unmask(text, [masks], steps, sampling), [(0, input_ids.shape[1])]
        found = list(unmasking)[-1][1] if streamer is None else _streamed(unmasking, streamer, given[0][:, :0], whole_text)
        return found if settled.get("return_dict_in_generate") else found.sequences

    @property
    def _longest(self) -> float:
        """Tokens that the model has positions for."""
        return getattr(self.config.source_config, "max_position_embeddings", math.inf)

    def _check_texts(self, input_ids: torch.Tensor, *others: torch.Tensor | None) -> None:
        if not torch.is_tensor(input_ids) or input_ids.dim() != 2 or input_ids.is_floating_point() or not len(input_ids):
            kind = f"{input_ids.dtype} {list(input_ids.shape)}" if torch.is_tensor(input_ids) else type(input_ids).__name__
            raise ValueError(f"input_ids of {kind} must be a tensor of whole numbers [N, S]: a row a text")
        for name, other in zip(("attention_mask", "token_type_ids"), others):
            if other is not None and other.shape != input_ids.shape:
                raise ValueError(f"{name} of {list(other.shape)} must be {list(input_ids.shape)}, as input_ids")

    def _check_prompts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        if attention_mask is not None and not bool(attention_mask[:, -1:].all()):
            raise ValueError("attention_mask must be 0 on the left alone: prompts are padded there (padding_side='left')")
        if bool(MaskedText(input_ids, attention_mask).holds(self.mask_token_id).any()):
            raise ValueError(f"input_ids must not hold mask_token_id={self.mask_token_id}: infill() fills these in")

    def _with_masks(self, input_ids, attention_mask, token_type_ids, count: int) -> MaskedText:
        """Prompts, and as many MASKs after each."""
        new = input_ids.new_full((len(input_ids), count), self.mask_token_id)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, attention_mask.new_ones(new.shape)], 1)
        if token_type_ids is not None:
            token_type_ids = torch.cat([token_type_ids, token_type_ids[:, -1:].expand(new.shape)], 1)
        return _positioned(MaskedText(torch.cat([input_ids, new], 1), attention_mask, None, token_type_ids))

    def _unmask(
        self, text: MaskedText, regions: list[torch.Tensor], num_steps: int, sampling: Sampling, ends: Ends | None = None
    ) -> Iterator[tuple[int, UnmaskedText]]:
        """Reveal regions (bool, `[N, S]`) one after the other, each in so many steps: gives its number, and the draft. Texts
        that have ended are padding after that."""
        revealed = torch.full_like(text.input_ids, -1)
        draft, step = UnmaskedText(sequences=text.input_ids, steps=revealed, blocks=revealed), 0
        with without_dropout(self):
            for number, region in enumerate(regions):
                for left in range(num_steps, 0, -1):
                    masked = text.holds(self.mask_token_id) & region
                    if not bool(masked.any()):
                        break
                    counts = -(-masked.sum(1) // left)
                    chosen, tokens, blocks = self._reveal(text, masked, counts, sampling)
                    text = text._replace(input_ids=torch.where(chosen, tokens, text.input_ids))
                    draft = UnmaskedText(
                        sequences=text.input_ids,
                        steps=draft.steps.masked_fill(chosen, step),
                        blocks=torch.where(chosen, blocks, draft.blocks),
                    )
                    if ends is not None and not bool((masked & ~chosen).any()):  # (before, an end may have MASKs before it)
                        draft = _ended(draft, ends)
                        text = text._replace(input_ids=draft.sequences)
                    step += 1
                    yield number, draft

    def _reveal(
        self, text: MaskedText, masked: torch.Tensor, counts: torch.Tensor, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`counts` `[N]` of the masked positions, what stands there, and the blocks that say so; `[N, S]` each."""
        random = sampling.remasking == "random"
        where = draw_masked(counts, masked, sampling.generator) if random else masked
        logits, blocks = self._logits_at(text, where)
        drawn = sampling.draw_tokens(logits, where)
        chosen = where
        if not random:
            surety = torch.full(where.shape, -1.0, device=where.device)
            surety[where] = logits.softmax(-1).gather(-1, drawn[:, None])[:, 0]
            chosen = surety.argsort(1, descending=True).argsort(1) < counts[:, None]
        tokens, of = torch.zeros_like(where, dtype=torch.long), torch.zeros_like(where, dtype=torch.long)
        tokens[where], of[where] = drawn, blocks
        return chosen, tokens, of

    def _logits_at(self, text: MaskedText, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[R, V]` float32 of some positions of texts (bool, `[N, S]`), in their order, and whose they are. Texts
        without any are not run."""
        row_of, asked = where.nonzero()[:, 0], where.any(1).nonzero()[:, 0]
        logits = torch.empty((len(row_of), self.config.vocab_size), device=where.device)
        blocks = torch.empty_like(row_of)
        for block, rows, hidden in self.answers(text.rows(asked)):
            rows = asked[rows]
            of_block = torch.isin(row_of, rows)
            logits[of_block] = self.logits(block, hidden[where[rows]]).float()
            blocks[of_block] = block.index
        return logits, blocks


def _positioned(text: MaskedText) -> MaskedText:
    """Tokens are counted from the first that is no padding."""
    return text if text.attention_mask is None else text._replace(position_ids=positions_of(text.attention_mask))


def _parts(prompt: int, new: int, block_length: int | None) -> list[tuple[int, int]]:
    """Where the parts of the new text begin and end."""
    block_length = new if block_length is None else whole("block_length", block_length, 1, ", or None")
    if new % block_length:
        raise ValueError(f"block_length={block_length} must divide max_new_tokens={new}")
    return [(start, start + block_length) for start in range(prompt, prompt + new, block_length)]


def _several(given: tuple[torch.Tensor | None, ...], settled: Mapping[str, Any]) -> tuple[tuple, Sampling]:
    """What is given of each text, `num_return_sequences` times, one after another; and how tokens are drawn."""
    sampling = Sampling(**{name: settled[name] for name in Sampling.__dataclass_fields__ if name in settled})
    times = whole("num_return_sequences", settled.get("num_return_sequences", 1), 1)
    if times > 1 and sampling.is_greedy and sampling.remasking == "low_confidence":
        raise ValueError(f"num_return_sequences={times} must be 1 where nothing is drawn: they would all be the same")
    if times > 1:
        given = tuple(None if of is None else of.repeat_interleave(times, 0) for of in given)
    check_generators(sampling.generator, len(given[0]))
    return given, sampling


def _ended(draft: UnmaskedText, ends: Ends) -> UnmaskedText:
    """What comes after the ends of texts, which nothing has revealed."""
    after = ends.after(draft.sequences)
    return UnmaskedText(
        sequences=draft.sequences.masked_fill(after, ends.padding),
        steps=draft.steps.masked_fill(after, -1),
        blocks=draft.blocks.masked_fill(after, -1),
    )


def _streamed(
    unmasking: Iterator, streamer, input_ids: torch.Tensor, parts: list[tuple[int, int]], ends: Ends | None = None
) -> UnmaskedText:
    """Run a sampler to its end, and show it; nothing after its end."""

    def shown(start: int, stop: int | None) -> torch.Tensor:
        tokens = draft.sequences[:, start:stop]
        if ends is not None:
            tokens = tokens[:, ~ends.after(draft.sequences)[:, start:stop].all(0)]
        return tokens.cpu()

    streamer.put(input_ids.cpu())
    finished, draft = 0, None
    for number, draft in unmasking:
        for part in parts[finished:number]:
            streamer.put(shown(*part))
        finished = number
        if hasattr(streamer, "put_draft"):
            streamer.put_draft(shown(parts[number][0], None))
    streamer.put(shown(*parts[finished]))
    streamer.end()
    return draft
