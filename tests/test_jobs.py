"""Jobs that hold and train some of the blocks. (Joining them: test_merging.py.)"""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from families import MODERNBERT
from process_scenarios import GPT2, INDEPENDENT, LLAMA, VIT, made
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import main
from hf_diffusionblocks.tasks import TASKS, backbone_for

CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "vit": VIT}
FORMULATIONS = {
    "paper": {},
    "paper-own": {"shared": "per_block"},
    "carried": {"preset": "recommended", "local_head_layers": 0},
    "carried-own": {"preset": "recommended", "local_head_layers": 0, "shared": "per_block"},
}
CARRIED = {"preset": "recommended", "local_head_layers": 0, "shared": "per_block"}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(params=FORMULATIONS)
def fields(request) -> dict:
    return FORMULATIONS[request.param]


@pytest.fixture
def texts() -> Dataset:
    tokens = torch.randint(64, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


@pytest.fixture
def images() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict(
        {"pixel_values": torch.randn(16, 1, 8, 8, generator=generator).tolist(), "labels": [k % 5 for k in range(16)]}
    )


def trained(model, folder, texts, saves: bool = True, **arguments):
    """The trainer of a job, run."""
    args = db.DiffusionBlocksTrainingArguments(
        str(folder), updates_per_block=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to=[],
        disable_tqdm=True, save_strategy="no", **arguments,
    )  # fmt: skip
    trainer = db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=texts, eval_dataset=texts)
    trainer.train()
    if saves:
        trainer.save_model()
    return trainer


def same_weights(part: dict, whole: dict) -> bool:
    return all(torch.equal(tensor, whole[name]) for name, tensor in part.items())


# ---- what is loaded


@pytest.mark.parametrize("origin", ["fresh", "pretrained", "folder"])
def test_a_part_is_that_part_of_the_whole_model(config, fields, origin, tmp_path):
    source = config
    if origin != "fresh":
        source = backbone_for(config).plain_class(config)
    if origin == "folder":
        source.save_pretrained(tmp_path)
        source = tmp_path
    whole, part = made(source, fields), made(source, fields, resident_blocks=[1])
    expected = {name for name in whole.state_dict() if whole.block_of_parameter(name) in (None, 1)}
    assert part.state_dict().keys() == expected
    assert same_weights(part.state_dict(), whole.state_dict())


def test_a_stock_model_may_start_the_weights_of_its_parts(tmp_path):
    """ModernBERT's does, of a head that a job without the last block has not."""
    fields = {"preset": "recommended", "shared": "per_block"}
    whole, part = made(MODERNBERT, fields), made(MODERNBERT, fields, resident_blocks=[0])
    assert same_weights(part.state_dict(), whole.state_dict())
    part.save_pretrained(tmp_path)
    assert same_weights(type(part).from_pretrained(tmp_path, resident_blocks=[0]).state_dict(), part.state_dict())


@pytest.mark.parametrize("origin", ["pretrained", "folder"])
@pytest.mark.parametrize("resident", [None, [0]], ids=["whole", "part"])
def test_local_heads_start_as_the_last_layers(config, origin, resident, tmp_path):
    plain = backbone_for(config).plain_class(config)
    plain.save_pretrained(tmp_path)
    fields = {"preset": "recommended", "local_head_layers": 2}
    model = made(tmp_path if origin == "folder" else plain, fields, resident)
    layers = plain.get_submodule(model.layers_path)[-2:]
    assert same_weights(layers.state_dict(), model.local_heads[0].state_dict())


@pytest.mark.parametrize("origin", ["pretrained", "folder"])
@pytest.mark.parametrize("num_blocks, resident", [(2, [1]), (3, [0, 2]), (3, [1])], ids=str)
def test_a_part_has_the_local_heads_of_its_own_blocks(config, num_blocks, resident, origin, tmp_path):
    """The last block has none."""
    source = backbone_for(config).plain_class(config)
    if origin == "folder":
        source.save_pretrained(tmp_path)
        source = tmp_path
    fields = {"preset": "recommended", "local_head_layers": 1, "num_blocks": num_blocks}
    whole, part = made(source, fields), made(source, fields, resident)
    expected = {name for name in whole.state_dict() if whole.block_of_parameter(name) in (None, *resident)}
    assert part.state_dict().keys() == expected
    assert same_weights(part.state_dict(), whole.state_dict())


def test_nothing_of_a_part_is_on_the_meta_device(config, fields):
    part = made(config, fields, resident_blocks=[0])
    assert not any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))


def test_a_saved_model_is_loaded_in_part(config, fields, tmp_path):
    whole = made(config, fields)
    whole.save_pretrained(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()  # block 0's file is not needed
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if "00002-of" not in file}
    del index["metadata"]["blocks"]["0"]
    path.write_text(json.dumps(index))
    part = type(whole).from_pretrained(tmp_path, resident_blocks=[1])
    assert part.resident_blocks == [1]
    assert same_weights(part.state_dict(), whole.state_dict())
    assert not part.training


def test_a_part_is_not_loaded_as_the_whole(tmp_path):
    made(CONFIGS["gpt2"], CARRIED, resident_blocks=[1]).save_pretrained(tmp_path)
    logging.set_verbosity_error()  # Transformers would list the missing weights, too
    with pytest.raises(ValueError, match=r"lacks the blocks \[0\] of 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["blocks", "other blocks", "plain", "sharded plain"])
def test_a_part_is_not_saved_over_what_it_does_not_have(kind, tmp_path):
    whole = made(CONFIGS["gpt2"], CARRIED)
    part = made(CONFIGS["gpt2"], CARRIED, resident_blocks=[1])
    there = {"blocks": whole, "other blocks": made(CONFIGS["gpt2"], CARRIED, [0])}.get(kind, whole.backbone)
    there.save_pretrained(tmp_path, max_shard_size="30KB" if kind == "sharded plain" else "1GB")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"save_directory=.* holds model.*, which a model with resident_blocks=\[1\]"):
        part.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    whole.save_pretrained(tmp_path)  # one that has all may


def test_a_job_saves_over_its_own_blocks(texts, tmp_path):
    part = made(CONFIGS["gpt2"], INDEPENDENT, resident_blocks=[1])
    part.save_pretrained(tmp_path)
    trained(part, tmp_path, texts).save_model()
    again = type(part).from_pretrained(tmp_path, resident_blocks=[1])
    assert same_weights(again.state_dict(), part.state_dict())


def test_a_block_that_is_not_loaded_does_not_run(texts):
    part = made(CONFIGS["gpt2"], INDEPENDENT, resident_blocks=[1]).eval()
    with pytest.raises(ValueError, match="block is not loaded"):
        part(torch.tensor(texts["input_ids"]))


OWN = {"independent": ({"shared": "per_block"}, [0, 1]), "carried": (CARRIED, [0])}


@pytest.mark.parametrize("fields, tied", OWN.values(), ids=OWN)
@pytest.mark.parametrize("resident", [None, [0], [1]], ids=str)
def test_a_head_is_tied_to_the_embedding_of_its_own_block(fields, tied, resident, tmp_path):
    """Where the plain model ties them; a carried block past the first has no embedding."""
    model = made(CONFIGS["gpt2"], fields, resident)
    model.save_pretrained(tmp_path)
    for each in (model, type(model).from_pretrained(tmp_path, resident_blocks=model.resident_blocks)):
        heads = {block: each.blocks[block].readout_parts.lm_head.weight for block in each.resident_blocks}
        for block in set(tied) & set(heads):
            assert heads[block] is each.blocks[block].embedding_parts.transformer.wte.weight
        assert len({id(weight) for weight in heads.values()}) == len(heads)
        assert len(each.all_tied_weights_keys) == len(set(tied) & set(heads))
    for block in model.resident_blocks:  # a tied weight is in the file once
        kept = db.load_block_state_dict(tmp_path, block)
        assert sum(map(torch.numel, kept.values())) == sum(p.numel() for p in model.block_parameters(block))


def test_what_the_plain_model_does_not_tie_is_not_tied():
    assert not made(CONFIGS["llama"], {"shared": "per_block"}).all_tied_weights_keys


# ---- training


def test_statistics_of_shared_batch_norms_stay_so_that_jobs_can_be_merged(tmp_path):
    """MobileNetV2 has some before its stages, and after them."""
    plain = tiny_model("image-classification", "mobilenet_v2")
    rows = TASKS["image-classification"].example(plain.config, 16, None)
    data = [{name: tensor[row] for name, tensor in rows.items()} for row in range(16)]
    model = db.convert(plain, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for block in (0, 1):  # each around the one before
        trained(model, tmp_path / str(block), data, train_blocks=[block], train_shared=False)
        assert len({module.training for module in model.modules()}) == 1
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {model.block_of_parameter(name) for name in moved if "running_mean" in name} == {0, 1}
    db.merge_blocks([tmp_path / "0", tmp_path / "1"], tmp_path / "whole")
    assert same_weights(model.state_dict(), type(model).from_pretrained(tmp_path / "whole").state_dict())


def test_a_job_evaluates_the_label_free_loss_of_its_block(texts, tmp_path):
    part = made(CONFIGS["gpt2"], CARRIED, resident_blocks=[0])
    trainer = trained(part, tmp_path, texts)
    loss = trainer.evaluate()["eval_loss"]
    tokens = torch.tensor(texts["input_ids"])
    part.eval()
    logits = part.blocks[0].head(part.blocks[0].run_stock({"input_ids": tokens}).read[:, :-1].flatten(0, 1))
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    "fields, resident, arguments, message",
    [
        (INDEPENDENT, [0], {"train_blocks": [1]}, r"train_blocks=\[1\] must be loaded"),
        (INDEPENDENT, None, {"train_blocks": [2]}, r"train_blocks=\[2\] must be a list of different blocks of 0\.\.1"),
        (INDEPENDENT, None, {"train_blocks": 0}, r"train_blocks=0 must be a list of different blocks of 0\.\.1"),
        (INDEPENDENT, None, {"train_blocks": 1}, r"train_blocks=1 must be a list of different blocks of 0\.\.1"),
        (CARRIED, [1], {}, r"needs the earlier blocks \[0\]"),
        ({}, None, {"train_blocks": [1]}, "train_shared=True with train_blocks"),
        ({}, [1], {}, "train_shared=True with train_blocks"),
    ],
)  # fmt: skip
def test_jobs_that_cannot_be_are_refused(fields, resident, arguments, message, texts, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained(made(CONFIGS["gpt2"], fields, resident), tmp_path, texts, **arguments)


OURS = ("sigma", "noise", "generator", "block_index", "block_input", "return_logits", "text_walk")


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ["Dataset", "list"])
def test_a_column_of_the_data_is_not_taken_for_an_argument_of_ours(family, kind, texts, images, tmp_path):
    data = images if family == "vit" else texts
    more = data
    for name in OURS:
        more = more.add_column(name, list(range(16)))
    results = []
    for rows in (data, more):
        model = made(CONFIGS[family], {"preset": "recommended", "local_head_layers": 0})
        trainer = trained(model, tmp_path, rows if kind == "Dataset" else list(rows))
        results.append((model.state_dict(), trainer.evaluate()["eval_loss"]))
    assert same_weights(results[1][0], results[0][0]) and results[0][1] == results[1][1]


def test_inspect_shows_what_a_job_holds(tmp_path, capsys):
    made(CONFIGS["gpt2"], INDEPENDENT, [1]).save_pretrained(tmp_path)
    main(["inspect", "--json", str(tmp_path)])
    described = json.loads(capsys.readouterr().out)
    assert [block["block"] for block in described["blocks"]] == [1]
    assert "| not loaded |" in (tmp_path / "README.md").read_text()
