"""Masked diffusion: architectures that attend both ways, training on masks, evaluation without a look at the answer."""

from __future__ import annotations

import copy
import math
from itertools import combinations, permutations

import pytest
import torch
from conftest import randomized
from families import BERT, MODERNBERT, TEXT_CONFIGS, VOCAB, seeded
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast, pipeline

import hf_diffusionblocks as db
from hf_diffusionblocks.models.masked_lm import model as model_module
from hf_diffusionblocks.tasks import backbone_for

CONFIGS = {**TEXT_CONFIGS, "bert": BERT, "modernbert": MODERNBERT}
MASK = 3
every_architecture = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def plain_of(config):
    torch.manual_seed(0)
    return randomized(backbone_for(config).make_plain(copy.deepcopy(config))).eval()


def masked_model(config=BERT, num_blocks=2, **fields) -> db.DiffusionBlocksForMaskedLM:
    fields = {"mask_token_id": MASK, **fields}
    return db.convert(plain_of(config), num_blocks, task="fill-mask", preset="paper", **fields).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(MASK + 1, VOCAB, (4, 10), generator=seeded(1))


def runs(model, call) -> tuple[list[torch.Tensor], list[int]]:
    """What layers read, and the blocks that a call reads out."""
    seen, read, see, logits = [], [], model.read, model.logits
    model.read = lambda block, text: seen.append(text.input_ids.clone()) or see(block, text)
    model.logits = lambda block, hidden: read.append(block.index) or logits(block, hidden)
    call()
    model.read, model.logits = see, logits
    return seen, read


# ---- architectures


@every_architecture
@torch.no_grad()
def test_layers_attend_both_ways_and_to_no_padding(config, ids, tmp_path):
    """As the stock model does that its config tells to; with tokens that change, since a cache would show only then."""
    model = masked_model(config, num_blocks=1)
    z = ids.clone()
    z[:, 4] = MASK
    z[1, 5] = MASK
    attention = torch.ones_like(z)
    attention[0, 7:] = 0
    attention[2, :3] = 0
    model.to_plain().save_pretrained(tmp_path)
    stock = type(plain_of(config)).from_pretrained(tmp_path)
    assert plain_of(config).config.to_dict().get("is_causal") is None
    for mask in (None, attention):
        for tokens in (z, z.clone().index_fill_(1, torch.tensor([5]), 7)):
            expected = stock(tokens, attention_mask=mask).logits.index_fill(-1, torch.tensor(MASK), -math.inf)
            assert torch.equal(model(tokens, attention_mask=mask).logits, expected)
    changed = z.clone()
    changed[:, 5] = 8
    assert not torch.allclose(model(z).logits[:, 4], model(changed).logits[:, 4])
    padded = z.clone()
    padded[0, 8], padded[2, 1] = 9, 9
    before, after = (model(tokens, attention_mask=attention).logits for tokens in (z, padded))
    assert torch.equal(before[0, :7], after[0, :7]) and torch.equal(before[2, 3:], after[2, 3:])


@pytest.mark.parametrize("config", TEXT_CONFIGS.values(), ids=TEXT_CONFIGS.keys())
@torch.no_grad()
def test_the_same_architecture_stays_causal_for_text_generation(config, ids):
    plain = plain_of(config)
    db.convert(plain, 2, task="fill-mask")
    model, changed = db.convert(plain, 2).eval(), ids.clone()
    changed[:, 6] = 8
    assert model.task == "text-generation"
    assert torch.equal(model(ids).logits[:, :6], model(changed).logits[:, :6])
    both_ways = masked_model(config, num_blocks=1).to_plain()
    with pytest.raises(ValueError, match="is_causal=False"):
        db.convert(both_ways, 2)


def test_several_blocks_are_no_plain_model():
    with pytest.raises(ValueError, match=r"to_plain\(\) needs num_blocks=1, this model has 2"):
        masked_model().to_plain()


# ---- MASK


@pytest.mark.parametrize("shared", ["common", "per_block"])
@every_architecture
@torch.no_grad()
def test_a_vocabulary_without_mask_gets_a_row_for_it(config, shared, ids, tmp_path, monkeypatch):
    """And it is said: a model may know another."""
    plain, warnings = plain_of(config), []
    monkeypatch.setattr(model_module.logger, "warning", warnings.append)
    masked_model(config)
    assert not warnings
    model = db.convert(plain, 2, task="fill-mask", shared=shared, preset="paper").eval()
    assert "mask_token_id=48 is a new token" in warnings[0]
    table = plain.get_input_embeddings().weight
    for block in model.blocks:
        assert model.read(block, model_module.MaskedText(torch.tensor([[VOCAB, 3]]))).isfinite().all()
    found = model.backbone.get_input_embeddings().weight
    assert torch.equal(found[:VOCAB], table) and torch.allclose(found[VOCAB], table.mean(0))
    assert plain.config.vocab_size == VOCAB and model.config.vocab_size == VOCAB + 1
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert again.mask_token_id == again.config.source_config.mask_token_id == VOCAB
    z = ids.index_fill(1, torch.tensor([2]), VOCAB)
    logits = again(z).logits
    assert torch.equal(logits, model(z).logits)
    assert (logits[..., VOCAB] == -math.inf).all() and logits[..., :VOCAB].isfinite().all()


@pytest.mark.parametrize("config", [BERT, TEXT_CONFIGS["llama"]], ids=["bert", "llama"])
@torch.no_grad()
def test_token_embeddings_are_resized(config, ids, tmp_path):
    model, before = masked_model(config), masked_model(config)(ids).logits
    model.resize_token_embeddings(VOCAB + 3)
    model.save_pretrained(tmp_path)
    logits = AutoModelForMaskedLM.from_pretrained(tmp_path)(ids).logits
    assert logits.shape[-1] == VOCAB + 3 and torch.allclose(logits[..., :VOCAB], before, atol=1e-6)
    with pytest.raises(ValueError, match="shared='per_block' must be 'common' to resize"):
        masked_model(config, shared="per_block").resize_token_embeddings(VOCAB + 3)
    with pytest.raises(ValueError, match=f"new_num_tokens={MASK} must be above mask_token_id={MASK}, and keep MASK"):
        model.resize_token_embeddings(MASK)


def tokenizer(mask_token: str | None = "[MASK]") -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", *(f"w{i}" for i in range(4, VOCAB))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, mask_token=mask_token, pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.mark.parametrize("config", [BERT, TEXT_CONFIGS["llama"]], ids=["bert", "llama"])
@torch.no_grad()
def test_mask_of_the_saved_tokenizer_and_the_pipeline(config, tmp_path):
    plain_of(config).save_pretrained(tmp_path / "plain")
    tokenizer(None).save_pretrained(tmp_path / "plain")
    assert db.convert(tmp_path / "plain", 2, task="fill-mask").mask_token_id == VOCAB
    tokenizer().save_pretrained(tmp_path / "plain")
    assert db.convert(tmp_path / "plain", 2, task="fill-mask", mask_token_id=5).mask_token_id == 5
    model = db.convert(tmp_path / "plain", 2, task="fill-mask", mask_token_id=None)
    assert model.mask_token_id == MASK and model.config.vocab_size == VOCAB
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    fill = pipeline("fill-mask", model=str(tmp_path / "model"), device="cpu")
    (guess, *_), _ = fill("w4 [MASK] w6 [MASK]", top_k=VOCAB)
    z = torch.tensor([[4, MASK, 6, MASK]])
    probabilities = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")(z).logits[0, 1].softmax(-1)
    assert guess["token"] == probabilities.argmax() and guess["score"] == pytest.approx(probabilities.max().item())


@torch.no_grad()
def test_token_types_and_positions_reach_the_embeddings(ids):
    """Of an architecture that has them; another does not look at token types."""
    model, llama = masked_model(), masked_model(TEXT_CONFIGS["llama"])
    types = (torch.arange(10) > 4).long().expand(4, 10)
    for each, looks in ((model, True), (llama, False)):
        assert torch.equal(each(ids).logits, each(ids, token_type_ids=types).logits) is not looks
    assert torch.equal(model(ids).logits, model(ids, position_ids=torch.arange(10).expand(4, 10)).logits)
    assert not torch.equal(model(ids).logits, model(ids, position_ids=torch.arange(1, 11)[None]).logits)


# ---- training


@pytest.mark.parametrize("block_index", [0, 1, 2])
def test_training_masks_the_block_s_share_of_labels_and_weighs_them_in_counts(block_index, ids):
    """And draws nothing from padding, or where a label is -100."""
    model = masked_model(TEXT_CONFIGS["gpt2"], num_blocks=3, overlap=0.0).train()
    ids = ids.repeat(4, 1)
    labels, attention = ids.clone(), torch.ones_like(ids)
    labels[1:4, :3], attention[5, 6:] = -100, 0
    calls = []
    seen, _ = runs(model, lambda: calls.append(model(
        ids, attention_mask=attention, labels=labels, block_index=block_index, generator=seeded(), return_logits=True,
    )))  # fmt: skip
    z, out = seen[0], calls[0]
    masked, maskable = z == MASK, (labels != -100) & attention.bool()
    assert torch.equal(z[~masked], ids[~masked]) and not masked[~maskable].any()
    tokens, most, counts, total = attention.sum(1), maskable.sum(1), masked.sum(1), 0
    for row in range(len(ids)):
        own = [m for m in range(1, most[row] + 1) if -(-m * 3 // tokens[row].item()) == 3 - block_index]
        assert counts[row].item() in (own or [0])
        losses = F.cross_entropy(out.logits[row], labels[row], reduction="none")[masked[row]]
        total += 3 * len(own) / max(counts[row].item(), 1) * losses.sum()
    assert out.loss.item() == pytest.approx((total / maskable.sum()).item(), abs=1e-5)
    assert (out.logits[..., MASK] == -math.inf).all()


def test_a_share_fixes_the_draw(ids):
    model = masked_model()
    for ratio, counts in ((0.5, [5] * 4), (0.001, [1] * 4), (torch.tensor([0.1, 0.3, 0.97, 1.0]), [1, 3, 10, 10])):
        seen, _ = runs(model, lambda: model(ids, labels=ids, block_index=0, mask_ratio=ratio, generator=seeded()))
        assert (seen[0] == MASK).sum(1).tolist() == counts


def test_training_on_what_is_masked_already_is_refused(ids):
    model = masked_model().train()
    masked = ids.index_fill(1, torch.tensor([3]), MASK)
    with pytest.raises(ValueError, match="input_ids hold mask_token_id=3 already"):
        model(masked, labels=ids, block_index=0)
    padding = torch.ones_like(ids).index_fill(1, torch.tensor([3]), 0)
    model(masked, attention_mask=padding, labels=ids, block_index=0)  # there it says nothing
    for kwargs, message in (({"labels": ids}, "block_index=None in training"), ({"block_index": 0}, "labels=None")):
        with pytest.raises(ValueError, match=message):
            model(ids, **kwargs)


@torch.no_grad()
def test_training_logits_do_not_depend_on_what_was_masked(ids):
    model, other = masked_model(), ids.clone()
    call = {"block_index": 1, "return_logits": True, "mask_ratio": 0.3}
    (z,), _ = runs(model, lambda: model(ids, labels=ids, **call, generator=seeded()))
    other[z == MASK] = 9
    logits = [model(tokens, labels=tokens, **call, generator=seeded()).logits for tokens in (ids, other)]
    assert torch.equal(*logits)
    other[0, (z[0] != MASK).nonzero()[0]] = 9
    changed = model(other, labels=other, **call, generator=seeded()).logits
    assert not torch.allclose(changed[0], logits[0][0])  # positive control: what is seen


# ---- evaluation


@torch.no_grad()
def test_each_text_is_answered_by_the_block_that_owns_its_share(ids):
    """In one batch; padding is not counted."""
    model, z, attention = masked_model(num_blocks=4), ids.clone(), torch.ones_like(ids)
    z[0], z[1, :5], z[2, :2] = MASK, MASK, MASK  # shares 1, 1/2, 1/5 and 0
    attention[2, 4:] = 0  # now 1/2
    answers = []
    _, read = runs(model, lambda: answers.append(model(z, attention_mask=attention).logits))
    assert read == [0, 2, 3]
    for row, block in enumerate([0, 2, 2, 3]):
        text = model_module.MaskedText(z[row : row + 1], attention[row : row + 1])
        expected = model.logits(model.blocks[block], model.read(model.blocks[block], text)[0])[None]
        assert torch.allclose(answers[0][row, attention[row].bool()], expected[0, attention[row].bool()], atol=1e-6)


@torch.no_grad()
def test_with_labels_only_masks_count(ids):
    """As in the stock model, given labels of the masks alone."""
    model, z = masked_model(), ids.clone()
    z[0, 1], z[1:, 2:8] = MASK, MASK
    expected = F.cross_entropy(model(z).logits[z == MASK], ids[z == MASK], reduction="none").split([1, 6, 6, 6])
    of_masks = torch.where(z == MASK, ids, -100)
    for return_logits in (None, False):
        out = model(z, labels=of_masks, return_logits=return_logits)
        assert out.loss.item() == pytest.approx(torch.cat(expected).mean().item(), abs=1e-5)
        assert (out.logits is None) is (return_logits is False)
        # With labels everywhere a text counts as one of all its tokens.
        mean = torch.stack([row.mean() for row in expected]).mean().item()
        assert model(z, labels=ids, return_logits=return_logits).loss.item() == pytest.approx(mean, abs=1e-5)


@torch.no_grad()
def test_a_whole_text_is_never_scored_by_a_look_at_its_own_answer(ids):
    """It is masked first, each text in its own way: all that counts is answers to MASK."""
    model, outputs = masked_model(), []
    scored = []
    sums = model.sums_of_rows
    model.sums_of_rows = lambda block, hidden, labels, masked: scored.append(masked) or sums(block, hidden, labels, masked)
    seen, _ = runs(model, lambda: outputs.append(model(ids, labels=ids)))
    for z, masked in zip(seen, scored):
        assert masked.any(1).all() and (z[masked] == MASK).all() and (z[~masked] != MASK).all()
    assert len(torch.cat(seen)) == 4
    alone = [runs(model, lambda: model(ids[row : row + 1], labels=ids[row : row + 1]))[0][0] for row in (3, 3, 2)]
    assert torch.equal(alone[0], alone[1]) and not torch.equal(alone[0] == MASK, alone[2] == MASK)


# ---- the bound, by enumeration

WORDS, LENGTH = 4, 3


def tiny_model(num_blocks: int) -> db.DiffusionBlocksForMaskedLM:
    config = copy.deepcopy(BERT)
    config.vocab_size = WORDS
    return masked_model(config, num_blocks=num_blocks, overlap=0.0)


def log_likelihood(model, text: torch.Tensor, hidden: list[int], asked: int) -> float:
    z = text.clone()
    z[hidden] = MASK
    return model(z[None]).logits[0, asked].log_softmax(-1)[text[asked]].item()


def count_form(model, text: torch.Tensor, length: int) -> float:
    """Over all counts and all sets, nats of the text."""
    total = 0.0
    for count in range(1, length + 1):
        sets = list(combinations(range(length), count))
        for hidden in sets:
            costs = sum(-log_likelihood(model, text, list(hidden), asked) for asked in hidden)
            total += length / count * costs / len(sets) / length
    return total


def losses_of_orders(model, text: torch.Tensor, length: int) -> list[float]:
    """-ln of the likelihood of revealing a text in each of its L! orders."""
    return [
        sum(-log_likelihood(model, text, list(order[step:]), order[step]) for step in range(length))
        for order in permutations(range(length))
    ]


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@torch.no_grad()
def test_the_bound_is_the_mean_over_all_orders_and_not_below_the_likelihood(num_blocks, monkeypatch):
    model, text = tiny_model(num_blocks), torch.tensor([1, 0, 2])
    exact = count_form(model, text, LENGTH)
    orders = losses_of_orders(model, text, LENGTH)
    assert exact == pytest.approx(sum(orders) / len(orders), abs=1e-5)
    assert exact > -math.log(sum(map(math.exp, (-loss for loss in orders))) / len(orders))
    one = text[:1]
    assert count_form(model, one, 1) == pytest.approx(losses_of_orders(model, one, 1)[0], abs=1e-6)

    batch = {"input_ids": text.repeat(256, 1), "labels": text.repeat(256, 1)}
    bound = db.nll_bound(model, [batch], num_samples=6)
    assert bound.num_tokens == 256 * LENGTH and bound.prior == bound.reconstruction == 0
    assert abs(bound.nats_per_token - exact / LENGTH) < 4 * bound.standard_error < 0.05

    # Training: the mean over blocks of a loss over all of a block's counts and sets.
    total = 0.0
    for k in range(num_blocks):
        least, most = (end.item() for end in model.noise_schedule.counts(k, *[torch.tensor([LENGTH])] * 2))
        for count in range(least, most + 1):
            sets = list(combinations(range(LENGTH), count))
            for hidden in sets:
                where = torch.zeros(1, LENGTH, dtype=torch.bool)
                where[0, list(hidden)] = True
                monkeypatch.setattr(model_module, "draw_masked", lambda *args: where)
                loss = model(text[None], labels=text[None], block_index=k).loss.item()
                total += loss / len(sets) / (most - least + 1) / num_blocks
    assert total == pytest.approx(exact / LENGTH, abs=1e-5)


@torch.no_grad()
def test_the_evaluation_loss_estimates_the_bound():
    model = tiny_model(2)
    texts = torch.randint(MASK, (400, LENGTH), generator=seeded())
    keyed = model(texts, labels=texts).loss.item()
    bound = db.nll_bound(model, [{"input_ids": texts, "labels": texts}], num_samples=30)
    assert keyed == pytest.approx(bound.nats_per_token, abs=0.1)


@torch.no_grad()
def test_the_bound_counts_labels_alone(ids):
    model, labels, attention = masked_model(), ids.clone(), torch.ones_like(ids)
    labels[:, :4], attention[0, 8:] = -100, 0
    bound = db.nll_bound(model, [{"input_ids": ids, "labels": labels, "attention_mask": attention}])
    assert bound.num_tokens == 4 * 6 - 2 and bound.standard_error > 0
    masked = ids.index_fill(1, torch.tensor([5]), MASK)
    with pytest.raises(ValueError, match="input_ids hold mask_token_id=3 where labels are scored"):
        db.nll_bound(model, [{"input_ids": masked, "labels": ids}])
