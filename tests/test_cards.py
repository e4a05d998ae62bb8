"""The model card: written with every save, true to the model, never over a person's own."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from test_trainer import make_trainer

import hf_diffusionblocks as db
from hf_diffusionblocks.saving.cards import GENERATED_BY


def read(folder) -> str:
    return (folder / "README.md").read_text()


def test_card_states_blocks_and_formulation(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = read(tmp_path)
    for k in range(2):
        layers = model.block_layers(k)
        count = sum(p.numel() for p in model.block_parameters(k))
        level = " | ({:.4g}, {:.4g}]".format(*model.noise_schedule.interval(k)) if model.noise_schedule else ""
        assert f"| {k} | {layers[0]}-{layers[-1]}{level} | {count:,} |" in card
    for field in ("preset", "shared"):
        assert f"| {field} | {getattr(model.config, field)} |" in card
    assert "Not trained since its conversion" in card
    assert "$" not in card.replace("$ pip", "")


def test_card_metadata_is_what_the_hub_reads(plain_model, tmp_path):
    plain_model.config.name_or_path = "someone/plain-vit"
    db.convert(plain_model, 2, preset="paper").save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "transformers", "image-classification", "someone/plain-vit",
    )  # fmt: skip
    assert "diffusionblocks" in data.tags


def test_card_reports_training_and_survives_a_reload(plain_model, tmp_path):
    model = db.convert(plain_model, 2, preset="paper")
    model.config.training_report = {"dataset": "someone/images"}
    trainer = make_trainer(model, tmp_path, updates_per_block=2)
    trainer.train()
    result = trainer.evaluate()
    trainer.save_model()
    card = read(tmp_path)
    assert "optimizer steps: 4" in card and "updates of each block: [2, 2]" in card
    assert f"| eval_loss | {result['eval_loss']:.4f} |" in card
    memory = model.config.training_report["memory"]
    held = sum(memory[f"parameters{part}"] for part in (" and buffers, embeddings and head", ", layers", ", AdaLN"))
    assert held == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    one_block = max(sum(p.nbytes for p in model.block_parameters(k)) for k in range(2))
    shared = sum(p.nbytes for p in model.shared_parameters())
    # The label embeddings of an edm readout act only through z: every shared parameter has a gradient.
    assert memory["gradients"] == one_block + shared
    weights = sum(p.nbytes for p in model.parameters())
    assert 2 * weights <= memory["optimizer state"] <= 2 * weights + 1000  # and counts of steps
    assert all(f"| {part} | {size:,} |" in card for part, size in memory.items())
    assert "in the second step of each block" in card
    assert ModelCard.load(tmp_path / "README.md").data.datasets == ["someone/images"]

    db.DiffusionBlocksForImageClassification.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert "optimizer steps: 4" in read(tmp_path / "again")


def test_a_card_edited_by_a_person_is_kept(plain_model, tmp_path):
    model = db.convert(plain_model, 2, preset="paper")
    model.save_pretrained(tmp_path)
    edited = "\n".join(line for line in read(tmp_path).splitlines() if GENERATED_BY[0] not in line) + "\nMy words.\n"
    (tmp_path / "README.md").write_text(edited)
    model.save_pretrained(tmp_path)
    assert read(tmp_path) == edited


class FakeHub:
    """Stands for `huggingface_hub.HfApi`: keeps the text of what is uploaded."""

    def __init__(self):
        self.uploaded = {}

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})()

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as stream:
                self.uploaded[operation.path_in_repo] = stream.read()


@pytest.mark.parametrize("remote_card", [None, "# A card that a person wrote\n"])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_push_to_hub_uploads_shards_and_card(plain_model, tmp_path, monkeypatch, way, remote_card):
    from transformers.utils import hub

    fake = FakeHub()
    monkeypatch.setattr(hub, "hf_api", lambda *args, **kwargs: fake)
    generic = hub.ModelCard("This model card has been automatically generated") if remote_card is None else None
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: generic or hub.ModelCard(remote_card))
    model = db.convert(plain_model, 2, preset="paper")
    if way == "push_to_hub":
        model.push_to_hub("me/blocks")
    else:
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/blocks")
    assert {"config.json", "model-00003-of-00003.safetensors", "model.safetensors.index.json"} <= set(fake.uploaded)
    card = fake.uploaded["README.md"].decode()
    assert ("cut into 2 blocks" in card) is (remote_card is None)
    assert remote_card is None or remote_card in card


def test_trainer_writes_this_card(plain_model, tmp_path):
    trainer = make_trainer(db.convert(plain_model, 2, preset="paper"), tmp_path)
    trainer.create_model_card(model_name="blocks")
    assert "cut into 2 blocks" in read(tmp_path)
