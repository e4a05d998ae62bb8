"""Evaluate a masked diffusion model of text on tasks of EleutherAI's lm-evaluation-harness.

    python recipes/evaluate_masked_lm.py --model outputs/masked_chat --tasks arc_easy hellaswag --limit 200

`--help` lists every option; a YAML file sets any of them (`--config FILE.yaml`), and the command line overrides it. In code:
`lm_eval.simple_evaluate(model=MaskedDiffusionLM(folder), tasks=[...])`.

The likelihood of an answer is its bound: -(L / l) times the nats of l of its L tokens that are masked, over several l,
stratified. Which ones is a function of the seed and of the text alone, not of what else is in the batch. An answer of one
token has its exact likelihood.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForMaskedLM

import hf_diffusionblocks as db
from hf_diffusionblocks.cli.arguments import parse
from hf_diffusionblocks.diffusion.objectives import IGNORED
from hf_diffusionblocks.diffusion.randomness import draw, keyed_generators
from hf_diffusionblocks.extras import from_extra
from hf_diffusionblocks.models.masked_lm.bound import ScoredTexts
from hf_diffusionblocks.processors import load_tokenizer
from hf_diffusionblocks.recipes import common, text
from hf_diffusionblocks.recipes.common import option
from hf_diffusionblocks.streaming.checks import check_device
from hf_diffusionblocks.whole_numbers import check_whole

with from_extra("lm-eval", "evaluation on tasks", "lm-eval"):
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

PROG = "evaluate_masked_lm.py"
LEAST = {"num_samples": 1, "batch_size": 1, "limit": 1, "max_length": 2, "num_fewshot": 0, "seed": 0}  #: where they are given
NEW_TOKENS = 256  #: where a task does not say how many it writes


class MaskedDiffusionLM(TemplateLM):
    """A saved masked model, as lm-evaluation-harness asks it.

    Args:
        model: folder or hub id, with its tokenizer.
        num_samples: counts of masked tokens that an answer's likelihood is estimated from.
        batch_size: texts at a time.
        max_length: tokens that are looked at; what is before them is cut off. None: as many as the model has positions for.
        seed: of masks and of what is written.
        device: None is the accelerator.
    """

    def __init__(
        self, model: str, num_samples: int = 32, batch_size: int = 8, max_length: int | None = None, seed: int = 0,
        device: str | torch.device | None = None,
    ):  # fmt: skip
        super().__init__()
        self.tokenizer, self.model = load_tokenizer(model), AutoModelForMaskedLM.from_pretrained(model).eval()
        if not isinstance(self.model, db.DiffusionBlocksForMaskedLM):
            raise ValueError(f"model={model!r} must be a DiffusionBlocks model that fills masks: convert() makes one")
        self._device = check_device(device)
        self.model.to(self._device)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        if max_length is not None:
            text.check_length(self.model.config.source_config, max_length, "max_length")
        self.max_length = max_length or getattr(self.model.config, "max_position_embeddings", None) or 2048

    @property
    def eot_token_id(self) -> int:
        return text.end_token_id(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return text.opened(string, self.tokenizer, with_special_tokens=add_special_tokens is not False)

    # ---- likelihood

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitted(context, answer) for _, context, answer in requests]
        order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
        found: list = [None] * len(pairs)
        for start in tqdm(range(0, len(order), self.batch_size), disable=disable_tqdm, desc="likelihood"):
            chosen = order[start : start + self.batch_size]
            batch = self._batch([pairs[index] for index in chosen])
            for index, each, greedy in zip(chosen, self._nats(batch).tolist(), self._is_greedy(batch).tolist()):
                found[index] = (-each, greedy)
        return found

    def _fitted(self, context: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """The end of a text that is too long."""
        answer = answer[-self.max_length :]
        return context[max(0, len(context) + len(answer) - self.max_length) :], answer

    def _batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        longest, mask = max(len(context) + len(answer) for context, answer in pairs), self.model.mask_token_id
        rows, labels, attended = [], [], []
        for context, answer in pairs:
            tokens, padding = context + answer, longest - len(context) - len(answer)
            rows.append(tokens + [mask] * padding)
            labels.append([IGNORED] * len(context) + answer + [IGNORED] * padding)
            attended.append([1] * len(tokens) + [0] * padding)
        named = {"input_ids": rows, "labels": labels, "attention_mask": attended}
        return {name: torch.tensor(of, device=self._device) for name, of in named.items()}

    @torch.no_grad()
    def _nats(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The bound of each answer, `[N]`."""
        tokens, attended = batch["input_ids"].cpu(), batch["attention_mask"].bool().cpu()
        keys, total = [zlib.crc32(row[of].numpy().tobytes()) for row, of in zip(tokens, attended)], 0.0
        scored = ScoredTexts.of(self.model, batch)
        for sample in range(self.num_samples):  # (each from a key of its own: how much a batch is padded does not tell)
            generators = keyed_generators([self.seed, sample], keys)
            uniform = draw(torch.rand, (len(keys),), generators, dtype=torch.float64)
            share = (sample + uniform) / self.num_samples
            total += scored.sampled_bound(self.model, share, generators) / self.num_samples
        return total

    @torch.no_grad()
    def _is_greedy(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Whether the answers are what the model fills in, the surest token first; bool, `[N]`."""
        answers, attended = batch["labels"], batch["attention_mask"]
        texts = batch["input_ids"].masked_fill(answers != IGNORED, self.model.mask_token_id)
        greedy = torch.ones(len(texts), dtype=torch.bool, device=self._device)
        while True:
            masked = (texts == self.model.mask_token_id) & attended.bool() & greedy[:, None]
            asked = masked.any(1).nonzero()[:, 0]
            if not len(asked):
                return greedy
            logits = self.model(input_ids=texts[asked], attention_mask=attended[asked]).logits.float()
            surest, tokens = logits.softmax(-1).max(-1)
            place = surest.masked_fill(~masked[asked], -1).argmax(1)
            made = tokens.gather(1, place[:, None])[:, 0]
            greedy[asked] = made == answers[asked, place]
            texts[asked, place] = made

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in parts of `max_length` tokens, each by itself."""
        parts = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            parts += [(number, tokens[at : at + self.max_length]) for at in range(0, len(tokens), self.max_length)]
        values, totals = (
            self._loglikelihood_tokens([(None, [], part) for _, part in parts], disable_tqdm),
            [0.0] * len(requests),
        )
        for (number, _), (value, _) in zip(parts, values):
            totals[number] += value
        return totals

    # ---- writing

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Until the first of the texts that a task says, in steps of a token; drawn where it asks for that."""
        written = []
        for request in tqdm(requests, disable=disable_tqdm, desc="writing"):
            prompt, options = request.args
            new = options.get("max_gen_toks") or options.get("max_new_tokens") or NEW_TOKENS
            tokens = self.tok_encode(prompt)[-max(1, self.max_length - new) :]
            temperature = float(options.get("temperature") or 0) if options.get("do_sample") else 0.0
            made = self.model.generate(
                torch.tensor([tokens], device=self._device), max_new_tokens=min(new, self.max_length - len(tokens)),
                eos_token_id=self.eot_token_id, temperature=temperature, remasking="low_confidence",
                generator=torch.Generator().manual_seed(self.seed),
            )  # fmt: skip
            answer = self.tokenizer.decode(made[0, len(tokens) :], skip_special_tokens=True)
            until = options.get("until") or []
            for end in [until] if isinstance(until, str) else until:
                answer = answer.split(end)[0] if end else answer
            written.append(answer)
        return written


@dataclass
class Arguments:
    """What is evaluated on what."""

    model: str = field(metadata={"help": "Hub id or folder of a masked DiffusionBlocks model, with its tokenizer."})
    tasks: list[str] = field(metadata={"help": "Names of tasks, as lm_eval has them."})
    include_path: str | None = option(None, "Folder of tasks of your own (YAML files of lm_eval).")
    limit: int | None = option(None, "Look at the first so many rows of each task only.")
    num_fewshot: int | None = option(None, "Examples before each question. Not given: as the task says.")
    num_samples: int = option(32, "Counts of masked tokens that an answer's likelihood is estimated from, stratified.")
    batch_size: int = option(8, "Texts at a time.")
    max_length: int | None = option(None, "Tokens that are looked at. Not given: as many as the model has positions for.")
    apply_chat_template: bool = option(False, "Ask as in a chat, by the tokenizer's template.")
    seed: int = option(0, "Of masks and of what is written.")
    device: str | None = option(None, "Where it runs. Not given: the accelerator.")
    output: str | None = option(None, "JSON file for the results.")


def evaluate(args: Arguments) -> dict:
    """The results of lm_eval.

    Raises:
        ValueError: there is no such task, or an option is out of range.
    """
    for name, least in LEAST.items():
        if getattr(args, name) is not None:
            check_whole(name, getattr(args, name), least)
    if args.output:  # (what is in the way of it is to be known before hours of work)
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).open("a").close()
    manager = TaskManager(include_path=args.include_path)
    if missing := [task for task in args.tasks if not manager.match_tasks([task])]:
        raise ValueError(f"tasks={missing} must be names that lm_eval knows (`lm_eval ls tasks` lists them)")
    model = MaskedDiffusionLM(args.model, args.num_samples, args.batch_size, args.max_length, args.seed, args.device)
    return simple_evaluate(
        model=model, tasks=args.tasks, task_manager=manager, limit=args.limit, num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template, random_seed=args.seed, numpy_random_seed=args.seed,
        torch_random_seed=args.seed, fewshot_random_seed=args.seed, bootstrap_iters=0,
    )  # fmt: skip


def main(args: Sequence[str] | None = None) -> dict:
    """Run the recipe with a command line (None: `sys.argv[1:]`); bad input exits with one line on standard error."""
    (arguments,) = parse((Arguments,), args, prog=PROG, description=__doc__.splitlines()[0])
    try:
        found = evaluate(arguments)
    except common.BAD_INPUT as error:
        sys.exit(f"{PROG}: error: {' '.join(str(error).split())}")
    print(make_table(found))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(found["results"], indent=1))
    return found["results"]


if __name__ == "__main__":
    main()
