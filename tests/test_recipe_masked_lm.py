"""The recipe of masked text: its tokenizer has a mask token, what it measures is the bound, pretrained weights are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipe_runs import LENGTH, OVERRIDES, SIZES, TRAINING, data, folder, paragraphs, sequences, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast,
    pipeline,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.recipes import train_masked_lm
from hf_diffusionblocks.recipes.text import Packer

pytestmark = pytest.mark.usefixtures("own_cache")
BERT = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 24,
}  # fmt: skip
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
def plain(tmp_path_factory, tokenizer) -> Path:
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
    gpt2 = GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=24, vocab_size=300, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    for name, model, own in (
        ("bert", BertForMaskedLM(BertConfig(vocab_size=len(words), **BERT)), of_bert),
        ("gpt2", GPT2LMHeadModel(gpt2), tokenizer),
    ):
        model.save_pretrained(root / name)
        own.save_pretrained(root / name)
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
