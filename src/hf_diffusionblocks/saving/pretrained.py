"""Models to and from disk: block files, whole or partly loaded; and to the stock model inside."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from transformers import PreTrainedModel

from . import cards, resident, shards
from .checks import check_no_adapter_folder, check_no_adapters, check_weights, is_untied
from .shards import Provenance


class SavedByBlock(PreTrainedModel):
    """The part of every DiffusionBlocks model that saves and loads it."""

    #: Which blocks the last run of training moved, and on what: written beside the weights, for `merge_blocks`
    provenance: Provenance | None = None

    def to_plain(self) -> PreTrainedModel:
        """A copy of the stock HF model inside, with the trained weights: it gives the same logits.

        Raises:
            ValueError: the formulation is not the stock model's function, blocks are missing, weights are quantised, or there
                are adapters.
        """
        if not self.computes_plain_model:
            raise ValueError(
                f"to_plain() cannot be had with preset={self.config.preset!r} for task {self.task!r}: no stock model computes "
                "what its blocks do"
            )
        if len(self.resident_blocks) < self.num_blocks:
            raise ValueError(f"to_plain() needs all {self.num_blocks} blocks: resident_blocks={self.resident_blocks}")
        check_no_adapters(self, "model")
        check_weights(self, "the stock model would have its codes without their scales")
        config = copy.deepcopy(self.config.source_config)
        if is_untied(self.backbone):
            config.tie_word_embeddings = False
        config.id2label, config.label2id = dict(self.config.id2label), dict(self.config.label2id)
        config.problem_type = self.config.problem_type
        plain = self.architecture.plain_class._from_config(config, dtype=self.dtype)
        plain.load_state_dict(self.backbone.state_dict())
        if plain.can_generate() and self.can_generate():
            plain.generation_config = copy.deepcopy(self.generation_config)
        return plain.to(next(self.backbone.parameters()).device).train(self.training)  # (of a streamed one, host memory)

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """As in Transformers, with one safetensors file for the shared parameters and one a block, and a model card.

        All files are written aside first: an interrupted save leaves what was there before. `max_shard_size` has
        no effect, since a block is a file. Of a model with adapters (`add_adapter`, `load_adapter`) they alone are saved, as
        in Transformers.

        Raises:
            ValueError: a `variant` is given; weights are quantised; adapters are a PeftModel's, which saves them itself; names
                of `state_dict` are others; or blocks are missing, and the folder holds some of these.
        """
        if kwargs.get("variant") is not None:
            raise ValueError(f"variant={kwargs['variant']!r} is not supported: shards are named by block")
        if self._hf_peft_config_loaded:
            return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        check_no_adapters(self, "model")
        check_weights(self, "a saved file would lack what these need")
        if state_dict is not None:
            self._check_names(state_dict)
        hub_kwargs = {key: kwargs.pop(key) for key in shards.HUB_KWARGS if key in kwargs}
        if self.sharing.own_modules and self._holds_ties():
            self.config.tie_word_embeddings = True  # (PEFT's merge compares ends of different blocks, and says False)
        if is_main_process:
            if len(self.resident_blocks) < self.num_blocks:
                shards.check_overwrite(Path(save_directory), self.resident_blocks)
            with shards.atomic_save(Path(save_directory)) as staging:
                # Current parameter names, not HF's older ones: block files and Trainer resume go by them.
                kwargs |= {"max_shard_size": "1000TB", "save_original_format": False}
                super().save_pretrained(staging, state_dict=state_dict, **kwargs)
                shards.split_by_block(staging, self.block_of_parameter, self.num_blocks, self.provenance)
                cards.write(self, staging, keep_from=Path(save_directory))
        if push_to_hub:
            self.push_to_hub(hub_kwargs.pop("repo_id", Path(save_directory).name), **hub_kwargs)

    def _holds_ties(self) -> bool:
        """Whether a head is its block's token embedding, which then is saved once."""
        return any(self.get_parameter(head) is self.get_parameter(of) for head, of in self.all_tied_weights_keys.items())

    def _check_names(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError if these are not this model's weights, by their names: nothing would read them."""
        expected = self.state_dict().keys()
        if state_dict.keys() - expected or expected - state_dict.keys() - self.all_tied_weights_keys.keys():
            odd = min(state_dict.keys() ^ expected)
            raise ValueError(
                f"state_dict must have the model's own names, and {odd!r} is in one of them alone: of a compiled model, give "
                "model._orig_mod.state_dict()"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, resident_blocks: Sequence[int] | None = None, **kwargs):
        """As in Transformers; a local folder is checked first, so that a damaged shard is named.

        Args:
            resident_blocks: the blocks to load, for a job that trains these; no other block's file is read or
                downloaded, and `kwargs` can be those of the Hub, `config`, `dtype` and `attn_implementation`.

        Raises:
            OSError: a shard is missing or truncated, or the index damaged; names it.
            ValueError: not all blocks are there, and `resident_blocks` names none or others; or the files were cut into
                other blocks than the config says.
        """
        if pretrained_model_name_or_path is not None and Path(pretrained_model_name_or_path).is_dir():
            folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            check_no_adapter_folder(folder)
            if shards.finish_interrupted_save(folder):
                kwargs.pop("config", None)  # was read before the save was finished
            shards.check_shards(folder)
        if resident_blocks is not None:
            return resident.load(cls, pretrained_model_name_or_path, resident_blocks, **kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if pretrained_model_name_or_path is not None:
            index = shards.saved_index(pretrained_model_name_or_path, **resident.hub_kwargs(kwargs))
            resident.check_cut(model, pretrained_model_name_or_path, index)
            resident.check_whole(model, pretrained_model_name_or_path, index)
            if index.files:  # (new ones of a plain model start fresh)
                resident.check_complete(pretrained_model_name_or_path, info["missing_keys"], index)
            model.provenance = index.provenance
        shards.align(model)
        return (model, info) if wants_info else model

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # push_to_hub has just put the hub's card, or a generic one, over ours.
        cards.write(self, Path(working_dir), keep_from=Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)
