"""A pretrained model, converted, is that model: logits in float32 bit for bit, and back again without this package.

(Images are checked in test_families.py, whole generations in test_generation.py.)
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import randomized
from families import RESNET, SWIN, TEXT_CONFIGS, grid
from process_scenarios import VIT
from transformers import AutoModelForCausalLM, DynamicCache, ViTForImageClassification

import hf_diffusionblocks as db

RECOMMENDED = {"preset": "recommended", "local_head_layers": 0}
FIELDS = {
    "two blocks": {**RECOMMENDED, "num_blocks": 2},
    "four blocks": {**RECOMMENDED, "num_blocks": 4},
    "uneven": {**RECOMMENDED, "num_blocks": 2, "layers_per_block": [3, 1]},
    "local heads": {**RECOMMENDED, "num_blocks": 4, "local_head_layers": 1},
    "parts of its own": {**RECOMMENDED, "num_blocks": 2, "shared": "per_block"},
}
ATTENTION = ["sdpa", "eager"]


@pytest.fixture(params=FIELDS.values(), ids=FIELDS.keys())
def fields(request) -> dict:
    return request.param


@pytest.fixture(params=TEXT_CONFIGS.values(), ids=TEXT_CONFIGS.keys())
def text_config(request):
    return copy.deepcopy(request.param)


@pytest.fixture(params=ATTENTION)
def plain(text_config, request):
    torch.manual_seed(0)
    return randomized(AutoModelForCausalLM.from_config(text_config, attn_implementation=request.param)).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 48, (5, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padding() -> torch.Tensor:
    """Rows padded on the left by 0 to 4 tokens."""
    return (torch.arange(10) >= torch.arange(5)[:, None]).long()


def step_by_step(model, ids: torch.Tensor, prompt: int, **masks) -> torch.Tensor:
    """Logits of a prompt, and then of one token after another, with a cache."""
    cache, logits = DynamicCache(config=model.config), []
    for start, end in [(0, prompt), *((k, k + 1) for k in range(prompt, ids.shape[1]))]:
        now = {"position_ids": masks["position_ids"][:, start:end]} if "position_ids" in masks else {}
        if "attention_mask" in masks:
            now["attention_mask"] = masks["attention_mask"][:, :end]
        logits.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **now).logits)
    return torch.cat(logits, 1)


def positions(padding: torch.Tensor) -> torch.Tensor:
    """As `generate` counts them: from the first token that is none of padding."""
    return (padding.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def test_a_padded_batch(plain, fields, ids, padding):
    model = db.convert(plain, **fields)
    masks = {"attention_mask": padding, "position_ids": positions(padding)}
    expected = plain(ids, **masks).logits
    assert torch.equal(model(ids, **masks).logits, expected)
    assert not torch.equal(expected, plain(ids).logits)  # the padding is seen to


@torch.no_grad()
def test_a_padded_batch_token_by_token(plain, fields, ids, padding):
    model = db.convert(plain, **fields)
    masks = {"attention_mask": padding, "position_ids": positions(padding)}
    assert torch.equal(step_by_step(model, ids, 5, **masks), step_by_step(plain, ids, 5, **masks))


# ---- what there is beside

BESIDE = ("output_hidden_states", "output_attentions")


@pytest.mark.parametrize(**grid(lambda case: case.is_local and case.config not in (RESNET, SWIN)))
@pytest.mark.parametrize("asked_by", ["the call", "the config"])
@torch.no_grad()
def test_hidden_states_and_attentions(case, asked_by):
    plain, inputs, asked = copy.deepcopy(case).plain(), case.inputs(), dict.fromkeys(BESIDE, True)
    plain.set_attn_implementation("eager")
    expected, model = plain(**inputs, **asked), db.convert(plain, 2, **case.fields).eval()
    if asked_by == "the config":
        model.config.output_hidden_states = model.config.output_attentions = True
        asked = {}
    found = model(**inputs, **asked)
    for name, count in (("hidden_states", 5), ("attentions", 4)):
        assert len(found[name]) == count and all(map(torch.equal, found[name], expected[name]))


@pytest.mark.parametrize(**grid(lambda case: case.has_known_targets))
@pytest.mark.parametrize("name", BESIDE)
def test_a_block_has_nothing_beside_its_logits_nor_has_a_walk(case, name):
    model = case.model().eval()
    with pytest.raises(ValueError, match=f"{name} must not be given with block_index"):
        model(**case.rows(), block_index=0, **{name: True})
    if not case.is_local:
        with pytest.raises(ValueError, match=f"{name} must not be given with preset='paper'"):
            model(**case.inputs(), **{name: True})


# ---- and back

READER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
torch.set_num_threads(1)
for job in json.load(open(sys.argv[1])):
    auto = AutoModelForImageClassification if job["vit"] else AutoModelForCausalLM
    model, loading = auto.from_pretrained(job["folder"], output_loading_info=True)
    assert not any(loading.values()), loading
    assert type(model).__name__ == job["class"], type(model)
    with torch.no_grad():
        torch.save(model(torch.load(job["input"])).logits, job["output"])
assert not any(name.split(".")[0] == "hf_diffusionblocks" for name in sys.modules)
"""


def test_the_plain_model_generates_as_the_source_was_told_to():
    source = AutoModelForCausalLM.from_config(TEXT_CONFIGS["gpt2"])
    source.generation_config.update(eos_token_id=[5, 6, 7], do_sample=True, top_k=3)
    model = db.convert(source, **next(iter(FIELDS.values())))
    plain = model.to_plain()
    assert plain.generation_config.to_dict() == source.generation_config.to_dict()
    assert plain.config is not model.config.source_config


@torch.no_grad()
def test_stock_transformers_reads_the_trained_model_in_a_process_without_this_package(ids, tmp_path):
    """Every family and kind of cut, all in one process; the weights are not those of the source."""
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    sources = {name: (AutoModelForCausalLM.from_config(config), ids) for name, config in TEXT_CONFIGS.items()}
    sources["vit"] = (ViTForImageClassification(VIT), images)
    jobs, expected = [], []
    for name, (plain, batch) in sources.items():
        for number, fields in enumerate(FIELDS.values()):
            model = randomized(db.convert(plain, **fields)).eval()
            folder = tmp_path / f"{name}-{number}"
            model.to_plain().save_pretrained(folder)
            torch.save(batch, folder / "input.pt")
            expected.append(model(batch).logits)
            assert not torch.equal(expected[-1], plain.eval()(batch).logits)
            jobs.append({
                "folder": str(folder), "input": str(folder / "input.pt"), "output": str(folder / "output.pt"),
                "class": type(plain).__name__, "vit": name == "vit",
            })  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-P", "-c", READER, str(tmp_path / "jobs.json")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for job, logits in zip(jobs, expected):
        assert torch.equal(torch.load(job["output"]), logits), job["folder"]
