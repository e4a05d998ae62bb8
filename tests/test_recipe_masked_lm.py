"""The recipe of masked text: its tokenizer has a mask token, what it measures is the bound, pretrained weights are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from text_recipe_runs import LENGTH, OVERRIDES, SIZES, TRAINING, data, folder, paragraphs, sequences
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast,
    pipeline,
)  # fmt: skip

import hf_diffusionblocks as db
from refusals import refusal
from hf_diffusionblocks.cli import train as train_verb
from hf_diffusionblocks.recipes import checks, common, train_masked_lm
from hf_diffusionblocks.recipes.text import ModelArguments, Packer, trained_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")
BERT = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 24,
}  # fmt: skip
OVERRIDES = OVERRIDES | {"bert": ", ".join(f"{name}={value}" for name, value in BERT.items())}
MODEL = [*SIZES, "--config_name", "llama", "--config_overrides", OVERRIDES["llama"]]
CONFIG = Path(train_masked_lm.__file__).parent / "configs" / "gutenberg_masked.yaml"
TEST = paragraphs(120, 150)


def run(output_dir: Path, *options) -> dict[str, float]:
    return train_masked_lm.main([*map(str, options), "--output_dir", str(output_dir)])


def load(folder: Path) -> db.DiffusionBlocksForMaskedLM:
    return AutoModelForMaskedLM.from_pretrained(folder)


def saved_sequences(folder: Path) -> torch.Tensor:
    return sequences(AutoTokenizer.from_pretrained(folder), TEST)


def bound_loss(folder: Path) -> float:
    """Of a saved model, in the recipe's batches: masks are stratified over a batch."""
    model, tokens = load(folder), saved_sequences(folder)
    with torch.no_grad():
        return sum(model(part, labels=part).loss.item() * len(part) for part in tokens.split(8)) / len(tokens)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A BERT whose tokenizer has a mask token and no end token; and a GPT-2 the other way round."""
    root = tmp_path_factory.mktemp("plain")
    words = sorted({word for text in paragraphs(0, 150) for word in text.split()})
    words = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *words]
    rules = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rules.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    of_bert = PreTrainedTokenizerFast(
        tokenizer_object=rules, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        unk_token="[UNK]",
    )  # fmt: skip
    of_gpt2 = trained_tokenizer(paragraphs(0, 120), ModelArguments(vocab_size=300), is_main=True)
    gpt2 = GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=24, vocab_size=300, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    for name, model, tokenizer in (
        ("bert", BertForMaskedLM(BertConfig(vocab_size=len(words), **BERT)), of_bert),
        ("gpt2", GPT2LMHeadModel(gpt2), of_gpt2),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_fresh_model_learns_and_fills_masks(tmp_path, data, family):
    model = [*SIZES, "--config_name", family, "--config_overrides", OVERRIDES[family]]
    metrics = run(tmp_path, *TRAINING, *data, *model, "--updates_per_block", "20")
    assert metrics["eval_loss"] == pytest.approx(bound_loss(tmp_path), abs=1e-5) and metrics["eval_loss"] < 5.5
    made, tokenizer = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.mask_token == "<|mask|>" and made.mask_token_id == tokenizer.mask_token_id == 300
    assert made.config.vocab_size == len(tokenizer) == 301
    spelled = sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in saved_sequences(tmp_path))
    bits = metrics["eval_loss"] * saved_sequences(tmp_path).numel() / spelled / torch.tensor(2.0).log().item()
    assert metrics["eval_bits_per_byte"] == pytest.approx(bits, rel=0.01)  # (cut characters)
    assert len(pipeline("fill-mask", model=str(tmp_path), device="cpu")("The yield <|mask|> is")) == 5


def test_end_to_end_is_one_block_of_a_file_of_options(tmp_path, data):
    options = ["--config", CONFIG, *TRAINING, *data, *MODEL, "--end_to_end", "--eval_nll_bound", "4", "--ema_decay", "0.9"]
    metrics = run(tmp_path, *options)
    model, tokens = load(tmp_path), saved_sequences(tmp_path)[:4]
    assert model.num_blocks == 1 and model.config.training_report["updates_per_block"] == [4]
    expected = db.nll_bound(model, [{"input_ids": tokens, "labels": tokens}], seed=0)
    assert metrics["eval_nll_bound"] == pytest.approx(expected.nats_per_token, abs=1e-4)
    assert metrics["eval_nll_bound_standard_error"] == pytest.approx(expected.standard_error, abs=1e-4)
    ratio = metrics["eval_nll_bound_bits_per_byte"] / metrics["eval_nll_bound"]
    assert ratio == pytest.approx(metrics["eval_bits_per_byte"] / metrics["eval_loss"], rel=0.2)  # of other text
    in_bits = metrics["eval_nll_bound_bits_per_byte_standard_error"]
    assert in_bits == pytest.approx(ratio * metrics["eval_nll_bound_standard_error"])


@pytest.mark.parametrize("origin", ["fresh", "pretrained"])
def test_one_block_a_job_then_merged(tmp_path, data, plain, origin):
    pretrained = ["--model_name_or_path", plain / "gpt2", "--num_blocks", "2", "--sequence_length", LENGTH]
    model = MODEL if origin == "fresh" else pretrained
    jobs = [str(tmp_path / f"job{block}") for block in (0, 1)]
    for block, job in enumerate(jobs):
        run(job, *model, *TRAINING, *data, "--train_blocks", block, "--shared", "per_block")
    db.merge_blocks(jobs, tmp_path / "whole")
    whole = load(tmp_path / "whole")
    assert whole.config.training_report["updates_per_block"] == [4, 4]
    assert whole.mask_token_id == AutoTokenizer.from_pretrained(jobs[0]).mask_token_id


def test_a_job_that_could_not_be_saved_does_not_begin(tmp_path, data, capsys, monkeypatch):
    job = [*MODEL, *TRAINING, *data, "--shared", "per_block", "--output_dir", str(tmp_path), "--train_blocks"]
    train_masked_lm.main([*job, "0"])
    monkeypatch.setattr(common, "train", lambda *args: pytest.fail("it has begun"))
    assert "holds model-00002-of-00003.safetensors, which a model with resident_blocks=[1] alone would delete" in refusal(
        train_masked_lm.main, [*job, "1"], "train_masked_lm.py", capsys
    )
    monkeypatch.setattr(checks.os, "access", lambda *args, **kwargs: False)
    assert "must be a folder that can be written to" in refusal(train_masked_lm.main, [*job, "0"], "train_masked_lm.py", capsys)


def test_streamed_it_saves_the_same_weights(tmp_path, data):
    for name, options in (("held", []), ("streamed", ["--stream"])):
        run(tmp_path / name, *MODEL, *TRAINING, *data, *options)
    held, streamed = (load(tmp_path / name).state_dict() for name in ("held", "streamed"))
    assert all(torch.equal(weight, streamed[name]) for name, weight in held.items())


def test_resumed_run_ends_as_the_uninterrupted_one(tmp_path, data):
    options = [*MODEL, *TRAINING, *data, "--save_strategy", "steps", "--save_steps", "0.5"]
    run(tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    run(tmp_path / "resumed", *options, "--resume_from_checkpoint", "last")
    whole, resumed = (load(tmp_path / name).state_dict() for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# ---- pretrained models and their tokenizers


@pytest.mark.parametrize(
    ("name", "options", "mask"), [("bert", [], 3), ("gpt2", [], 300), ("gpt2", ["--mask_token_id", "7"], 7)]
)
def test_pretrained_weights_are_kept_and_masks_known(tmp_path, folder, plain, name, options, mask):
    rows = ["The [MASK] and <|mask|> are no text to learn.", *paragraphs(0, 60)]
    (tmp_path / "train.txt").write_text("\n\n".join(rows))
    texts = ["--train_file", tmp_path / "train.txt", "--validation_file", folder / "test.parquet"]
    model = ["--model_name_or_path", plain / name, "--num_blocks", "2", "--sequence_length", LENGTH, *options]
    metrics = run(tmp_path / "out", *TRAINING, *texts, *model, "--learning_rate", "0")
    trained, tokenizer = load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert trained.mask_token_id == tokenizer.mask_token_id == mask and tokenizer.mask_token in tokenizer.all_special_tokens
    stock = {"bert": BertForMaskedLM, "gpt2": GPT2LMHeadModel}[name].from_pretrained(plain / name).state_dict()
    weights = trained.backbone.state_dict()
    assert all(torch.equal(weights[key][: len(stock[key])], stock[key]) for key in stock)
    assert trained.config.vocab_size == max(trained.config.source_config.vocab_size, mask + 1)
    assert metrics["eval_loss"] > 4


def test_a_document_ends_where_bert_s_separator_is_and_every_byte_counts(plain):
    tokenizer = AutoTokenizer.from_pretrained(plain / "bert")
    packer = Packer(tokenizer, "text", 4, num_given=0)
    packed = packer({"text": ["The yield ", "The"]})
    the, yields = tokenizer("The yield", add_special_tokens=False)["input_ids"]
    assert packed == {"input_ids": [[1, the, yields, 2]], "num_bytes": [len("The yield ")]}
    assert packer.tokens == [1, the, 2] and sum(packer.bytes) == len("The")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask_token_id", "300"], r"mask_token_id=300 must be a token of the tokenizer, 0..299"),
        (["--sigma_max", "9"], "sigma_max=9.0 must be None with preset='recommended' for task 'fill-mask'"),
        (["--eval_nll_bound", "2", "--train_blocks", "0", "--train_shared", "false"], "eval_nll_bound=2 needs all blocks"),
        (["--config_name", "vit", "--config_overrides", "image_size=8"], "task='fill-mask' must be 'image-classification'"),
    ],
)
def test_bad_input_is_one_line(tmp_path, data, options, message):
    with pytest.raises(SystemExit, match=f"^train_masked_lm.py: error: .*{message}") as stop:
        run(tmp_path, *MODEL, *TRAINING, *data, *options)
    assert len(str(stop.value.code).splitlines()) == 1


def test_the_command_finds_the_recipe():
    assert train_verb.find_recipes()["masked-lm"] == train_masked_lm.__file__
