"""Recurrent depth as one block: two streams over one core, which a training step runs once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import randomized
from families import CASES, RECURRENT, VOCAB, draws_of_texts, same, three_texts
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.backbones.modulation import Modulation
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.diffusion.gaussian import precondition
from hf_diffusionblocks.memory.scenarios import ledger_of
from hf_diffusionblocks.memory.ways import Way, Workload
from hf_diffusionblocks.recipes import train_causal_lm
from hf_diffusionblocks.recurrent_depth_llama import RecurrentDepthLlamaForCausalLM

LENGTH, NEW = 8, 5
CONFIGS = Path(train_causal_lm.__file__).parent / "configs"
STEPS = [None, 1, 2, 5]


@pytest.fixture
def model() -> db.DiffusionBlocksForCausalLM:
    torch.manual_seed(0)
    model = randomized(db.convert(RECURRENT)).eval()
    model.generation_config.eos_token_id = None  # every generation has the length it is asked for
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return three_texts(LENGTH)


def logits_of(model, ids, labels=None, **draw) -> torch.Tensor:
    draw = {**draws_of_texts(LENGTH), **draw}
    with torch.no_grad():
        return model(ids, labels=ids if labels is None else labels, block_index=0, return_logits=True, **draw).logits


# ---- the cut


def test_a_converted_model_keeps_its_weights_and_is_one_joint_block():
    plain = randomized(AutoModelForCausalLM.from_config(RECURRENT))
    model = db.convert(plain)
    assert (model.num_blocks, model.config.preset) == (1, "paper")  # though what is recommended is asked for
    assert same(model.backbone.state_dict(), plain.state_dict())
    names = {name for name, _ in model.named_parameters() if model.block_of_parameter(name) == 0}
    assert {name.split(".")[2] for name in names if name.startswith("backbone.model.")} == {"layers"}  # core and coda
    assert not any("prelude" in name or "adapter" in name for name in names)


# ---- training


def test_a_training_step_runs_the_core_once(model, ids):
    """For clean and for noisy tokens; the prelude for clean ones. The plain model runs it `num_steps` times."""
    tokens = {}
    layers = [*model.backbone.model.prelude, *model.backbone.model.layers]
    for index, layer in enumerate(layers):
        layer.self_attn.q_proj.register_forward_hook(
            lambda _, args, __, index=index: tokens.setdefault(index, []).append(args[0].shape[1])
        )
    model.train()(ids, labels=ids, block_index=0)
    each = LENGTH - 1
    assert tokens == {0: [each], 1: [each, each], 2: [each, each], 3: [each]}  # of the last, clean keys and values only
    tokens.clear()
    model.backbone.train()(ids, labels=ids, num_steps=5)
    assert {index: len(runs) for index, runs in tokens.items()} == {0: 1, 1: 5, 2: 5, 3: 1}


def by_hand(model, ids, sigma: float, noise) -> torch.Tensor:
    """Logits of tokens 1 to S-1, each by a causal pass of its own over the clean tokens before it and its noisy self."""
    parts, found = model.backbone.model, []
    c, block = precondition(torch.full((1,), sigma), model.config.sigma_data), model.blocks[0]
    vectors = F.normalize(parts.embed_tokens.weight, dim=-1)
    pairs = [*zip(block.clean_modulations(), block.modulations(torch.full((1,), sigma)))]
    for p in range(ids.shape[1] - 1):
        clean = parts.embed_tokens(ids[:, : p + 1])
        for layer in parts.prelude:
            clean = layer(clean, position_embeddings=parts.rotary_emb(clean, torch.arange(p + 1)[None]))
        z = vectors[ids[:, p + 1]] + sigma * noise[:, p]
        state = torch.cat([torch.zeros_like(clean), (c.input * z)[:, None]], 1)
        hidden = parts.adapter(torch.cat([state, torch.cat([clean, clean[:, -1:]], 1)], -1))
        positions = {"position_embeddings": parts.rotary_emb(hidden, torch.arange(p + 2)[None])}
        for layer, (of_clean, of_noisy) in zip(parts.layers, pairs):
            both = (torch.cat([one.expand(1, p + 1, -1), two], 1) for one, two in zip(of_clean, of_noisy))
            hidden = model.architecture.run_layer(layer, hidden, Modulation(*both), attention_mask=None, **positions)
        read = parts.norm(hidden[:, -1])
        found.append(model.backbone.lm_head((c.skip * z + c.out * read) / model.config.sigma_data))
    return torch.stack(found, 1)


@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_loss_and_gradients_are_those_of_a_pass_a_token(model, ids, sigma):
    draw, results = draws_of_texts(LENGTH, sigma), []
    logits = by_hand(model, ids, sigma, draw["noise"])
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    for loss in (model.train()(ids, labels=ids, block_index=0, **draw).loss, expected):
        model.zero_grad()
        loss.backward()
        # (Targets are constants of our loss: of the embeddings' gradient, the reference has more.)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if "embed_tokens" not in n}
        results.append((loss.item(), gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, gradient in results[0][1].items():
        assert torch.allclose(gradient, results[1][1][name], rtol=1e-3, atol=1e-5), name


def test_a_noisy_token_sees_no_later_token_and_no_other_noisy_one(model, ids):
    before, changed = logits_of(model, ids), ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    after = logits_of(model, changed, labels=ids)  # z as before
    assert torch.equal(after[:, :5], before[:, :5])  # row 4 is token 5's own
    assert not torch.allclose(after[:, 5], before[:, 5])  # positive control: the next one reads it
    moved = draws_of_texts(LENGTH)["noise"]
    moved[:, 3] += 1
    after = logits_of(model, ids, noise=moved)
    others = [p for p in range(LENGTH - 1) if p != 3]
    assert torch.equal(after[:, others], before[:, others]) and not torch.allclose(after[:, 3], before[:, 3])
    labels = ids.clone()
    labels[:, 4] = (labels[:, 4] + 1) % VOCAB
    after = logits_of(model, ids, labels=labels)  # positive control: z is the target's only way in
    assert torch.equal(after[:, others], before[:, others]) and not torch.allclose(after[:, 3], before[:, 3])


# ---- walks


@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sample"])
def test_cached_generation_is_uncached_generation(model, ids, num_steps, sampling):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(ids, max_new_tokens=NEW, num_steps=num_steps, use_cache=use_cache, **sampling))
    assert torch.equal(*found)


def test_greedy_search_is_the_argmax_of_the_walk_s_end(model, ids):
    expected = ids
    with torch.no_grad():
        for _ in range(NEW):
            logits = model(expected, num_steps=3).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, num_steps=3), expected)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, num_steps=3)
    assert torch.equal(model.generate(ids, generation_config=config), expected)
    model.config.num_inference_steps = 3
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), expected)


def test_a_new_token_costs_its_clean_pass_once_whatever_the_steps(model, ids):
    runs = {"prelude": [], "core": []}
    parts = model.backbone.model
    for name, layer in (("prelude", parts.prelude[0]), ("core", parts.layers[0])):
        layer.self_attn.q_proj.register_forward_hook(lambda _, args, __, n=name: runs[n].append(args[0].shape[1]))
    model.generate(ids, max_new_tokens=3, num_steps=4, do_sample=False)
    assert runs["prelude"] == [LENGTH, 1, 1]
    # (Of the prompt, clean tokens, then a noisy one at each step; of a new one, both together, then the noisy one.)
    assert runs["core"] == [LENGTH, 1, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1]


def test_the_way_of_a_token_can_be_looked_at(model, ids):
    seen = model.trajectory(ids, num_steps=4)
    assert seen.shape == (3, 4, VOCAB) and torch.allclose(seen.sum(-1), torch.ones(3, 4), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(seen[:, -1], model(ids, num_steps=4).logits[:, -1].softmax(-1), atol=1e-5)
    assert torch.allclose(seen[:, 0], model.trajectory(ids, num_steps=1)[:, 0], atol=1e-5)  # all begin at sigma_max
    padding = torch.ones_like(ids).index_fill(1, torch.tensor([0, 1]), 0)
    assert torch.allclose(model.trajectory(ids, padding, 4), model.trajectory(ids[:, 2:], num_steps=4), atol=1e-5)


def test_numbers_of_steps_that_mean_nothing_are_refused(model, ids):
    with pytest.raises(ValueError, match="num_steps=0 must be a whole number from 1"):
        model.generate(ids, num_steps=0)
    recommended = db.convert(CASES["llama, recommended"].config, 2)
    with pytest.raises(ValueError, match="num_steps=2 must be 1 or None with preset='recommended'"):
        recommended.generate(ids, num_steps=2)
    with pytest.raises(ValueError, match="preset='recommended' must be 'paper'"):
        recommended.trajectory(ids)


# ---- the rest of the house


def test_the_estimate_is_what_a_step_holds():
    workload = Workload(RECURRENT, 1, batch_size=3, sequence_length=12)
    estimate = db.estimate_memory(RECURRENT, batch_size=3, sequence_length=12, budget="1GiB")
    assert "recurrent_depth_llama, 3 layers, B=1" in str(estimate) and set(estimate.fitting.values()) == {1}
    for name, fields in (("end to end", None), ("paper: all blocks in turn", {"preset": "paper"})):
        torch.manual_seed(0)
        measured = ledger_of(Way(name, fields), workload)
        assert estimate.ledgers[name].parts.total == pytest.approx(measured.parts.total, rel=0.02)


@pytest.mark.parametrize("way", [[], ["--end_to_end"]], ids=["blocks", "end to end"])
def test_the_recipe_trains_it_and_the_command_line_writes_with_it(way, tmp_path, capsys):
    (tmp_path / "train.txt").write_text("\n\n".join(f"{k} bottles of {'x' * (k % 7)} on the wall" for k in range(200)))
    sizes = "hidden_size=32, num_prelude_layers=1, num_core_layers=1, num_coda_layers=1, mean_recurrence=2, "
    metrics = train_causal_lm.main([
        "--config", str(CONFIGS / "gutenberg_recurrent.yaml"), "--train_file", str(tmp_path / "train.txt"), *way,
        "--config_overrides", f"{sizes}num_attention_heads=2, num_key_value_heads=2, intermediate_size=48",
        "--vocab_size", "300", "--sequence_length", "16", "--updates_per_block", "6", "--learning_rate", "1e-2",
        "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no", "--eval_strategy", "no",
        "--output_dir", str(tmp_path / "out"),
    ])  # fmt: skip
    assert metrics["eval_loss"] < 5.8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is (RecurrentDepthLlamaForCausalLM if way else db.DiffusionBlocksForCausalLM)
    if not way:
        main(["generate", str(tmp_path / "out"), "--prompt", "9 bottles", "--max_new_tokens", "4", "--num_steps", "3"])
        assert "9 bottles" in capsys.readouterr().out
