"""The recipe of image generation: sources of data and models, samples while training, what is refused; losses by block."""

from __future__ import annotations

import io
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from families import CASES, DIT, Case, trainer_of
from PIL import Image
from transformers import AutoModel
from transformers.integrations import TensorBoardCallback, WandbCallback

import hf_diffusionblocks as db
from hf_diffusionblocks.backbones.dit import DiTConfig
from hf_diffusionblocks.models.image_generation.samples import as_grid
from hf_diffusionblocks.recipes import train_image_generation

pytestmark = pytest.mark.usefixtures("own_cache")
SIZES = "num_layers=2, num_attention_heads=2, attention_head_dim=8, patch_size=4, sample_size=8"
MODEL = ["--num_blocks", "2", "--config_name", "dit-transformer-2d", "--config_overrides", f"{SIZES}, in_channels=1"]
TRAINING = [
    "--updates_per_block", "2", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--num_inference_steps",
    "2", "--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--save_strategy", "no",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Gray, wider than high: 12 x 10."""
    return [Image.fromarray(a) for a in np.random.default_rng(0).integers(0, 256, (20, 10, 12), dtype=np.uint8)]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, pictures) -> Path:
    """Labels 0 to 2, without names."""
    rows = []
    for picture in pictures:
        picture.save(buffer := io.BytesIO(), format="png")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    path = tmp_path_factory.mktemp("parquet") / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": rows, "label": [k % 3 for k in range(20)]}), path)
    return path


@pytest.fixture
def data(parquet) -> list[str]:
    return ["--train_file", str(parquet)]


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A model of diffusers with five classes."""
    folder = tmp_path_factory.mktemp("stock")
    config = dict(part.split("=") for part in SIZES.split(", "))
    sizes = {name: int(value) for name, value in config.items()}
    DiTTransformer2DModel(**sizes, in_channels=1, num_embeds_ada_norm=5).save_pretrained(folder)
    return folder


def run(*options) -> dict[str, float]:
    return train_image_generation.main([str(option) for option in options])


def prepared(*options) -> db.DiffusionBlocksTrainer:
    """The Trainer that the recipe would run."""
    types = (
        train_image_generation.ModelArguments, train_image_generation.DataArguments,
        train_image_generation.SampleArguments, train_image_generation.BlocksArguments,
        db.DiffusionBlocksTrainingArguments,
    )  # fmt: skip
    arguments = train_image_generation.common.parse(types, [str(option) for option in options])
    return train_image_generation.prepare(*arguments)[0]


# ---- the recipe


def test_a_fresh_model_of_classes(tmp_path, data):
    metrics = run(
        *MODEL, *TRAINING, *data, "--label_column", "label", "--random_flip", "--sample_every_n_steps", 3,
        "--guidance_scale", 2, "--output_dir", tmp_path,
    )  # fmt: skip
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is db.DiffusionBlocksForImageGeneration and model.num_classes == 3
    assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
    assert model.config.training_report["updates_per_block"] == [2, 2]
    blocks = [metrics[f"eval_loss_block_{k}"] for k in range(2)]
    assert metrics["eval_loss"] == pytest.approx(np.mean(blocks)) and blocks[0] != blocks[1]
    card = (tmp_path / "README.md").read_text()
    assert "eval_loss_block_1" in card and "![Samples](samples/final.png)" in card
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["final.png", "step-00000003.png"]
    assert Image.open(tmp_path / "samples" / "final.png").size == (24, 24)  # three classes, thrice


def test_images_are_cropped_and_scaled_and_measured(tmp_path, data, pictures):
    trainer = prepared(*MODEL, *TRAINING, *data, "--validation_split", 0, "--output_dir", tmp_path)
    rows = trainer.train_dataset[:]
    assert list(rows) == ["pixel_values"] and rows["pixel_values"].shape == (20, 1, 8, 8)
    square = pictures[3].crop((1, 0, 11, 10)).resize((8, 8), Image.Resampling.LANCZOS)
    within = (slice(None), slice(1, -1))  # (at the cut, a resized crop and a cropped resize differ)
    assert np.abs(rows["pixel_values"][3, 0].numpy() - (np.asarray(square) / 127.5 - 1))[within].max() < 0.05
    assert trainer.model.config.sigma_data == pytest.approx(rows["pixel_values"].std(correction=0).item(), abs=1e-4)


def test_half_of_the_training_images_are_mirrored(tmp_path, data):
    made = [prepared(*MODEL, *TRAINING, *data, *flip, "--output_dir", tmp_path) for flip in ([], ["--random_flip"])]
    plain, flipped = (trainer.train_dataset[:]["pixel_values"] for trainer in made)
    mirrored = [not torch.equal(one, other) for one, other in zip(plain, flipped)]
    assert 2 < sum(mirrored) < len(plain) - 2
    for one, other, is_mirrored in zip(plain, flipped, mirrored):
        assert torch.allclose(one.flip(-1) if is_mirrored else one, other, atol=1e-6)
    assert torch.equal(made[0].eval_dataset[:]["pixel_values"], made[1].eval_dataset[:]["pixel_values"])


def test_folders_of_images_in_color_of_no_class(tmp_path, pictures):
    (tmp_path / "images").mkdir()
    for number, picture in enumerate(pictures[:8]):
        picture.save(tmp_path / "images" / f"{number}.png")
    model = [*MODEL[:-1], f"{SIZES}, in_channels=3"]
    metrics = run(*model, *TRAINING, "--train_dir", tmp_path / "images", "--output_dir", tmp_path / "out")
    assert "eval_loss_block_1" in metrics
    assert Image.open(tmp_path / "out" / "samples" / "final.png").size == (32, 32)  # 16 of no class


def test_end_to_end_is_one_block_that_denoises_at_all_levels(tmp_path, data):
    run(*MODEL, *TRAINING, *data, "--end_to_end", "--output_dir", tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert model.num_blocks == 1 and model.config.training_report["steps"] == 2
    assert list(model.block_layers(0)) == [0, 1]


def test_pretrained_weights_are_kept_and_labels_are_its_classes(tmp_path, stock, data):
    options = ["--model_name_or_path", stock, "--label_column", "label", "--learning_rate", 0, "--sigma_data", 0.25]
    run(*TRAINING, "--num_blocks", 2, *data, *options, "--output_dir", tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    expected = DiTTransformer2DModel.from_pretrained(stock).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.backbone.state_dict().items())
    assert model.config.id2label == {0: "0", 1: "1", 2: "2", 3: "LABEL_3", 4: "LABEL_4"}
    assert model.config.sigma_data == 0.25


BAD_INPUTS = {
    "U-Net": (["--model_name_or_path", "{unet}"], "UNet2DModel cannot be cut into blocks, and must be"),
    "another task": (["--config_name", "vit"], "task='image-generation' must be 'image-classification' for model_type='vit'"),
    "latents": ([*MODEL[:-1], SIZES], "in_channels=4 must be 1 (grayscale) or 3 (RGB): this recipe trains on pixels"),
    "small images": ([*MODEL[:-1], f"{SIZES[:-1]}16, in_channels=1"], "12 x 10, smaller than the model's sample_size=16"),
    "classes": ([*MODEL[:-1], "num_embeds_ada_norm=9"], "must not set num_embeds_ada_norm"),
    "labels": (
        ["--model_name_or_path", "{stock}", "--num_blocks", "2", "--label_column", "far"], "labels ['17'] are beyond the model's"
    ),
    "guidance": ([*MODEL, "--guidance_scale", "2"], "guidance_scale=2.0 needs label_column"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_one_line_before_any_work(tmp_path, parquet, stock, options, message):
    table = pyarrow.parquet.read_table(parquet)
    far = [17 if row == 19 else 0 for row in range(20)]
    pyarrow.parquet.write_table(table.append_column("far", pyarrow.array(far)), tmp_path / "far.parquet")
    if "{unet}" in options:
        UNet2DModel(
            sample_size=8, block_out_channels=(4,), norm_num_groups=2, down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",), layers_per_block=1, add_attention=False,
        ).save_pretrained(tmp_path / "unet")  # fmt: skip
    options = [option.format(unet=tmp_path / "unet", stock=stock) for option in options]
    with pytest.raises(SystemExit) as stop:
        run(*options, "--train_file", tmp_path / "far.parquet", "--output_dir", tmp_path / "out")
    assert stop.value.code.startswith("train_image_generation.py: error: ") and len(stop.value.code.splitlines()) == 1
    assert message in stop.value.code


def no_image(folder: Path) -> None:
    (folder / "19.png").write_bytes(b"no image")


def deep_image(folder: Path) -> None:
    Image.fromarray(np.full((10, 12), 60000, dtype=np.uint16)).save(folder / "19.png")


def small_image(folder: Path) -> None:
    Image.new("L", (12, 7)).save(folder / "19.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_image, "image_column='image' of row 19 of the train data is no image: cannot identify image file"),
        (deep_image, "row 19 of the train data has PIL's mode 'I;16', and must have 8 bits a channel"),
        (small_image, "image_column='image' has an image of 12 x 7, smaller than the model's sample_size=8"),
    ],
)
def test_one_image_of_many_that_cannot_be_trained_on_is_found_before_any_work(tmp_path, pictures, monkeypatch, spoil, message):
    monkeypatch.setattr(train_image_generation, "MEASURED", 1)
    (images := tmp_path / "images").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(images / f"{number:02}.png")
    spoil(images)
    with pytest.raises(SystemExit) as stop:
        run(*MODEL, *TRAINING, "--train_dir", images, "--validation_split", 0, "--output_dir", tmp_path / "out")
    assert message in stop.value.code and not (tmp_path / "out").exists()


# ---- samples while training


GRAY = DiTConfig(**{**DIT.stock_fields(), "in_channels": 1})


def drawn(trainer, **options) -> db.SampleImages:
    callback = db.SampleImages(trainer, num_inference_steps=2, **options)
    trainer.add_callback(callback)
    return callback


@contextmanager
def zero_averages(trainer):
    """Has the model hold zeros."""
    own = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in own.items()})
    yield
    trainer.model.load_state_dict(own)


def test_samples_are_of_the_averages_and_the_same_noise_and_leave_no_trace(tmp_path, monkeypatch):
    """Training with samples ends as training without."""
    monkeypatch.setattr(db.DiffusionBlocksTrainer, "averaged_weights", zero_averages)
    case, states = Case(GRAY), []
    for every in (0, 2):
        trainer = trainer_of(case.model(), case, tmp_path / str(every), updates_per_block=2)
        callback = drawn(trainer, every_n_steps=every, class_labels=[0, 4, 5])
        torch.manual_seed(0)
        trainer.train()
        states.append([*trainer.model.state_dict().values(), torch.get_rng_state()])
        assert trainer.model.training
    assert all(torch.equal(one, other) for one, other in zip(*states))
    assert [path.name for path in sorted(callback.folder.iterdir())] == ["final.png", "step-00000002.png"]
    with zero_averages(trainer):
        expected = as_grid(trainer.model.predict([0, 4, 5], num_inference_steps=2).images)
    for path in callback.folder.iterdir():
        assert np.array_equal(Image.open(path), expected)


def test_pictures_go_to_the_trackers_of_the_trainer(tmp_path, monkeypatch):
    case = Case(GRAY)
    trainer = trainer_of(case.model(), case, tmp_path, updates_per_block=1)
    tensorboard, wandb = (each.__new__(each) for each in (TensorBoardCallback, WandbCallback))
    writer = tensorboard.tb_writer = MagicMock()
    tensorboard.logging_dir, tensorboard._SummaryWriter, wandb._wandb = str(tmp_path), None, None
    module = SimpleNamespace(log=MagicMock(), Image=lambda picture: picture.size)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for tracker in (tensorboard, wandb):
        trainer.add_callback(tracker)
    drawn(trainer, every_n_steps=1)
    trainer.train()
    assert [(call.args[0], call.args[1].shape, call.args[2]) for call in writer.add_image.call_args_list] == [
        ("samples", (32, 32, 3), step) for step in (1, 2)
    ]
    assert [call.args[0] for call in module.log.call_args_list] == [
        {"samples": (32, 32), "train/global_step": step} for step in (1, 2)
    ]


def test_what_cannot_be_drawn(tmp_path):
    case = Case(GRAY, {"shared": "per_block"})
    trainer = trainer_of(case.model(resident_blocks=[1]), case, tmp_path, updates_per_block=2)
    with pytest.raises(ValueError, match="every_n_steps=-1 must be a whole number from 0"):
        drawn(trainer, every_n_steps=-1)
    with pytest.raises(ValueError, match="must lie in 0..4"):
        drawn(trainer, class_labels=[6])
    with pytest.raises(ValueError, match="in_channels=2 must be 1"):
        drawn(trainer_of(CASES["dit"].model(), CASES["dit"], tmp_path))
    callback = drawn(trainer, every_n_steps=1)
    trainer.train()
    assert not callback.folder.exists()


# ---- losses of blocks


def test_losses_of_blocks_in_evaluation_count_a_batch_by_its_rows(tmp_path):
    """And their mean is the loss; with labels or without."""
    case = CASES["dit"]
    trainer = trainer_of(case.model(), case, tmp_path)
    for columns in (["pixel_values", "class_labels"], ["pixel_values"]):
        data = trainer.eval_dataset.select(range(11)).select_columns(columns)
        trainer.args.per_device_eval_batch_size = 4
        metrics = trainer.evaluate(data, metric_key_prefix="test")
        model, expected = trainer.model.eval(), torch.zeros(2)
        for start in (0, 4, 8):
            rows = data.with_format("torch")[start : start + 4]
            expected += model(**rows).block_losses.detach() * len(rows["pixel_values"]) / 11
        assert [metrics[f"test_loss_block_{k}"] for k in range(2)] == pytest.approx(expected.tolist(), rel=1e-5)
        assert metrics["test_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
