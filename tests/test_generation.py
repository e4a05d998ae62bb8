"""`generate`: the same tokens by every route, controls that act, exact samples, and what a token costs."""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from conftest import randomized
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM, GPT2Config, LlamaConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, Qwen3Config,
    SynthIDTextWatermarkingConfig, pipeline, set_seed,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.backbones.modulation import AdaLNModulation

VOCAB, PROMPT, NEW = 64, 5, 8
# No end-of-sequence token: every generation has the length it is asked for.
ENDS = {"bos_token_id": None, "eos_token_id": None}
LLAMA = dict(
    num_hidden_layers=4, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCAB, max_position_embeddings=64, **ENDS,
)  # fmt: skip
FAMILIES = {
    "gpt2": GPT2Config(n_layer=4, n_embd=32, n_head=4, vocab_size=VOCAB, n_positions=64, **ENDS),
    "llama": LlamaConfig(**LLAMA),
    "qwen3": Qwen3Config(head_dim=8, **LLAMA),
}
LOCAL = {
    "recommended": {"local_head_layers": 0}, "recommended-head": {"local_head_layers": 1},
    "recommended-own": {"local_head_layers": 0, "shared": "per_block"},
}  # fmt: skip
PAPER = {"paper": {"preset": "paper"}, "paper-own": {"preset": "paper", "shared": "per_block"}}
FORMULATIONS = {**LOCAL, **PAPER}


def over(*formulations: dict, families=tuple(FAMILIES)):
    """Run a test with these formulations of these families as its `model`."""
    cases = list(product(families, (name for chosen in formulations for name in chosen)))
    return pytest.mark.parametrize("model", cases, ids=map("-".join, cases), indirect=True)


over_all = over(FORMULATIONS)
#: For what is the plain model's own where nothing walks: see below.
over_walks = over(PAPER)
#: And a family has no part in.
over_gpt2 = over(PAPER, families=["gpt2"])


def plain_model(family: str):
    torch.manual_seed(0)
    return randomized(AutoModelForCausalLM.from_config(FAMILIES[family])).eval()


@cache
def converted(family: str, formulation: str) -> db.DiffusionBlocksForCausalLM:
    """Two blocks, every parameter (AdaLN included) away from its start; shared by tests, none of which changes it."""
    return randomized(db.convert(plain_model(family), num_blocks=2, **FORMULATIONS[formulation])).eval()


@pytest.fixture
def model(request) -> db.DiffusionBlocksForCausalLM:
    return converted(*request.param)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, VOCAB, (3, PROMPT), generator=torch.Generator().manual_seed(1))


def greedy(model, ids, **kwargs) -> torch.Tensor:
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})


def sample(model, ids, seed: int = 0, **kwargs) -> torch.Tensor:
    set_seed(seed)
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": True, "top_k": 0, **kwargs})


def next_tokens(model, ids, number: int, **kwargs) -> torch.Tensor:
    """How often each token is drawn to follow the first prompt, `[V]`."""
    drawn = sample(model, ids[:1], max_new_tokens=1, num_return_sequences=number, **kwargs)
    return drawn[:, -1].bincount(minlength=VOCAB)


def num_repeats(generated: torch.Tensor) -> int:
    return sum(len(row) - len(row.unique()) for row in generated[:, PROMPT:])


# ---- one answer by every route


@over_all
def test_greedy_is_the_argmax_of_the_logits_step_by_step(model, ids):
    expected = ids
    with torch.no_grad():
        for _ in range(NEW):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy(model, ids), expected)


@over_walks
@pytest.mark.parametrize(
    "route", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}], ids=str
)
def test_greedy_is_the_same_without_a_cache_or_with_another(model, ids, route):
    assert torch.equal(greedy(model, ids, **route), greedy(model, ids))


@over_walks
def test_sampling_is_the_same_without_a_cache(model, ids):
    assert torch.equal(sample(model, ids, use_cache=False), sample(model, ids))


@pytest.mark.parametrize("steps", [1, 5])
def test_a_walk_of_fewer_or_more_steps_than_blocks_is_the_same_without_a_cache(ids, steps):
    """One step leaves the last block unvisited: its cache has to be filled nevertheless."""
    model = db.convert(plain_model("llama"), num_blocks=2, preset="paper", num_inference_steps=steps)
    model = randomized(model).eval()
    assert torch.equal(greedy(model, ids, use_cache=False), greedy(model, ids))


@over_walks
def test_a_padded_prompt_is_continued_as_it_is_alone(model, ids):
    lengths = (5, 3, 1)
    mask = torch.stack([(torch.arange(PROMPT) >= PROMPT - length).long() for length in lengths])
    together = greedy(model, ids.masked_fill(mask == 0, 0), attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = greedy(model, ids[row : row + 1, PROMPT - length :])
        assert torch.equal(together[row, PROMPT:], alone[0, length:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("formulation", ["paper", "recommended-head"])
def test_a_prompt_can_be_given_as_embeddings(ids, family, formulation):
    model = converted(family, formulation)
    embeds = model.get_input_embeddings()(ids)
    continued = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(continued, greedy(model, ids)[:, PROMPT:])


# ---- the plain model's answer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "search",
    [{}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"num_beams": 3}],
    ids=["greedy", "sample", "beams"],
)
def test_a_recommended_model_generates_what_the_plain_model_does(ids, family, search):
    """Bit-equal logits at every step."""
    plain = plain_model(family)
    model = db.convert(plain, num_blocks=2)
    outputs = []
    for either in (model, plain):
        set_seed(0)
        outputs.append(either.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, **search))
    own, expected = outputs
    assert torch.equal(own.sequences, expected.sequences)
    assert all(map(torch.equal, own.logits, expected.logits))


# ---- sampling


@over_gpt2
def test_several_sequences_of_a_prompt_stand_together_and_differ(model, ids):
    out = sample(model, ids[:2], num_return_sequences=3)
    assert torch.equal(out[:, :PROMPT], ids[:2].repeat_interleave(3, 0))
    assert len(out[:3].unique(dim=0)) == 3


def entropy(model, ids, **controls) -> float:
    """Of the next token, estimated to about 0.01 nats."""
    return torch.special.entr(next_tokens(model, ids, 2000, **controls) / 2000).sum().item()


@over_gpt2
def test_entropy_grows_with_temperature(model, ids):
    cold, warm, hot = (entropy(model, ids, temperature=temperature) for temperature in (0.5, 1.0, 3.0))
    assert cold + 0.1 < warm < hot - 0.02


@over_gpt2
def test_top_p_reduces_entropy(model, ids):
    assert entropy(model, ids, top_p=0.3) < entropy(model, ids) - 0.3


@over_gpt2
def test_sampling_one_of_one_is_greedy(model, ids):
    assert torch.equal(sample(model, ids, top_k=1), greedy(model, ids))


def test_a_walk_s_controls_act_at_every_step(ids):
    """At the last one alone, next to a point mass, they could do nothing."""
    model, seen = converted("gpt2", "paper"), []

    class Watching(LogitsProcessor):
        def __call__(self, tokens, scores):
            seen.append(scores.softmax(-1).amax())
            return scores

    model.generate(ids[:1], max_new_tokens=2, do_sample=True, logits_processor=LogitsProcessorList([Watching()]))
    assert len(seen) == 2 * model.config.num_inference_steps


# ---- controls of greedy search


@over_walks
def test_repetition_penalty_reduces_repeats(model, ids):
    plain, penalized = (greedy(model, ids, max_new_tokens=20, repetition_penalty=penalty) for penalty in (1.0, 3.0))
    assert num_repeats(penalized) < 0.5 * num_repeats(plain)


# ---- stopping, streaming, pipelines


@over_gpt2
def test_generation_stops_at_the_end_token_and_pads(model, ids):
    free = greedy(model, ids)
    end = free[0, PROMPT + 2].item()
    expected = []
    for row in free.tolist():
        stop = row.index(end, PROMPT) + 1 if end in row[PROMPT:] else len(row)
        expected.append(row[:stop])
    length = max(map(len, expected))
    expected = torch.tensor([row + [0] * (length - len(row)) for row in expected])
    assert torch.equal(greedy(model, ids, eos_token_id=end, pad_token_id=0), expected)


class Streamer:
    """Keeps what a `TextStreamer` would print."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@over_gpt2
def test_a_streamer_is_given_the_prompt_and_each_token(model, ids):
    streamer = Streamer()
    generated = greedy(model, ids[:1], streamer=streamer)
    assert streamer.tokens == generated[0].tolist() and streamer.ended


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.BPE(unk_token="?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text = ["the noise that blocks remove is the noise that blocks were given", "each block knows its own noise", "abcdef"]
    words.train_from_iterator(text, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["?"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")


@pytest.mark.parametrize("formulation", ["recommended", "paper-own"])
def test_pipeline_of_a_saved_model(tokenizer, tmp_path, formulation):
    model = converted("llama", formulation)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    (result,) = generator("the noise", max_new_tokens=NEW, do_sample=False, return_full_text=False)
    prompt = tokenizer("the noise", return_tensors="pt")["input_ids"]
    expected = greedy(model, prompt)[0, prompt.shape[1] :]
    assert result["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("formulation", ["recommended", "paper"])
def test_generation_stops_at_a_string(tokenizer, formulation):
    """With its tokenizer, as the plain model does: at the first token that completes it."""
    model = converted("llama", formulation)
    prompt = tokenizer("the noise", return_tensors="pt")["input_ids"]
    free = greedy(model, prompt)[0, prompt.shape[1] :]
    stop = tokenizer.decode(free[2:3]).strip()
    length = next(n for n in range(1, NEW + 1) if stop in tokenizer.decode(free[:n]))
    found = greedy(model, prompt, stop_strings=[stop], tokenizer=tokenizer)[0, prompt.shape[1] :]
    assert stop and length < NEW and torch.equal(found, free[:length])


# ---- other searches


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2"),
        ({"force_words_ids": [[1]], "num_beams": 2}, r"num_beams=2, force_words_ids=\[\[1\]\]"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"dola_layers": "high"}, "dola_layers='high'"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2"),
        ({"assistant_early_exit": 2}, "assistant_early_exit=2"),
        ({"assistant_model": plain_model("gpt2")}, "assistant_model=GPT2LMHeadModel"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig([1, 2], 2)}, "watermarking_config="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_paper_s_model_names_what_its_walk_lacks(ids, arguments, named):
    with pytest.raises(ValueError, match=f"^{named}.* must not be given with preset='paper': "):
        converted("gpt2", "paper").generate(ids, max_new_tokens=2, **arguments)


# ---- what a token costs


@over_walks
def test_a_new_token_of_a_walk_costs_one_call_of_each_layer(model, ids):
    """Two tokens a call: the one before it, clean, and itself, noisy."""
    calls = []
    layers = [layer for block in model.blocks for layer in block.layers]
    attentions = [getattr(layer, model.architecture.attention_name) for layer in layers]
    hooks = [
        attention.register_forward_hook(lambda _, args, out, index=index: calls.append((index, args[0].shape[1])))
        for index, attention in enumerate(attentions)
    ]
    greedy(model, ids, max_new_tokens=1)
    prompt_calls, calls[:] = list(calls), []
    greedy(model, ids, max_new_tokens=4)
    for hook in hooks:
        hook.remove()
    assert calls == prompt_calls + 3 * [(index, 2) for index in range(4)]


@over_walks
def test_modulations_are_computed_once_a_generation(model, ids):
    """Of each layer one for its clean tokens and one for its noisy ones, however many there are."""
    calls = []
    modulations = [module for module in model.modules() if isinstance(module, AdaLNModulation)]
    hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in modulations]
    greedy(model, ids)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2 * 4


@over_gpt2
def test_greedy_generation_leaves_the_global_generator_alone(model, ids):
    state = torch.get_rng_state()
    greedy(model, ids)
    assert torch.equal(torch.get_rng_state(), state)
