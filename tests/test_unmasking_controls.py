"""What generation from masks takes of Transformers' `GenerationConfig`: lengths, draws, ends."""

from __future__ import annotations

import pytest
import torch
from families import VOCAB, seeded
from test_masked_lm import MASK, masked_model, runs, tokenizer
from transformers import GenerationConfig, StoppingCriteriaList, TextStreamer

from hf_diffusionblocks.models.masked_lm.controls import Sampling

PROMPT, NEW, PAD = 4, 12, 1
PARTS = {"block_length": 4, "remasking": "low_confidence"}


@pytest.fixture
def model():
    return masked_model()


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randint(MASK + 1, VOCAB, (3, PROMPT), generator=seeded(1))


def written(model, prompts, **options) -> torch.Tensor:
    """Each text with draws of its own."""
    generators = [seeded(k) for k in range(len(prompts) * options.get("num_return_sequences", 1))]
    return model.generate(prompts, **{"max_new_tokens": NEW, "generator": generators, **options})


# ---- draws


def test_without_samples_the_likeliest_tokens_are_taken(model, prompts):
    greedy = written(model, prompts, temperature=0.0)
    assert torch.equal(written(model, prompts, do_sample=False), greedy)
    surest = {"remasking": "low_confidence"}  # the order is not drawn
    for likeliest in ({"top_k": 1}, {"temperature": 1e-40}):
        assert torch.equal(written(model, prompts, **likeliest, **surest), written(model, prompts, temperature=0, **surest))
    assert not (written(model, prompts, temperature=1e300) == MASK).any()
    assert not torch.equal(written(model, prompts), greedy)
    assert torch.equal(written(model, prompts, do_sample=True), written(model, prompts))


def test_draws_are_from_the_likeliest_tokens_alone():
    logits, where = torch.arange(9.0).expand(500, 9) / 4, torch.ones(1, 500, dtype=torch.bool)
    for options, drawn in (({"top_k": 3}, {6, 7, 8}), ({"top_p": 0.35}, {7, 8}), ({"top_k": 3, "top_p": 0.5}, {7, 8})):
        assert set(Sampling(generator=seeded(), **options).draw_tokens(logits, where).tolist()) == drawn


def test_several_texts_of_each_prompt(model, prompts):
    attention = torch.ones_like(prompts)
    attention[1, :2] = 0
    found = written(model, prompts, attention_mask=attention, num_return_sequences=2)
    twice = written(model, prompts.repeat_interleave(2, 0), attention_mask=attention.repeat_interleave(2, 0))
    assert torch.equal(found, twice) and not torch.equal(found[0], found[1])
    masks = torch.full((1, 5), MASK)
    assert model.infill(masks, num_return_sequences=3, generator=[seeded(k) for k in range(3)]).shape == (3, 5)


# ---- a config


def test_a_config_says_what_arguments_leave_out(model, prompts):
    config = GenerationConfig(max_new_tokens=8, do_sample=False, bos_token_id=0, num_beams=1, remasking="low_confidence")
    expected = written(model, prompts, max_new_tokens=8, do_sample=False, remasking="low_confidence", generator=seeded())
    bare = {"generator": seeded(), "generation_config": config}
    assert torch.equal(model.generate(prompts, **bare), expected)
    over = model.generate(prompts, **bare | {"generator": seeded()}, do_sample=True, max_length=PROMPT + 6)
    assert torch.equal(over, written(model, prompts, max_new_tokens=6, remasking="low_confidence", generator=seeded()))
    masks = torch.full((1, 5), MASK)
    filled = model.infill(masks, generation_config=config, generator=seeded())
    assert torch.equal(filled, model.infill(masks, temperature=0, remasking="low_confidence", generator=seeded()))
    model.generation_config = config
    assert torch.equal(model.generate(prompts, generator=seeded()), expected)


# ---- ends


def first_end(row: torch.Tensor, ends: list[int]) -> int:
    return next((place for place in range(PROMPT, len(row)) if int(row[place]) in ends), len(row) - 1)


@pytest.mark.parametrize("padding", [None, PAD])
def test_after_its_end_a_text_is_padding(model, prompts, padding):
    whole = written(model, prompts)
    ends = [int(whole[0, 6]), int(whole[1, 9])]
    found = written(model, prompts, eos_token_id=ends, pad_token_id=padding, return_dict_in_generate=True)
    for row, before in zip(range(3), whole):
        stop = first_end(before, ends) + 1
        assert torch.equal(found.sequences[row, :stop], before[:stop])
        assert (found.sequences[row, stop:] == (ends[0] if padding is None else padding)).all()
        assert (found.steps[row, stop:] == -1).all() and (found.steps[row, PROMPT:stop] >= 0).all()


def test_an_end_in_the_prompt_ends_nothing(model, prompts):
    end = int(prompts[0, 1])
    assert end not in written(model, prompts[:1], **PARTS)[0, PROMPT:]
    assert torch.equal(written(model, prompts[:1], eos_token_id=end, **PARTS), written(model, prompts[:1], **PARTS))


def test_texts_that_have_ended_run_no_more(model, prompts):
    whole = written(model, prompts, **PARTS)
    end = next(int(token) for token in whole[0, 4:8] if token not in whole[1:])
    found = []
    seen, _ = runs(model, lambda: found.append(written(model, prompts, eos_token_id=end, pad_token_id=PAD, **PARTS)))
    later = [len(tokens) for tokens in seen if not (tokens[:, 4:8] == MASK).any()]
    assert later == [2] * 8  # of three texts
    assert (found[0][0, 8:] == PAD).all() and torch.equal(found[0][1:], whole[1:])

    seen, _ = runs(model, lambda: found.append(written(model, prompts[:1], eos_token_id=end, pad_token_id=PAD, **PARTS)))
    assert torch.equal(found[1], found[0][:1]) and len(seen) == 4  # a step a token of the first part, and none further


def test_a_streamer_gets_nothing_after_the_end(model, prompts, capsys):
    end = int(written(model, prompts[:1], **PARTS)[0, 6])
    text = written(model, prompts[:1], eos_token_id=end, **PARTS, streamer=TextStreamer(tokenizer()))[0]
    shown = capsys.readouterr().out
    assert shown.split() == tokenizer().decode(text[: first_end(text, [end]) + 1]).split()


# ---- what is not taken


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 4}, r"num_beams=4 is not taken: there is no beam search: .* generate\(\) takes generation_config, do_"),
        ({"generation_config": GenerationConfig(num_beams=4)}, "num_beams=4 is not taken: there is no beam search"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not taken: remasking='random' repeats itself least"),
        ({"stopping_criteria": StoppingCriteriaList()}, r"stopping_criteria=\[\] is not taken: eos_token_id ends texts"),
        ({"stepps": 3}, "stepps=3 is not taken. generate"),
        ({"max_new_tokens": None}, "max_new_tokens=None must be a whole number from 1, or max_length be given"),
        ({"max_new_tokens": None, "max_length": 4}, "max_length=4 must be a whole number from 5: prompts have 4 tokens"),
        ({"max_new_tokens": None, "max_length": 17}, "max_length=17 must make at most max_position_embeddings=16"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0 must be above 0 with do_sample=True"),
        ({"do_sample": "yes"}, "do_sample='yes' must be True, False or None"),
        ({"top_k": -1}, "top_k=-1 must be a whole number from 0"),
        ({"temperature": float("inf")}, "temperature=inf must be a finite number from 0"),
        ({"num_return_sequences": 0}, "num_return_sequences=0 must be a whole number from 1"),
        ({**PARTS, "do_sample": False, "num_return_sequences": 2}, "num_return_sequences=2 must be 1 where nothing is drawn"),
        ({"eos_token_id": VOCAB}, r"eos_token_id=48 must be in 0\.\.47, and not mask_token_id=3"),
        ({"eos_token_id": 5, "pad_token_id": MASK}, r"pad_token_id=3 must be in 0\.\.47, and not mask_token_id=3"),
    ],
    ids=str,
)
def test_what_is_not_taken_is_named(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        written(model, prompts, **options)


def test_what_asks_for_nothing_is_no_fault(model, prompts):
    nothing = {"num_beams": 1, "repetition_penalty": 1.0, "use_cache": True, "output_scores": False, "bad_words_ids": None}
    assert torch.equal(written(model, prompts, **nothing), written(model, prompts))


def test_lengths_are_no_matter_of_texts_to_fill_in(model):
    with pytest.raises(ValueError, match=r"max_new_tokens=3 is not taken\. infill\(\) takes generation_config, do_sample"):
        model.infill(torch.full((1, 4), MASK), max_new_tokens=3)


def test_a_config_is_one_of_transformers(model, prompts):
    with pytest.raises(TypeError, match="generation_config=dict must be a GenerationConfig of transformers"):
        written(model, prompts, generation_config={"top_k": 3})
