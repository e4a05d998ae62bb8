"""Generation from masks: exact at one token a step, and what its options do."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from families import BERT, MODERNBERT, TEXT_CONFIGS, VOCAB, seeded
from test_masked_lm import LENGTH, MASK, losses_of_orders, masked_model, runs, tiny_model, tokenizer
from transformers import TextDiffusionStreamer, TextStreamer

import hf_diffusionblocks as db


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randint(MASK + 1, VOCAB, (3, 4), generator=seeded(1))


def chi_square(model, steps: int, num_texts: int = 8000) -> float:
    """How far drawn texts are from the mean likelihood over all orders; about 26 +- 7 if it is what they are drawn from."""
    blank = torch.full((num_texts, LENGTH), MASK)
    found = model.infill(blank, num_inference_steps=steps, generator=seeded())
    counts = torch.bincount((found * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    expected = []
    for text in product(range(MASK), repeat=LENGTH):
        orders = losses_of_orders(model, torch.tensor(text), LENGTH)
        expected.append(num_texts * sum(math.exp(-loss) for loss in orders) / len(orders))
    expected = torch.tensor(expected)
    assert expected.sum() == pytest.approx(num_texts, rel=1e-5)
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("num_blocks", [1, 2])
@torch.no_grad()
def test_one_token_a_step_in_random_order_draws_from_the_model_of_the_bound(num_blocks):
    model = tiny_model(num_blocks)
    for parameter in model.backbone.cls.parameters():
        parameter *= 3  # so that tokens depend on one another
    assert chi_square(model, steps=LENGTH) < 62
    assert chi_square(model, steps=1) > 100  # positive control: all at once, as if they did not


@pytest.mark.parametrize("remasking", ["random", "low_confidence"])
@torch.no_grad()
def test_a_step_reveals_its_share_by_one_block(remasking, prompts):
    model, results = masked_model(TEXT_CONFIGS["llama"], num_blocks=3), []
    _, read = runs(model, lambda: results.append(model.generate(
        prompts, max_new_tokens=10, num_inference_steps=4, remasking=remasking, return_dict_in_generate=True,
    )))  # fmt: skip
    out = results[0]
    assert read == [0, 1, 2, 2]  # 10, 7, 4 and 2 of 14 are masked
    assert torch.equal(out.sequences[:, :4], prompts) and (out.steps[:, :4] == -1).all() and (out.blocks[:, :4] == -1).all()
    assert not (out.sequences == MASK).any()
    for steps, blocks in zip(out.steps[:, 4:], out.blocks[:, 4:]):
        assert torch.bincount(steps).tolist() == [3, 3, 2, 2] and blocks.tolist() == [read[step] for step in steps]


@pytest.mark.parametrize("streamed", [False, True])
@torch.no_grad()
def test_several_threads_use_a_model(streamed, in_threads):
    model = masked_model(TEXT_CONFIGS["llama"], num_blocks=3)
    texts = [torch.randint(MASK + 1, VOCAB, (1, length), generator=seeded()) for length in range(3, 7)]

    def used(text: torch.Tensor) -> list:
        return [model.generate(text, max_new_tokens=5, temperature=0, generator=seeded()).tolist(), model(text).logits.tolist()]

    expected = [used(text) for text in texts]
    if streamed:
        db.stream_layers(model, "cpu")
    assert in_threads(used, texts) == expected


@pytest.mark.parametrize("config", [BERT, MODERNBERT, *TEXT_CONFIGS.values()], ids=["bert", "modernbert", *TEXT_CONFIGS])
@torch.no_grad()
def test_prompts_of_different_length_are_as_each_alone(config, prompts):
    """Padded on the left, without a draw: the surest token first."""
    model = masked_model(config, num_blocks=3).double()  # (no two tokens are as sure, but for rounding)
    options = {"max_new_tokens": 6, "remasking": "low_confidence", "temperature": 0.0}
    attention = torch.ones_like(prompts)
    attention[1, :2] = 0
    together = model.generate(prompts, attention_mask=attention, **options)
    for row, start in ((0, 0), (1, 2), (2, 0)):
        alone = model.generate(prompts[row : row + 1, start:], **options)
        assert torch.equal(together[row, start:], alone[0])


@torch.no_grad()
def test_options_of_the_draws(prompts):
    model = masked_model()
    call = {"max_new_tokens": 8, "num_inference_steps": 4}
    one, again, other = (model.generate(prompts, **call, generator=seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    likeliest = model.generate(prompts, **call, temperature=0.0, generator=seeded())
    assert torch.equal(likeliest, model.generate(prompts, **call, top_p=1e-4, generator=seeded()))
    rows = [[seeded(seed) for seed in range(3)], [seeded(2)]]
    texts = [model.generate(given, **call, generator=each) for given, each in zip((prompts, prompts[2:]), rows)]
    assert torch.equal(texts[0][2:], texts[1])  # a text's own generator is all it draws from


@torch.no_grad()
def test_low_confidence_reveals_the_surest_first(prompts):
    model = masked_model()
    z = torch.cat([prompts, torch.full((3, 4), MASK)], 1)
    out = model.infill(z, remasking="low_confidence", temperature=0.0, return_dict_in_generate=True)
    surest = model(z).logits[:, 4:].softmax(-1).max(-1).values.argmax(1)
    assert torch.equal(out.steps[:, 4:].argmin(1), surest)


@torch.no_grad()
def test_parts_of_a_text_are_finished_one_after_the_other(prompts):
    out = masked_model().generate(
        prompts, max_new_tokens=8, block_length=4, num_inference_steps=4, return_dict_in_generate=True
    )
    first, second = out.steps[:, 4:8].sort().values, out.steps[:, 8:].sort().values
    assert first.tolist() == [[0, 0, 1, 1]] * 3 and second.tolist() == [[2, 2, 3, 3]] * 3


@torch.no_grad()
def test_tokens_may_be_of_any_whole_numbers(prompts):
    model, found = masked_model(TEXT_CONFIGS["llama"]), []
    for tokens in (prompts, prompts.int()):
        found.append(model.generate(tokens, max_new_tokens=3, generator=seeded()))
    assert torch.equal(*found)


def test_infill_changes_masks_alone(prompts):
    model, z = masked_model(TEXT_CONFIGS["gpt2"]), prompts.clone()
    z[0, 1], z[1, :3] = MASK, MASK
    attention = torch.ones_like(z)
    attention[1, 0] = 0
    found = model.infill(z, attention_mask=attention)
    assert found[1, 0] == MASK  # padding
    filled = (z == MASK) & attention.bool()
    assert torch.equal(found[~filled], z[~filled]) and not (found[filled] == MASK).any()


@torch.no_grad()
def test_streamers_get_finished_parts_and_drafts(prompts, capsys):
    model = masked_model()
    call = {"max_new_tokens": 8, "block_length": 4, "temperature": 0.0, "remasking": "low_confidence"}
    text = tokenizer().decode(model.generate(prompts[:1], **call)[0])
    model.generate(prompts[:1], **call, streamer=TextStreamer(tokenizer()))
    assert capsys.readouterr().out.split() == text.split()
    model.generate(prompts[:1], **call, streamer=TextDiffusionStreamer(tokenizer()))
    shown = capsys.readouterr().out
    assert shown.count("\033[33m") == 8 and "[MASK]" in shown
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(prompts, **call, streamer=TextStreamer(tokenizer()))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"remasking": "best"}, "remasking='best' must be one of 'random', 'low_confidence'"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a finite number from 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be a number above 0 and at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number from 1"),
        ({"max_new_tokens": 13}, "max_new_tokens=13 after 4 must make at most max_position_embeddings=16"),
        ({"block_length": 3}, "block_length=3 must divide max_new_tokens=8"),
        ({"block_length": 4, "num_inference_steps": 3}, "num_inference_steps=3 must be a multiple of the 2 parts"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be a whole number from 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 must be a whole number from 1"),
        ({"num_inference_steps": True}, "num_inference_steps=True must be a whole number from 1"),
        ({"block_length": 2.0}, "block_length=2.0 must be a whole number from 1"),
        ({"input_ids": [[5, 6]]}, "input_ids of list must be a tensor of whole numbers"),
        ({"input_ids": torch.tensor([5, 6])}, r"input_ids of torch.int64 \[2\] must be a tensor of whole numbers \[N, S\]"),
        ({"attention_mask": torch.ones(3, 3)}, r"attention_mask of \[3, 3\] must be \[3, 4\]"),
        ({"generator": [seeded()]}, "1 generators must be 3, one a row"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]] * 3)}, "attention_mask must be 0 on the left alone"),
        ({"input_ids": torch.full((1, 4), MASK)}, "input_ids must not hold mask_token_id=3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_generated_is_refused(options, message, prompts):
    with pytest.raises(ValueError, match=message):
        masked_model().generate(**{"input_ids": prompts, "max_new_tokens": 8, **options})


def test_a_text_to_fill_in_must_fit_as_a_prompt_must():
    """Of every architecture: Llama would go on beyond the positions that it knows, and say nothing."""
    for config in (BERT, TEXT_CONFIGS["llama"]):
        model = masked_model(config)
        longest = model.config.source_config.max_position_embeddings
        with pytest.raises(ValueError, match=f"input_ids of {longest + 1} tokens .* max_position_embeddings={longest}"):
            model.infill(torch.full((1, longest + 1), MASK))


def test_there_must_be_something_to_fill_in(prompts):
    with pytest.raises(ValueError, match="input_ids must hold mask_token_id=3"):
        masked_model().infill(prompts)
    with pytest.raises(ValueError, match="num_inference_steps=0 must be a whole number from 1"):
        masked_model().infill(torch.full((1, 4), MASK), num_inference_steps=0)
