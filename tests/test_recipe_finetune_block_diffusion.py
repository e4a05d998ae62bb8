"""The recipe that tunes block diffusion: its loss, what is learned of an answer, the model's own sampler."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from recipe_runs import CANVAS, block_diffusion_config, files, model, prepared, writer
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion, TrainingArguments

from hf_diffusionblocks.recipes import finetune_block_diffusion
from hf_diffusionblocks.recipes.finetune_block_diffusion import CanvasTrainer, Collate, canvas_loss, noised, shares_of

pytestmark = pytest.mark.usefixtures("own_cache")
END = 0
QUIET = ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none"]
TRAINING = [
    *QUIET, "--max_steps", "3", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--max_length", "96",
    "--save_strategy", "no", "--samples", "0",
]  # fmt: skip


@pytest.fixture
def trainers(monkeypatch) -> list:
    return prepared(finetune_block_diffusion, monkeypatch)


def tune(output_dir, *options: str) -> dict[str, float]:
    return finetune_block_diffusion.main([*TRAINING, *options, "--output_dir", str(output_dir)])


# ---- the loss


def test_what_noise_leaves_of_a_text_is_as_by_enumeration():
    """Two tokens of three, "01" or "22": which it was, given a canvas, with any share of noise as likely as any other."""
    torch.manual_seed(0)
    texts, probabilities, rows = torch.tensor([[0, 1], [2, 2]]), torch.tensor([0.75, 0.25]), 400_000
    which = (torch.rand(rows) < probabilities[1]).long()
    canvases = noised(texts[which], shares_of(rows, torch.device("cpu")), 3)
    shares = (torch.arange(1000) + 0.5) / 1000
    for canvas in product(range(3), repeat=2):
        found = (canvases == torch.tensor(canvas)).all(1)
        kept = (texts == torch.tensor(canvas))[..., None] * (1 - shares) + shares / 3  # text, position, share
        joint = probabilities * kept.prod(1).mean(1)
        assert found.float().mean() == pytest.approx(joint.sum().item(), abs=0.003)
        assert which[found].float().mean() == pytest.approx((joint[1] / joint.sum()).item(), abs=0.01)


def test_a_canvas_of_noise_alone_tells_nothing_of_the_answer_and_one_without_noise_all():
    one, other = torch.zeros(64, 4, dtype=torch.long), torch.ones(64, 4, dtype=torch.long)
    for share, equal in ((1.0, True), (0.9, False)):
        made = []
        for tokens in (one, other):
            torch.manual_seed(0)
            made.append(noised(tokens, torch.full((64,), share), 16))
        assert torch.equal(*made) == equal
    assert torch.equal(noised(other, torch.zeros(64), 16), other)


def test_shares_of_a_batch_are_spread_evenly():
    shares = shares_of(8, torch.device("cpu")).sort().values
    torch.testing.assert_close(shares.diff(), torch.full((7,), 1 / 8))
    assert 0 <= shares[0] and shares[-1] < 1


def test_the_loss_is_cross_entropy_of_all_tokens_of_the_step():
    logits, labels = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    outputs = SimpleNamespace(logits=logits)
    expected = cross_entropy(logits.reshape(-1, 5), labels.reshape(-1))
    torch.testing.assert_close(canvas_loss(outputs, labels), expected)
    torch.testing.assert_close(canvas_loss(outputs, labels, num_items_in_batch=24), expected / 2)


def test_the_model_s_own_sampler_writes_what_was_learned(tmp_path):
    """Two prompts, of different lengths, an answer each; before it has learned, it writes others."""
    torch.manual_seed(0)
    tuned = DiffusionGemmaForBlockDiffusion(block_diffusion_config(16, 4))
    prompts, written = [[2], [5, 5, 2]], [[3, 4, 5, 6], [7, 8, 9, 10]]
    rows = [{"input_ids": prompt, "labels": answer} for prompt, answer in zip(prompts, written)] * 16
    asked = Collate(END)(rows[:2])

    def answered() -> list:
        torch.manual_seed(1)
        made = tuned.eval().generate(asked["input_ids"], attention_mask=asked["attention_mask"], max_new_tokens=4)
        return made.sequences[:, 3:].tolist()

    assert answered() != written
    args = TrainingArguments(
        str(tmp_path), max_steps=80, per_device_train_batch_size=32, learning_rate=1e-2, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_strategy="no", save_strategy="no", label_names=["labels"], remove_unused_columns=False,
    )  # fmt: skip
    CanvasTrainer(tuned, args, Collate(END), rows).train()
    assert answered() == written


def test_processes_which_have_one_seed_draw_noise_of_their_own(tmp_path, monkeypatch):
    tuned, canvases = DiffusionGemmaForBlockDiffusion(block_diffusion_config(16, 4)), []
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], label_names=["labels"])
    trainer = CanvasTrainer(tuned, args, Collate(END))
    tuned.register_forward_pre_hook(lambda _, args, given: canvases.append(given["decoder_input_ids"]), with_kwargs=True)
    batch = Collate(END)([{"input_ids": [2], "labels": [3, 4, 5, 6]}] * 8)
    for process in (0, 0, 1):
        monkeypatch.setattr(TrainingArguments, "process_index", process)
        torch.manual_seed(0)
        trainer.compute_loss(tuned, batch)
    first, again, other = canvases[::2]  # (two passes each)
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- the recipe


def test_each_canvas_of_an_answer_is_a_row_after_all_that_was_before(tmp_path, files, writer, trainers):
    tune(tmp_path, "--model", writer, "--data", files["prompts"])
    rows, tokenizer = list(trainers[0].train_dataset), AutoTokenizer.from_pretrained(writer)
    goes_on = [row["input_ids"] == before["input_ids"] + before["labels"] for before, row in zip(rows, rows[1:])]
    firsts = [row for row, is_next in zip(rows, [False, *goes_on]) if not is_next]
    assert len(firsts) == 24 and 24 < len(rows) and all(len(row["labels"]) == CANVAS for row in rows)
    assert all(tokenizer.decode(row["input_ids"]).endswith(": ") for row in firsts)
    lasts = [row["labels"] for row, is_next in zip(rows, [*goes_on, False]) if not is_next]
    assert all(END in labels and set(labels[labels.index(END) :]) == {END} for labels in lasts)


def test_what_is_before_a_canvas_is_padded_on_its_left():
    batch = Collate(9)([{"input_ids": [1], "labels": [2, 3]}, {"input_ids": [4, 5, 6], "labels": [7, 8]}])
    assert batch["input_ids"].tolist() == [[9, 9, 1], [4, 5, 6]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch["decoder_attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_padding_changes_no_logits(writer):
    loaded = DiffusionGemmaForBlockDiffusion.from_pretrained(writer).eval()
    rows = [{"input_ids": [11, 12, 13], "labels": [5] * CANVAS}, {"input_ids": [7] * 6, "labels": [5] * CANVAS}]
    for batch in (Collate(3)(rows), Collate(4)(rows)):
        logits = loaded(**{**batch, "labels": None}, decoder_input_ids=torch.full((2, CANVAS), 5)).logits
        alone = loaded(input_ids=torch.tensor([[11, 12, 13]]), decoder_input_ids=torch.full((1, CANVAS), 5)).logits
        torch.testing.assert_close(logits[:1], alone, rtol=1e-4, atol=1e-4)


def test_what_is_saved_loads_and_answers(tmp_path, files, writer, trainers, capsys):
    """And evaluation draws the same noise each time."""
    metrics = tune(tmp_path, "--model", writer, "--data", files["prompts"], "--eval_data", files["prompts"], "--samples", "1")
    assert " -> " in capsys.readouterr().out and metrics["eval_loss"] == trainers[0].evaluate()["eval_loss"] > 0
    made, tokenizer = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompt = torch.tensor([tokenizer("A prompt")["input_ids"]])
    assert made.generate(prompt, max_new_tokens=2 * CANVAS).sequences.shape[1] > prompt.shape[1]
