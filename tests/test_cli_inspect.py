"""`diffusionblocks inspect` and `card`: what they say of a saved model, and that bad input is one line on standard error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from cli_runs import INDEX, blocks_folder, contents, edit_json, fail, plain_folder, saved
from families import CASES

import hf_diffusionblocks as db
from hf_diffusionblocks.configuration import USER_FIELDS
from hf_diffusionblocks.cli import inspect, main
from hf_diffusionblocks.saving import cards

# ---- inspect


def check_description(found: dict, model, folder: Path) -> None:
    schedule = model.noise_schedule
    for k, block in enumerate(found["blocks"]):
        assert block["block"] == k
        assert block["layers"] == list(model.block_layers(k))
        assert block.get("sigma") == (schedule and list(schedule.interval(k)))
        assert block.get("training_sigma") == (schedule and list(schedule.interval(k, schedule.overlap)))
        assert block["parameters"] == sum(p.numel() for p in model.block_parameters(k))
        assert block["bytes"] == (folder / block["file"]).stat().st_size
    shared = [found["shared"]] if found["shared"] else []
    assert sum(part["parameters"] for part in shared) == sum(p.numel() for p in model.shared_parameters())
    files = {part["file"] for part in (*shared, *found["blocks"])}
    assert files == {path.name for path in folder.glob("*.safetensors")}


def test_inspect_json_is_the_models_own(saved, capsys):
    model, folder = saved
    main(["inspect", "--json", str(folder)])
    found = json.loads(capsys.readouterr().out)
    check_description(found, model, folder)
    assert (found["num_blocks"], found["num_hidden_layers"], found["source_model_type"]) == (2, 4, "vit")
    assert found["task"] == "image-classification"
    formulation = found["formulation"]
    numbers = {name: value for name in USER_FIELDS if (value := getattr(model.config, name)) is not None}
    assert formulation == {name: value for name, value in numbers.items() if name != "num_blocks"}
    assert found["training_report"] is None


def test_inspect_prints_table_formulation_and_report(plain_model, tmp_path, capsys):
    model = db.convert(plain_model, num_blocks=2, preset="paper")
    model.config.training_report = {"results": {"eval_accuracy": 0.5}, "steps": 12}
    model.save_pretrained(tmp_path / "model")
    main(["inspect", str(tmp_path / "model")])
    printed = capsys.readouterr().out
    assert "vit for image-classification, 4 layers in 2 blocks" in printed
    (shared,) = [line.split() for line in printed.splitlines() if line.startswith("shared")]
    size = (tmp_path / "model" / "model-00001-of-00003.safetensors").stat().st_size
    assert shared[1:] == [
        f"{sum(p.numel() for p in model.shared_parameters()):,}", "model-00001-of-00003.safetensors", f"{size:,}"
    ]  # fmt: skip
    assert "(0.3012, 80]" in printed and "(0.2278, 80]" in printed
    assert "  preset: paper\n" in printed
    assert "training report:\n  results:\n    eval_accuracy: 0.5\n  steps: 12\n" in printed


def test_inspect_of_blocks_that_share_nothing(tmp_path, capsys):
    CASES["dit, own"].model().save_pretrained(tmp_path)
    main(["inspect", "--json", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert (found["shared"], len(found["blocks"])) == (None, 2)


def test_inspect_loads_no_weights(blocks_folder, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    main(["inspect", str(blocks_folder)])
    assert "not trained yet" in capsys.readouterr().out


def test_inspect_fetches_headers_alone_from_the_hub(blocks_folder, monkeypatch, capsys, fail):
    main(["inspect", "--json", str(blocks_folder)])
    local = json.loads(capsys.readouterr().out)

    class Hub:
        def parse_safetensors_file_metadata(self, repo_id, file):
            return inspect.parse_local_safetensors_file_metadata(blocks_folder / file)

    class Metadata:
        size = 1234

    config = db.DiffusionBlocksConfig.from_pretrained(blocks_folder)
    monkeypatch.setattr(inspect.AutoConfig, "from_pretrained", lambda source: config)
    monkeypatch.setattr(inspect, "cached_file", lambda source, file: str(blocks_folder / file))
    monkeypatch.setattr(inspect, "HfApi", Hub)
    monkeypatch.setattr(inspect, "get_hf_file_metadata", lambda url: Metadata)
    main(["inspect", "--json", "someone/blocks"])
    remote = json.loads(capsys.readouterr().out)
    for here, there in zip([local["shared"], *local["blocks"]], [remote["shared"], *remote["blocks"]]):
        assert there == here | {"bytes": 1234}
    shard = blocks_folder / "model-00002-of-00003.safetensors"
    shard.write_bytes((blocks_folder / "model-00003-of-00003.safetensors").read_bytes())
    assert f"{shard.name} lacks " in fail("inspect", "someone/blocks")[1]


def test_inspect_without_the_hub_names_model_and_file(blocks_folder, monkeypatch, fail):
    assert "nobody/nothing: " in fail("inspect", "nobody/nothing")[1]
    config = db.DiffusionBlocksConfig.from_pretrained(blocks_folder)
    monkeypatch.setattr(inspect.AutoConfig, "from_pretrained", lambda source: config)
    monkeypatch.setattr(inspect, "cached_file", lambda source, file: str(blocks_folder / file))
    line = fail("inspect", "nobody/nothing")[1]  # the config is in the cache, its weights are not
    assert "nobody/nothing: the header of model-00001-of-00003.safetensors cannot be read: " in line


def test_inspect_names_what_is_wrong_with_config_or_index(blocks_folder, fail):
    index, config = blocks_folder / INDEX, blocks_folder / "config.json"
    edit_json(config, num_blocks=1)
    assert f"{index} maps 0, 1, shared, but the config says num_blocks=1" in fail("inspect", blocks_folder)[1]
    edit_json(config, num_blocks=2, preset="both")
    assert "preset='both' must be one of" in fail("inspect", blocks_folder)[1]
    edit_json(config, preset="paper")
    index.write_text('{"weight_map": {}, "metadata": {}}')
    assert f"{index} does not map blocks to files" in fail("inspect", blocks_folder)[1]
    index.write_text("{")
    assert f"{index} is damaged" in fail("inspect", blocks_folder)[1]
    index.unlink()
    assert INDEX in fail("inspect", blocks_folder)[1]
    config.write_text("{")
    assert str(blocks_folder) in fail("inspect", blocks_folder)[1]


@pytest.mark.parametrize("form", ["folder", "file"])
def test_inspect_wants_a_diffusionblocks_model(form, plain_folder, fail):
    source = plain_folder if form == "folder" else plain_folder / "config.json"
    status, line = fail("inspect", source)
    assert status == 1
    assert f"{source} is not a DiffusionBlocks model (model_type='vit')" in line


# ---- card


def test_card_is_the_one_of_the_save(saved, capsys):
    model, folder = saved
    card = folder / "README.md"
    expected = card.read_text()
    card.unlink()
    main(["card", str(folder)])
    assert card.read_text() == expected == cards.render(model, folder)
    assert capsys.readouterr().out == f"{card}: written\n"
    edit_json(folder / "config.json", training_report={"steps": 77})
    main(["card", str(folder)])
    assert "optimizer steps: 77" in card.read_text()


def test_card_of_a_person_is_kept_unless_forced(blocks_folder, capsys):
    card = blocks_folder / "README.md"
    card.write_text("# Mine\n")
    main(["card", str(blocks_folder)])
    assert card.read_text() == "# Mine\n"
    assert capsys.readouterr().out == f"{card}: kept, a person wrote or edited it; --force replaces it\n"
    main(["card", "--force", str(blocks_folder)])
    assert "## Blocks" in card.read_text()


@pytest.mark.parametrize("options", [[], ["--force"]])
@pytest.mark.parametrize("failing", ["write", "rename"])
def test_failed_card_leaves_the_old_one(failing, options, blocks_folder, monkeypatch, fail):
    before = contents(blocks_folder)

    def half(path, text, encoding):
        with open(path, "w") as stream:
            stream.write(text[:10])
        raise OSError("disk full")

    def refuse(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr(Path, "write_text", half)
        else:
            patch.setattr(os, "replace", refuse)
        assert fail("card", blocks_folder, *options) == (1, "diffusionblocks card: error: disk full")
    assert contents(blocks_folder) == before


def test_card_wants_a_diffusionblocks_folder(plain_folder, tmp_path, fail):
    assert f"FOLDER={tmp_path / 'nowhere'} is not a folder" in fail("card", tmp_path / "nowhere")[1]
    status, line = fail("card", plain_folder)
    assert (status, "is not a DiffusionBlocks model" in line) == (1, True)
    assert not (plain_folder / "README.md").exists()
