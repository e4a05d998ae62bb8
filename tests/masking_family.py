"""A family that is not in the library: masked language models, whose z is the input itself."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert.modeling_bert import BertLayer

from hf_diffusionblocks.backbones.base import Backbone, register_backbone
from hf_diffusionblocks.configuration import DiffusionBlocksConfig
from hf_diffusionblocks.diffusion.randomness import draw
from hf_diffusionblocks.models.base import Clean, DiffusionBlocksPreTrainedModel
from hf_diffusionblocks.tasks import Task, register_task

MASK = 3


class MaskSchedule:
    """Levels are the share of masked tokens; block 0 has the most."""

    level_name = "share of masked tokens"

    def __init__(self, num_blocks: int, overlap: float):
        self.num_blocks, self.overlap = num_blocks, overlap

    def interval(self, block_index: int, overlap: float = 0.0) -> tuple[float, float]:
        low = self.num_blocks - 1 - block_index
        return max(low - overlap, 0) / self.num_blocks, min(low + 1 + overlap, self.num_blocks) / self.num_blocks

    def block_of(self, masked: torch.Tensor, total: int) -> torch.Tensor:
        return (self.num_blocks - -(-masked * self.num_blocks // total)).clamp(0, self.num_blocks - 1)


class BertBackbone(Backbone):
    model_type = "bert"
    plain_class = BertForMaskedLM
    layers_path = "bert.encoder.layer"
    embedding_paths = ("bert.embeddings",)
    readout_paths = ("cls",)
    lora_targets = ("query", "value")

    def num_logits(self, config):
        return config.vocab_size

    def make_layer(self, config: BertConfig) -> BertLayer:
        return BertLayer(config)

    def embed(self, plain: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
        return plain.bert.embeddings(input_ids=input_ids)

    def run_layer(self, layer: BertLayer, hidden: torch.Tensor, modulation: None, attention_mask) -> torch.Tensor:
        return layer(hidden, attention_mask)

    def read_out(self, plain: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        logits = plain.cls(hidden)
        return logits.index_fill(-1, torch.tensor(MASK, device=logits.device), -torch.inf)


class WholeInput:
    """z is what the network reads."""

    modulated = False
    embeds_noisy = False

    def __init__(self, model: DiffusionBlocksPreTrainedModel):
        self.model = model


class MaskedLM(DiffusionBlocksPreTrainedModel):
    main_input_name = "input_ids"
    task = "fill-mask"
    DENOISERS, default_overlap = {"joint": WholeInput}, 0.1

    def __init__(self, config: DiffusionBlocksConfig):
        super().__init__(config)
        self.post_init()

    @classmethod
    def schedule_for(cls, config: DiffusionBlocksConfig) -> MaskSchedule:
        return MaskSchedule(config.num_blocks, cls.default_overlap if config.overlap is None else config.overlap)

    def forward(
        self, input_ids, attention_mask=None, labels=None, block_index=None, generator=None, return_logits=None,
        block_input=None, loss_block=None,
    ) -> MaskedLMOutput:  # fmt: skip
        if block_index is None:
            return self._predict(input_ids, attention_mask, labels)
        active = self.active_blocks(block_index, loss_block)
        masked = self._masked(active.first, labels, generator)
        z = torch.where(masked, MASK, labels)
        hidden = self.training_output(active, self._seen(z, attention_mask), block_input)
        logits = self.blocks[active.reader].read_out(hidden[masked])
        weight = labels.shape[1] / masked.sum(1, keepdim=True).expand_as(labels)[masked]  # the bound's count form
        loss = (weight * F.cross_entropy(logits, labels[masked], reduction="none")).sum() / labels.numel()
        return MaskedLMOutput(loss=loss, logits=logits)

    def _masked(self, block_index: int, labels: torch.Tensor, generator) -> torch.Tensor:
        """So many tokens as the block's range of shares says, wherever they stand."""
        length = labels.shape[1]
        low, high = (length * end for end in self.blocks[block_index].interval(self.noise_schedule.overlap))
        least, most = max(1, math.floor(low + 1)), math.floor(high)
        counts = least + (draw(torch.rand, labels.shape[:1], generator) * (most - least + 1)).long()
        ranks = draw(torch.rand, labels.shape, generator).argsort(1).argsort(1)
        return ranks < counts[:, None]

    def _predict(self, input_ids, attention_mask, labels) -> MaskedLMOutput:
        """Each row by the block that owns its share of masked tokens."""
        if labels is not None:  # a clean text shows its answer: half of it is masked, the same half always
            masked = torch.rand(labels.shape, generator=torch.Generator().manual_seed(self.config.inference_seed)) < 0.5
            input_ids = torch.where(masked, MASK, labels)
        owners = self.noise_schedule.block_of((input_ids == MASK).sum(1), input_ids.shape[1])
        logits = torch.empty(*input_ids.shape, self.config.vocab_size)
        for k in owners.unique().tolist():
            rows = owners == k
            x = self._seen(input_ids[rows], None if attention_mask is None else attention_mask[rows])
            logits[rows] = self.blocks[k].read_out(self.training_output(self.active_blocks(k, None), x))
        loss = None if labels is None else F.cross_entropy(logits[masked], labels[masked])
        return MaskedLMOutput(loss=loss, logits=logits)

    def _seen(self, z: torch.Tensor, attention_mask: torch.Tensor | None) -> Clean:
        shape = torch.empty(*z.shape, 0, dtype=self.dtype, device=z.device)
        mask = create_bidirectional_mask(self.backbone.config, shape, attention_mask)
        return Clean({"input_ids": z}, {"attention_mask": mask})

    def evaluation_levels(self, block_index, num_rows):
        return {}


def example(config: BertConfig, num_rows: int, sequence_length: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(MASK + 1, config.vocab_size, (num_rows, sequence_length))
    return {"input_ids": tokens, "labels": tokens}


def register() -> None:
    register_backbone(BertBackbone())
    register_task(
        Task(
            name=MaskedLM.task, model_class=MaskedLM, auto_class=AutoModelForMaskedLM, backbones=(BertBackbone,),
            example=example, num_positions=lambda config, length: length, takes_sequence_length=True,
            plain_loss=lambda model, **batch: model(**batch).loss, processor="tokenizer", load_processor=str,
            usage='pipeline("fill-mask", model="{name}")',
        ),
        DiffusionBlocksConfig,
    )  # fmt: skip
