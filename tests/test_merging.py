"""Jobs joined into one model, and those that do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from test_jobs import CARRIED, CONFIGS, same_weights, texts, trained
from process_scenarios import INDEPENDENT, made
from transformers import AutoModelForCausalLM

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import main


@pytest.fixture
def jobs(texts, tmp_path) -> list:
    """Two jobs, each with a block of its own."""
    folders = [tmp_path / "job0", tmp_path / "job1"]
    for block, folder in enumerate(folders):
        trained(made(CONFIGS["gpt2"], INDEPENDENT, [block]), folder, texts)
    return folders


def test_jobs_merge_to_what_one_run_after_the_other_makes(jobs, texts, tmp_path):
    db.merge_blocks(jobs, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    whole = made(CONFIGS["gpt2"], INDEPENDENT)
    for block in (0, 1):
        trained(whole, tmp_path / "whole", texts, train_blocks=[block])
    assert merged.state_dict().keys() == whole.state_dict().keys()
    assert same_weights(merged.state_dict(), whole.state_dict())
    assert merged.config.training_report["updates_per_block"] == [3, 3]


def test_carried_jobs_merge_in_order(texts, tmp_path):
    trained(made(CONFIGS["llama"], CARRIED, [0]), tmp_path / "job0", texts)
    second = made(CONFIGS["llama"], CARRIED)
    second.load_state_dict(db.load_block_state_dict(tmp_path / "job0", 0), strict=False)
    trained(second, tmp_path / "job1", texts, train_blocks=[1])
    db.merge_blocks([tmp_path / "job1", tmp_path / "job0"], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert same_weights(merged.state_dict(), second.state_dict())


@pytest.mark.parametrize("saves", [True, False], ids=["by the Trainer", "by the model"])
def test_a_job_goes_on_from_the_folder_of_another(saves, texts, tmp_path):
    """However it is saved, it says what it trained itself, and not what that folder said."""
    trained(made(CONFIGS["llama"], CARRIED), tmp_path / "job0", texts, train_blocks=[0])
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "job0")
    trained(second, tmp_path / "job1", texts, saves, train_blocks=[1])
    if not saves:
        second.save_pretrained(tmp_path / "job1")
    db.merge_blocks([tmp_path / "job0", tmp_path / "job1"], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert same_weights(merged.state_dict(), second.state_dict())


def test_a_block_trained_around_another_predecessor_is_refused(texts, tmp_path):
    trained(made(CONFIGS["llama"], CARRIED, [0]), tmp_path / "job0", texts)
    trained(made(CONFIGS["llama"], CARRIED), tmp_path / "job1", texts, train_blocks=[1])  # around a fresh block 0
    with pytest.raises(ValueError, match=r"block 0, around which .*job1 trained block 1, differs"):
        db.merge_blocks([tmp_path / "job0", tmp_path / "job1"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("fields", [INDEPENDENT, CARRIED], ids=["independent", "carried"])
@pytest.mark.parametrize("silent", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("moved", [None, 0, 1])
def test_a_folder_that_does_not_tell_what_it_trained_must_agree_with_the_others(moved, silent, fields, texts, tmp_path):
    """Trained by hand and saved, for example: what it holds besides may be what its block was trained around."""
    first = made(CONFIGS["llama"], fields)
    trained(first, tmp_path / "job0", texts, train_blocks=[0])
    second = made(CONFIGS["llama"], fields)
    second.load_state_dict(first.state_dict())
    if moved is not None:
        second.block_parameters(moved)[0].data += 1e-3
    folders = [tmp_path / "job0", tmp_path / "job1"]
    second.save_pretrained(folders[1])
    change_provenance(folders[1], {"updates": [0, 0]})
    for job in silent:
        change_provenance(folders[job], None)
    for jobs in (folders, folders[::-1]):
        if moved is None:
            db.merge_blocks(jobs, tmp_path / "merged")
            merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
            assert same_weights(merged, second.state_dict())
            continue
        message = rf"job\d does not tell what it trained \(its index has no provenance\): block {moved} differs"
        with pytest.raises(ValueError, match=message):
            db.merge_blocks(jobs, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_what_only_a_folder_that_does_not_tell_holds_is_taken_from_it(jobs, tmp_path):
    change_provenance(jobs[1], None)
    db.merge_blocks(jobs, tmp_path / "merged")
    assert same_weights(db.load_block_state_dict(tmp_path / "merged", 1), db.load_block_state_dict(jobs[1], 1))


def change_provenance(folder, provenance: dict | None):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["provenance"] = provenance
    path.write_text(json.dumps(index))


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_jobs_that_do_not_fit_are_refused(jobs, tmp_path):
    first, second = jobs
    output = tmp_path / "merged"
    with pytest.raises(ValueError, match="at least one folder"):
        db.merge_blocks([], output)
    with pytest.raises(ValueError, match="jobs='job0' must be a list"):
        db.merge_blocks("job0", output)
    with pytest.raises(ValueError, match="output_dir='.*job0' must not be one of the jobs"):
        db.merge_blocks([first, second], first)
    with pytest.raises(ValueError, match="block 1 is in none of"):
        db.merge_blocks([first], output)
    with pytest.raises(NotADirectoryError, match="nowhere is not a folder"):
        db.merge_blocks([first, tmp_path / "nowhere"], output)
    shutil.copytree(second, tmp_path / "twice")
    with pytest.raises(ValueError, match="block 1 was trained by both"):
        db.merge_blocks([first, second, tmp_path / "twice"], output)
    for number, folder in enumerate((first, second)):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"the": number}}}))
    with pytest.raises(ValueError, match=r"tokenizers differ: .*job0/tokenizer.json and .*job1/tokenizer.json"):
        db.merge_blocks([first, second], output)
    change_config(second, sigma_max=70.0)
    with pytest.raises(ValueError, match=r"sigma_max=80.0 in .*job0, 70.0 in .*job1"):
        db.merge_blocks([first, second], output)
    assert not output.exists()


def test_of_the_plain_model_s_config_the_field_that_differs_is_named(jobs, tmp_path):
    file = jobs[1] / "config.json"
    config = json.loads(file.read_text())
    config["source_config"]["pad_token_id"] = 7
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"differ: source_config.pad_token_id=.* in .*job0, 7 in .*job1"):
        db.merge_blocks(jobs, tmp_path / "merged")


def test_jobs_with_other_targets_are_refused(jobs, texts, tmp_path):
    torch.manual_seed(1)  # other fresh weights
    other = db.convert(CONFIGS["gpt2"], 2, resident_blocks=[1], **INDEPENDENT)
    trained(other, tmp_path / "other", texts)
    with pytest.raises(ValueError, match=r"what all blocks share .* differs .*target_embeddings.table"):
        db.merge_blocks([jobs[0], tmp_path / "other"], tmp_path / "merged")


def test_merge_on_the_command_line(jobs, tmp_path, capsys):
    main(["merge", str(tmp_path / "merged"), *map(str, jobs)])
    assert "block" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").resident_blocks == [0, 1]
    with pytest.raises(SystemExit):
        main(["merge", str(tmp_path / "merged"), *map(str, jobs)])
    assert "holds a model already: --overwrite replaces it" in capsys.readouterr().err
