"""The one grid of tests: every family of models in every formulation, tiny, with rows to train it on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import point_family
import torch
from conftest import FORMULATIONS, randomized
from datasets import Dataset
from process_scenarios import DIT, VIT
from transformers import BertConfig, GPT2Config, LlamaConfig, ModernBertConfig, Qwen3Config, ResNetConfig, SwinConfig
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.models.base import Formulation
from hf_diffusionblocks.recurrent_depth_llama import RecurrentDepthLlamaConfig
from hf_diffusionblocks.tasks import TASKS, Task, backbone_for, task_of

point_family.register()

VOCAB, WIDTH = 48, 32
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
LLAMA = dict(
    num_hidden_layers=4, hidden_size=WIDTH, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCAB, max_position_embeddings=32, **ENDS,
)  # fmt: skip
TEXT_CONFIGS = {
    "gpt2": GPT2Config(
        n_layer=4, n_embd=WIDTH, n_head=4, vocab_size=VOCAB, n_positions=32, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        **ENDS,
    ),
    "llama": LlamaConfig(**LLAMA),
    "qwen3": Qwen3Config(head_dim=8, **LLAMA),
}  # fmt: skip
#: Prelude and coda of one layer, a core of two.
RECURRENT = RecurrentDepthLlamaConfig(
    num_prelude_layers=1, num_core_layers=2, num_coda_layers=1, mean_recurrence=4,
    **{name: value for name, value in LLAMA.items() if name != "num_hidden_layers"},
)  # fmt: skip
BERT = BertConfig(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
    max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
MODERNBERT = ModernBertConfig(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
    local_attention=4, max_position_embeddings=32, pad_token_id=0, cls_token_id=1, sep_token_id=1, bos_token_id=1,
    eos_token_id=1,
)  # fmt: skip
#: Of stages: maps of several sizes, with batch norms; and tokens whose stages return several things.
RESNET = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1], layer_type="basic", num_labels=5, image_size=16
)  # fmt: skip
SWIN = SwinConfig(
    image_size=16, patch_size=1, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=2, num_labels=5,
    drop_path_rate=0.0,
)  # fmt: skip
PAPER_TEXT = {name: fields for name, fields in FORMULATIONS.items() if fields.get("preset") == "paper"}
LOCAL_TEXT = {name: fields for name, fields in FORMULATIONS.items() if name not in PAPER_TEXT}
TEXT_FORMULATIONS = FORMULATIONS


CLASSES = {"task": "text-classification"}


@dataclass
class Case:
    """A tiny model and its formulation."""

    config: object
    fields: dict = field(default_factory=dict)
    trained: bool = True  #: whether claims that train it (slow) are checked on it

    @property
    def task(self) -> Task:
        return task_of(self.config, self.fields.get("task"))

    @property
    def blocks(self) -> range:
        """Two, where the architecture can be cut."""
        return range(backbone_for(self.config).fixed_fields.get("num_blocks", 2))

    @property
    def last_block(self) -> int:
        return self.blocks[-1]

    @property
    def length(self) -> int | None:
        return 12 if self.task.takes_sequence_length else None

    @property
    def formulation(self) -> type[Formulation]:
        preset = backbone_for(self.config).fixed_fields.get("preset", self.fields.get("preset", "recommended"))
        return self.task.model_class.FORMULATIONS[preset]

    @property
    def is_local(self) -> bool:
        """Whether blocks start from what the blocks before them made of x: recommended, of next tokens and classes."""
        return self.formulation.passes_on

    @property
    def runs_stock(self) -> bool:
        """Whether the stock model's own forward runs a block."""
        return self.formulation.runs_stock

    @property
    def is_own(self) -> bool:
        return self.fields.get("shared") == "per_block"

    @property
    def gives_logits(self) -> bool:
        return self.task.name not in ("image-generation", "image-denoising")

    @property
    def has_known_targets(self) -> bool:
        """Whether the target is one of many known vectors, a label's or a token's, and z a noisy one."""
        return self.task.name in ("image-classification", "text-classification", "text-generation")

    def rows(self, count: int = 4) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.task.example(self.config, count, self.length)

    def inputs(self, count: int = 4) -> dict[str, torch.Tensor]:
        """Rows without labels."""
        return {name: tensor for name, tensor in self.rows(count).items() if name != "labels"}

    def dataset(self) -> Dataset:
        return Dataset.from_dict({name: tensor.tolist() for name, tensor in self.rows(16).items()})

    def plain(self):
        torch.manual_seed(0)
        return randomized(backbone_for(self.config, self.task.name).make_plain(self.config)).eval()

    def model(self, **fields):
        """Cut into its blocks, every parameter away from its start."""
        torch.manual_seed(0)
        fields = {"num_blocks": len(self.blocks), **self.fields, **fields}
        return randomized(db.convert(self.config, **fields))

    def with_dropout(self, rate: float) -> Case:
        config = copy.deepcopy(self.config)
        for name in ("resid_pdrop", "embd_pdrop", "hidden_dropout_prob"):
            if hasattr(config, name):
                setattr(config, name, rate)
        return Case(config, self.fields)


#: A formulation of text is trained in one architecture.
TRAINED = dict(zip(TEXT_FORMULATIONS, [*TEXT_CONFIGS] * 2))
CASES = {
    **{f"vit, {name}": Case(VIT, fields) for name, fields in FORMULATIONS.items()},
    **{
        f"{family}, {name}": Case(config, fields, TRAINED[name] == family)
        for family, config in TEXT_CONFIGS.items()
        for name, fields in TEXT_FORMULATIONS.items()
    },
    "swin": Case(SWIN),
    "resnet, own": Case(RESNET, {"shared": "per_block"}),
    "recurrent": Case(RECURRENT),
    "recurrent, own": Case(RECURRENT, {"shared": "per_block"}, trained=False),
    "dit": Case(DIT, {"shared": "common"}),
    "dit, own": Case(DIT, {"shared": "per_block"}),
    "bert": Case(BERT),
    "bert, own": Case(BERT, {"shared": "per_block"}, trained=False),
    "modernbert, own": Case(MODERNBERT, {"shared": "per_block"}, trained=False),
    "llama, masked": Case(TEXT_CONFIGS["llama"], {"task": "fill-mask"}),
    "gpt2, masked": Case(TEXT_CONFIGS["gpt2"], {"task": "fill-mask"}, trained=False),
    "bert, classes": Case(BertConfig(**{**BERT.to_dict(), "num_labels": 5}), CLASSES),
    "llama, classes": Case(LlamaConfig(**LLAMA, pad_token_id=0, num_labels=5), {**CLASSES, "local_head_layers": 1}),
    "llama, classes, paper": Case(LlamaConfig(**LLAMA, num_labels=5), {**CLASSES, "preset": "paper"}),
    "gpt2, classes, paper, own": Case(
        GPT2Config(**{**TEXT_CONFIGS["gpt2"].to_dict(), "num_labels": 5}),
        {**CLASSES, "preset": "paper", "shared": "per_block"},
        trained=False,
    ),
    "modernbert, classes, own": Case(
        ModernBertConfig(**{**MODERNBERT.to_dict(), "num_labels": 5}), {**CLASSES, "shared": "per_block"}, trained=False
    ),
    "point": Case(point_family.TinyConfig()),
    "point, own": Case(point_family.TinyConfig(), {"shared": "per_block"}, trained=False),
}


def grid(chosen: Callable[[Case], bool] = lambda case: True) -> dict:
    """Arguments of `pytest.mark.parametrize`: the cases that a claim is about."""
    cases = {name: case for name, case in CASES.items() if chosen(case)}
    return {"argnames": "case", "argvalues": cases.values(), "ids": cases.keys()}


def grid_of_blocks(chosen: Callable[[Case], bool] = lambda case: True) -> dict:
    """The same, with each block of each case as `block_index`."""
    pairs = {f"{name}-{k}": (case, k) for name, case in CASES.items() if chosen(case) for k in case.blocks}
    return {"argnames": ("case", "block_index"), "argvalues": pairs.values(), "ids": pairs.keys()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def three_texts(length: int) -> torch.Tensor:
    """Tokens `[3, S]`, always the same."""
    return torch.randint(1, VOCAB, (3, length), generator=seeded(1))


def draws_of_texts(length: int, sigma: float = 0.3) -> dict[str, torch.Tensor]:
    """A level and fixed noise for the paper's text of these."""
    return {"sigma": torch.full((3,), sigma), "noise": torch.randn(3, length - 1, WIDTH, generator=seeded(2))}


@contextmanager
def watching(layer: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """What enters a layer, each time that it runs: what the first of its parts that runs is given."""
    seen, entered = [], []

    def note(part, args) -> None:
        seen.append(part)
        if part is seen[0]:
            entered.append(args[0].detach().clone())

    parts = [part for part in layer.modules() if not list(part.children())]
    hooks = [part.register_forward_pre_hook(note) for part in parts]
    yield entered
    for hook in hooks:
        hook.remove()


def estimate_of(output) -> torch.Tensor:
    """What a block says of its target: logits, or a point."""
    return output.logits if "logits" in output else output.estimate


def labelled(labels: torch.Tensor) -> torch.Tensor:
    """The labels that logits are of: text's are of the next token."""
    return labels[:, 1:] if labels.dim() == 2 else labels


def trainer_of(model, case: Case, folder, callbacks=None, **arguments) -> db.DiffusionBlocksTrainer:
    logging.set_verbosity_error()
    arguments = {"learning_rate": 1e-2, "save_strategy": "no", **arguments}
    if "max_steps" not in arguments:
        arguments.setdefault("updates_per_block", 3)
    args = db.DiffusionBlocksTrainingArguments(
        str(folder), per_device_train_batch_size=4, per_device_eval_batch_size=16, weight_decay=0.1, report_to=[], use_cpu=True,
        disable_tqdm=True, **arguments,
    )  # fmt: skip
    data = case.dataset()
    return db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def moved(model, before: dict) -> set[str]:
    """Names of the parameters that are not what they were."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def reloaded(model, folder, **kwargs):
    return TASKS[model.task].auto_class.from_pretrained(folder, **kwargs)
