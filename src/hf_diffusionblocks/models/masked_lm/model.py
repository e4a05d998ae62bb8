"""Masked diffusion of text: y is the tokens, and z, what the layers read, the same tokens with some of them masked."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from ...configuration import DiffusionBlocksConfig
from ...diffusion.masking import MaskingSchedule, draw_counts, draw_masked
from ...diffusion.objectives import IGNORED, chunked_cross_entropy, chunks, num_counted
from ...diffusion.randomness import Generators, keyed_generators
from ...presets import PRESETS
from ..base import DiffusionBlocksPreTrainedModel, Formulation
from ..block import Block
from .bound import likelihood_terms
from .generation import UnmaskingGeneration
from .text import MaskedText

logger = logging.get_logger(__name__)


class MaskedInput(Formulation):
    """z is what the layers read: nothing meets it. How much of it is masked they see by themselves (arXiv 2409.02908)."""

    runs_stock = True


class DiffusionBlocksForMaskedLM(DiffusionBlocksPreTrainedModel, UnmaskingGeneration):
    """A text model that attends both ways, whose blocks are each a denoiser for their own share of masked tokens (arXiv
    2506.14202; masked diffusion: 2406.07524, 2406.04329, 2502.09992).

    Block 0 answers where most is masked, the last block where least is. Which block answers follows from the text alone,
    everywhere by one rule ([`MaskingSchedule.block_of`]): callers say no time. MASK itself is never an answer.

    Raises:
        ValueError: a field asks for what has no meaning here.
    """

    main_input_name = "input_ids"
    task = "fill-mask"
    reads_rows, sees_later_tokens = True, True
    FORMULATIONS = dict.fromkeys(PRESETS, MaskedInput)
    accepts_loss_kwargs = True  # the Trainer gives num_items_in_batch: every token of a step counts alike

    def __init__(self, config: DiffusionBlocksConfig):
        super().__init__(config)
        self.mask_token_id: int = config.mask_token_id
        self.post_init()

    @classmethod
    def schedule_for(cls, config: DiffusionBlocksConfig) -> MaskingSchedule:
        return MaskingSchedule(config.num_blocks, config.overlap)

    # ---- weights

    def weights_of(self, plain: nn.Module) -> Mapping[str, torch.Tensor]:
        """Of a vocabulary without MASK, each table gets a row for it: the mean of the others."""
        weights, own = dict(plain.state_dict()), dict(self.backbone.state_dict())
        for name in self.sharing.own_modules:  # in a job of one block the backbone has no head, its own part may
            for parts in getattr(self, name):
                own |= dict(parts.named_parameters())
        short = [name for name in own if own[name].dim() and len(own[name]) == len(weights[name]) + 1]
        if short:
            logger.warning(
                f"mask_token_id={self.mask_token_id} is a new token, which the model has yet to learn. If it knows one "
                "already (BERT does), convert it with mask_token_id=tokenizer.mask_token_id"
            )
        return weights | {name: _with_mean_row(weights[name]) for name in short}

    def _resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True) -> nn.Embedding:
        if new_num_tokens is not None and new_num_tokens + -new_num_tokens % (pad_to_multiple_of or 1) <= self.mask_token_id:
            raise ValueError(f"new_num_tokens={new_num_tokens} must be above mask_token_id={self.mask_token_id}, and keep MASK")
        if self.sharing.own_modules:
            raise ValueError(
                "shared='per_block' must be 'common' to resize token embeddings: resize the plain model, and convert that"
            )
        return self.backbone.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    @property
    def computes_plain_model(self) -> bool:
        return self.num_blocks == 1

    def to_plain(self) -> PreTrainedModel:
        """A copy of the stock model inside, with the trained weights; a decoder's config says that it attends both ways.
        It gives MASK a logit, too.

        Raises:
            ValueError: there is more than one block: none has all layers, then.
        """
        if not self.computes_plain_model:
            raise ValueError(f"to_plain() needs num_blocks=1, this model has {self.num_blocks}: no block has all layers")
        return super().to_plain()

    # ---- training and evaluation

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        block_index: int | None = None,
        mask_ratio: torch.Tensor | float | None = None,
        generator: Generators = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_logits: bool | None = None,
    ) -> MaskedLMOutput:
        """Train one block (`block_index` given), or predict masked tokens.

        Args:
            input_ids: `[N, S]`; to train, without any MASK: the model masks by itself.
            attention_mask: `[N, S]`, 0 for padding, which is never masked and never counted.
            token_type_ids, position_ids: as in the plain model; architectures without token types ignore these.
            labels: `[N, S]`, the tokens themselves: -100 is never masked and never counted.
            block_index: the block to train. Needs `labels`.
            mask_ratio: share of the tokens to mask, a number or one a text `[N]`, rounded to a count of at least one label;
                None draws a count of the block's range (widened by the overlap in training mode), stratified over the
                batch.
            generator: of the draws; or one a text, N of them.
            num_items_in_batch: tokens that the summed loss is divided by; None is the labels of this batch.
            return_logits: whether to hold and return all logits; None returns them unless a block is trained. No other
                logits are held than those of masked tokens, in chunks.

        Returns:
            `loss` (with labels), nats a token, and `logits` `[N, S, V]`, MASK at -inf. Training: B times an
            estimate of the block's share of the bound (see `_weights`). In evaluation each text is answered by the block
            that owns its share of masked tokens. With labels only MASK tokens count; a text without any is masked first, by
            draws keyed by its tokens and `config.inference_seed`: the loss then estimates the bound, and logits are those
            of the masked text.

        Raises:
            ValueError: labels are missing for a block, or a block for training; or a text to train on holds MASK.
        """
        self.check_block_given(block_index, labels)
        text = MaskedText(input_ids, attention_mask, position_ids, token_type_ids)
        if block_index is None:
            return self._predict(text, labels, num_items_in_batch, return_logits)
        self._refuse_masked(text)
        block, schedule, attended = self.blocks[block_index], self.noise_schedule, text.attended
        maskable, overlap = (labels != IGNORED) & attended, schedule.overlap if self.training else 0.0
        tokens, labelled, length = attended.sum(1), maskable.sum(1), labels.shape[1]
        if mask_ratio is None:
            at_most = schedule.most(block_index, length, overlap)
            counts = draw_counts(*schedule.counts(block_index, tokens, labelled, overlap), generator)
        else:
            at_most, ratio = length, torch.as_tensor(mask_ratio, dtype=torch.float64, device=tokens.device)
            counts = torch.minimum((ratio * tokens).round().long().clamp(min=1), labelled)
        masked = draw_masked(counts, maskable, generator)
        hidden = self.read(block, text.masked(masked, self.mask_token_id))
        loss = self._weighted_sum(
            block, hidden, labels.masked_fill(~masked, IGNORED), self._weights(block_index, tokens, labelled, masked),
            len(labels) * at_most,
        )  # fmt: skip
        loss = loss / num_counted(labels.masked_fill(~maskable, IGNORED), num_items_in_batch, self.training)
        return MaskedLMOutput(loss=loss, logits=self._all_logits(block, hidden) if return_logits else None)

    def counted_labels(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """None of padding, whatever it is labelled."""
        mask = batch.get("attention_mask")
        return batch["labels"] if mask is None else batch["labels"].masked_fill(mask == 0, IGNORED)

    def _refuse_masked(self, text: MaskedText) -> None:
        if text.input_ids.device.type == "cpu" and bool(text.holds(self.mask_token_id).any()):  # (no wait for a device)
            raise ValueError(
                f"input_ids hold mask_token_id={self.mask_token_id} already, and must be whole texts: the model masks by "
                "itself. A collator must not, as DataCollatorForLanguageModeling(mlm=False) does not"
            )

    def _weights(self, block_index: int, tokens: torch.Tensor, labelled: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """What the masked tokens of each text weigh in a block's loss, `[N]`: `B (n_k / L) (L / l)`, for l masked of L
        labels, and n_k counts in the block's own range.

        L / l is the bound's count form. With n_k / L the loss, over all labels, is an unbiased estimate (but for the
        overlap) of the block's share of the bound per token; with B the mean over blocks, which the Trainer logs, is the
        bound. A text with no count in the range adds nothing.
        """
        least, most = self.noise_schedule.counts(block_index, tokens, labelled)
        return self.num_blocks * (most - least + 1).clamp(min=0) / masked.sum(1).clamp(min=1)

    def _weighted_sum(
        self, block: Block, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, at_most: int
    ) -> torch.Tensor:
        """`-ln p` of the targets `[N, S]`, weighted by text and summed, in chunks."""
        vocab_size = self.backbone.config.get_text_config().vocab_size
        weights = weights[:, None].expand(targets.shape).flatten()
        with block.reading_out() as (head, parameters):
            return chunked_cross_entropy(
                partial(self._read, head), [hidden.flatten(0, 1)], targets.flatten(), parameters, vocab_size, weights, at_most
            )

    def read(self, block: Block, text: MaskedText) -> torch.Tensor:
        """What the head reads of a text that one block has run, `[N, S, D]`."""
        return block.run_stock(self.stock_inputs(text._asdict())).read

    def stock_inputs(self, batch: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        given = {
            name: batch[name] for name in MaskedText._fields if batch.get(name) is not None and name in self.stock_arguments
        }
        return {"use_cache": False, **given} if "use_cache" in self.stock_arguments else given

    def logits(self, block: Block, hidden: torch.Tensor) -> torch.Tensor:
        """`[R, D]` of what the head reads -> `[R, V]`; MASK is never an answer."""
        return self._read(block.head, hidden)

    def _read(self, head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        logits[..., self.mask_token_id] = -torch.inf
        return logits

    def _all_logits(self, block: Block, hidden: torch.Tensor) -> torch.Tensor:
        """The same, of `[N, S, D]`."""
        return self.logits(block, hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    def evaluation_levels(self, block_index: int, num_rows: int) -> dict[str, torch.Tensor]:
        """Nothing: a block draws from its own range."""
        return {}

    # ---- prediction

    def _predict(self, text: MaskedText, labels, num_items, return_logits) -> MaskedLMOutput:
        if labels is not None:
            text, masked, labelled = self._masked_for_scoring(text, labels)
            sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        wants_logits, logits = return_logits is None or return_logits, None
        for block, rows, hidden in self.answers(text):
            if labels is not None:
                sums[rows] = self.sums_of_rows(block, hidden, labels[rows], masked[rows])
            if wants_logits:
                of_block = self._all_logits(block, hidden)
                logits = of_block.new_empty((len(text.input_ids), *of_block.shape[1:])) if logits is None else logits
                logits[rows] = of_block
        if labels is None:
            return MaskedLMOutput(logits=logits)
        counts, items = masked.sum(1), labelled.sum(1)
        items = torch.where(counts > 0, items, 0)
        total = (items / counts.clamp(min=1) * sums).sum()
        loss = total / num_counted(labels, items.sum() if num_items is None else num_items, self.training)
        return MaskedLMOutput(loss=loss.float(), logits=logits)

    def _masked_for_scoring(self, text: MaskedText, labels: torch.Tensor) -> tuple[MaskedText, torch.Tensor, torch.Tensor]:
        """A text that hides what its labels ask for, which tokens count, and which could have; bool, `[N, S]`."""
        labelled, given = (labels != IGNORED) & text.attended, text.holds(self.mask_token_id)
        whole = ~given.any(1, keepdim=True)
        # By content: what is scored again meets the same masks, and other texts meet others, in batches of one, too.
        tokens, attended = text.input_ids.cpu(), text.attended.cpu()
        keys = [zlib.crc32(row[of].numpy().tobytes()) for row, of in zip(tokens, attended)]
        generators = keyed_generators([self.config.inference_seed], keys)
        most = labelled.sum(1)
        drawn = draw_masked(draw_counts(torch.ones_like(most), most, generators), labelled, generators) & whole
        return text.masked(drawn, self.mask_token_id), drawn | (given & labelled), labelled

    def answers(self, text: MaskedText) -> Iterator[tuple[Block, torch.Tensor, torch.Tensor]]:
        """The blocks that own some of N texts, the numbers of these, and what they are read out from, `[rows, S, D]`."""
        owners = self.noise_schedule.block_of(text.holds(self.mask_token_id).sum(1), text.attended.sum(1)).cpu()
        for k in owners.unique().tolist():
            rows = (owners == k).nonzero()[:, 0].to(text.input_ids.device)
            yield self.blocks[k], rows, self.read(self.blocks[k], text.rows(rows))

    def sums_of_rows(self, block: Block, hidden: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """`-ln p` of each text's masked tokens, summed: `[N]` float64, of hidden states `[N, S, D]`. In chunks."""
        where = masked.nonzero(as_tuple=True)
        row_of, hidden, targets = where[0], hidden[where], labels[where]
        sums = torch.zeros(len(masked), dtype=torch.float64, device=masked.device)
        for part in chunks(len(targets), self.config.vocab_size, targets.device):
            losses = F.cross_entropy(self.logits(block, hidden[part]).float(), targets[part], reduction="none")
            sums = sums.index_add(0, row_of[part], losses.double())
        return sums

    likelihood_terms = likelihood_terms  #: what `nll_bound` sums up


def _with_mean_row(table: torch.Tensor) -> torch.Tensor:
    """`[V, ...]` -> `[V + 1, ...]`."""
    return torch.cat([table, table.float().mean(0, keepdim=True).to(table.dtype)])
