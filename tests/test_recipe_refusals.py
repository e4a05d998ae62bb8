"""What recipes refuse: in one line, before any work. Of a check that recipes share, one of them is asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from image_recipe_runs import captioned, folders, options
from PIL import Image
from recipe_runs import (
    MODEL, OVERRIDES, QUIET, SIZES, TRAINING, digits, files, folder, masked, model, recipe_of, refusal, vit, writer,
)  # fmt: skip

from hf_diffusionblocks.recipes import (
    checks, common, finetune_image_model, train_causal_lm, train_image_classification, train_masked_lm,
    train_text_classification,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("own_cache")


def refused(recipe, given: list[str], capsys) -> str:
    return refusal(recipe.main, given, Path(recipe.__file__).name, capsys)


# ---- training of text

TRAIN = ["--train_file", "{train}"]
LLAMA = [*SIZES, "--config_name", "llama", "--config_overrides"]
BAD_FILES = {
    "fake.parquet": b"no parquet", "json.json": b"[1, {", "latin.txt": b"\xe9t\xe9\n\n" * 9, "empty.txt": b"",
    "void.jsonl": b"", "short.txt": b"one word", "texts.csv": b"text,label",
}  # fmt: skip
TEXT = {
    "no model": (TRAIN, "exactly one of model_name_or_path, config_name"),
    "no data": (MODEL, "exactly one of dataset_name, train_file, not none"),
    "no such file": ([*MODEL, "--train_file", "x.txt"], "train_file='x.txt' must be an existing file"),
    "file of another kind": ([*MODEL, "--train_file", "{texts}"], "must end in one of .txt, .parquet, .json, .jsonl"),
    "not parquet": ([*MODEL, "--train_file", "{fake}"], "train_file='{fake}' cannot be read: Parquet magic bytes"),
    "not json": ([*MODEL, "--train_file", "{json}"], "train_file='{json}' cannot be read: "),
    "not UTF-8": ([*MODEL, "--train_file", "{latin}"], "train_file='{latin}' cannot be read: 'utf-8' codec can't decode"),
    "empty": ([*MODEL, "--train_file", "{empty}"], "train_file='{empty}' cannot be read: it is empty"),
    "empty lines": ([*MODEL, *TRAIN, "--validation_file", "{void}"], "validation_file='{void}' cannot be read: it is empty"),
    "no batch": ([*MODEL, *TRAIN, "--per_device_train_batch_size", "0"], "per_device_train_batch_size=0 must be a whole"),
    "no micro-batch": ([*MODEL, *TRAIN, "--gradient_accumulation_steps", "0"], "gradient_accumulation_steps=0 must be a"),
    "no rate": ([*MODEL, *TRAIN, "--learning_rate", "nan"], "learning_rate=nan must be a finite number from 0"),
    "no seed": ([*MODEL, *TRAIN, "--seed", "-1"], "seed=-1 must be a whole number from 0"),
    "no such column": ([*MODEL, *TRAIN, "--text_column", "x"], "text_column='x' must be a column of the train data"),
    "not text": ([*MODEL, *TRAIN, "--text_column", "id"], "text_column='id' must hold text, in the train data it"),
    "one document": ([*MODEL, "--train_file", "{short}"], "validation_split=0.1 of 1 row of data cannot be set aside"),
    "too little text": (
        [*MODEL, "--train_file", "{short}", "--validation_split", "0"], "the train data has too little text for one"
    ),
    "too long": (
        [*MODEL, *TRAIN, "--sequence_length", "25"], "sequence_length=25 must be at most the model's max_position_embeddings=24"
    ),
    "too short": ([*MODEL, *TRAIN, "--sequence_length", "1"], "sequence_length=1 must be at least 2"),
    "few tokens": ([*MODEL, *TRAIN, "--vocab_size", "256"], "vocab_size=256 must be at least 257"),
    "two vocabularies": ([*LLAMA, "vocab_size=99", *TRAIN], "config_overrides must not set vocab_size"),
    "no tokenizer": ([*MODEL, *TRAIN, "--tokenizer_name", "{out}"], "{out} has no tokenizer"),
    "blocks of the plain": ([*MODEL, *TRAIN, "--end_to_end", "--train_blocks", "0"], "must not be set with end_to_end"),
    "bound of a block": (
        [*MODEL, *TRAIN, "--eval_nll_bound", "1", "--train_blocks", "0", "--train_shared", "false"], "needs all blocks"
    ),
    "a job that moves what is shared": (
        [*MODEL, *TRAIN, "--train_blocks", "0"], "train_shared=True with train_blocks=[0] of 2 blocks: separate jobs"
    ),
    "no such block": ([*MODEL, *TRAIN, "--train_blocks", "2"], "train_blocks=[2] must be a list of different blocks of 0..1"),
    "averages of the plain": ([*MODEL, *TRAIN, "--end_to_end", "--ema_decay", "0.9"], "ema_decay=0.9 must not be set with"),
    "bound of the plain": ([*MODEL, *TRAIN, "--end_to_end", "--eval_nll_bound", "1"], "must be 0 with end_to_end"),
    "bound of nothing": (
        [*MODEL, *TRAIN, "--validation_split", "0", "--eval_nll_bound", "1"], "eval_nll_bound=1 needs validation data"
    ),
    "negative bound": ([*MODEL, *TRAIN, "--eval_nll_bound", "-1"], "eval_nll_bound=-1 must be at least 0"),
    "bad override": ([*LLAMA, "depth=2", *TRAIN], "config_overrides='depth=2' must be"),
    "width zero": ([*LLAMA, "hidden_size=0", *TRAIN], "config_overrides='hidden_size=0' makes no model that runs"),
    "inner width zero": ([*LLAMA, "intermediate_size=0", *TRAIN], "makes a model with weights of no width"),
    "no heads": ([*LLAMA, "num_attention_heads=0", *TRAIN], "=0' makes no config: ZeroDivisionError"),
    "no such activation": ([*LLAMA, "hidden_act=foo", *TRAIN], "makes no model that runs: KeyError: 'foo'"),
    "the same end to end": ([*LLAMA, "head_dim=0", *TRAIN, "--end_to_end"], "makes no model that runs"),
    "image model": ([*SIZES, *TRAIN, "--config_name", "vit"], "task='text-generation' must be 'image-classification'"),
    "bad field": ([*MODEL, *TRAIN, "--num_blocks", "3"], "num_blocks=3 must be at most"),
    "bad share": ([*MODEL, *TRAIN, "--validation_split", "1"], "validation_split=1.0 must be"),
    "nothing to resume": ([*MODEL, *TRAIN, "--resume_from_checkpoint", "last"], "no checkpoint"),
    "no checkpoint": ([*MODEL, *TRAIN, "--resume_from_checkpoint", "{out}"], "must be a checkpoint's folder"),
    "unknown option": ([*MODEL, *TRAIN, "--block_size", "3"], "--block_size"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("given", "message"), TEXT.values(), ids=TEXT.keys())
def test_of_training_text(tmp_path, folder, capsys, given, message):
    names = {"train": folder / "train.parquet", "out": tmp_path}
    for name, content in BAD_FILES.items():
        names[name.split(".")[0]] = tmp_path / name
        (tmp_path / name).write_bytes(content)
    given = [*(option.format(**names) for option in given), "--use_cpu", "--output_dir", str(tmp_path / "out")]
    assert message.format(**names) in refused(train_causal_lm, given, capsys)


def test_a_tokenizer_too_large_for_pretrained_weights_and_of_masks_that_it_has_not(tmp_path, folder, model, capsys):
    given = [
        "--train_file",
        str(folder / "train.parquet"),
        "--model_name_or_path",
        model,
        "--output_dir",
        str(tmp_path),
        *SIZES,
    ]
    tokenizer = recipe_of("causal-lm").text.load_tokenizer(model)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path)
    line = refused(train_causal_lm, [*given, "--tokenizer_name", str(tmp_path)], capsys)
    assert "has 301 tokens, but the model knows 300" in line
    line = refused(train_masked_lm, [*given, "--mask_token_id", "300"], capsys)
    assert "mask_token_id=300 must be a token of the tokenizer, 0..299" in line


def test_a_job_that_could_not_be_saved_does_not_begin(tmp_path, folder, capsys, monkeypatch):
    job = [*MODEL, *TRAINING, "--train_file", str(folder / "train.parquet"), "--shared", "per_block"]
    job += ["--output_dir", str(tmp_path), "--train_blocks"]
    train_masked_lm.main([*job, "0"])
    monkeypatch.setattr(common, "train", lambda *args: pytest.fail("it has begun"))
    line = refused(train_masked_lm, [*job, "1"], capsys)
    assert "holds model-00002-of-00003.safetensors, which a model with resident_blocks=[1] alone would delete" in line
    monkeypatch.setattr(checks.os, "access", lambda *args, **kwargs: False)
    assert "must be a folder that can be written to" in refused(train_masked_lm, [*job, "0"], capsys)


BERT = ["--config_name", "bert", "--config_overrides", OVERRIDES["bert"], "--max_length", "24"]
A_TEXT = "text_column='text' must have a text in every row, of at least one token"
CLASSES = {
    "formulation": ({}, ["--preset", "paper"], "preset='paper' must be 'recommended' for model_type='bert'"),
    "too long": ({}, ["--max_length", "99"], "max_length=99 must be at most the model's max_position_embeddings=24"),
    "too short": ({}, ["--max_length", "0"], "max_length=0 must be at least 2"),
    "empty": ({"text": "", "label": "sea"}, [], A_TEXT),
    "null": ({"text": None, "label": "sea"}, [], A_TEXT),
    "several labels": ({"label": ["sea"]}, [], "label_column='label' must hold one label a row, in the train data it holds"),
}


@pytest.mark.parametrize(("row", "given", "message"), CLASSES.values(), ids=CLASSES)
def test_of_classes_of_texts(row, given, message, tmp_path, capsys):
    rows = [{"text": "sail", "label": "sea"}] * 9 if "text" in row or not row else []
    rows += [{"text": "sail", **row}] * 3 if row else []
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    given = ["--train_file", str(tmp_path / "rows.jsonl"), *BERT, *QUIET, "--output_dir", str(tmp_path), *given]
    assert message in refused(train_text_classification, given, capsys)


# ---- training on images

VIT = ["--num_blocks", "2", "--config_name", "vit", "--config_overrides", OVERRIDES["vit"]]
IMAGES = {
    "two models": ([*VIT, "--model_name_or_path", "x", "--train_file", "{train}"], "not model_name_or_path='x' and"),
    "two sources": ([*VIT, "--train_file", "{train}", "--train_dir", "x"], "train_file='{train}' and train_dir='x'"),
    "no image": (
        [*VIT, "--train_file", "{hole}", "--validation_split", "0"],
        "image_column='image' of row 3 of the train data is no image: 'NoneType'",
    ),
    "not images": ([*VIT, "--train_file", "{train}", "--image_column", "label"], "'label' must hold images"),
    "patch above image": (
        [*VIT[:-1], "image_size=4, patch_size=16", "--train_file", "{train}"], "makes no model that runs: RuntimeError"
    ),
    "text model": (
        ["--num_blocks", "2", "--config_name", "llama", "--train_file", "{train}"],
        "task='image-classification' must be 'fill-mask', 'text-generation', 'text-classification' for model_type='llama'",
    ),
    "unknown key": (["--config", "{yaml}"], "'num_block' is not an option"),
    "a new classifier that nothing would train": (
        ["--model_name_or_path", "{vit}", "--num_blocks", "2", "--train_shared", "false", "--train_file", "{train}"],
        "train_shared=False must be True: the labels are new",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), IMAGES.values(), ids=IMAGES.keys())
def test_of_training_on_images(tmp_path, digits, vit, capsys, given, message):
    (tmp_path / "options.yaml").write_text("num_block: 3\n")
    table = pyarrow.parquet.read_table(digits / "train.parquet").slice(0, 3)
    hole = pyarrow.table({"image": [*table["image"].to_pylist(), None], "label": [0, 1, 0, 1]})
    pyarrow.parquet.write_table(hole, tmp_path / "hole.parquet")
    names = {
        "train": digits / "train.parquet",
        "hole": tmp_path / "hole.parquet",
        "yaml": tmp_path / "options.yaml",
        "vit": vit,
    }
    given = [*(option.format(**names) for option in given), "--output_dir", str(tmp_path / "out")]
    assert message.format(**names) in refused(train_image_classification, given, capsys)


@pytest.mark.parametrize("recipe", [train_image_classification, train_text_classification])
def test_classes_in_another_order(tmp_path, recipe, capsys):
    """In files that say the names of their classes, the numbers would mean others."""
    for name, names in (("train", ["no", "yes"]), ("validation", ["yes", "no"])):
        features = Features({"text": Value("string"), "image": datasets.Image(), "label": ClassLabel(names=names)})
        rows = {"text": ["a", "b"], "image": [Image.new("L", (8, 8))] * 2, "label": [0, 1]}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    given = [f"--{name}_file={tmp_path / name}.parquet" for name in ("train", "validation")]
    kind = BERT if recipe is train_text_classification else VIT
    line = refused(recipe, [*QUIET, *kind, *given, "--output_dir", str(tmp_path / "out")], capsys)
    assert "must have those of the training data, in their order: ['no', 'yes']" in line


# ---- tuning

CHATS, PLAIN = ["--data", "{chats}"], ["--model", "{model}"]
WRITER, MASKED, ANSWERS = ["--model", "{writer}", *CHATS], ["--model", "{masked}", *CHATS], [*PLAIN, *CHATS]
DIGITS = ["--model", "{vit}", "--train_file", "{digits}"]
TUNING = {
    "no model": ("finetune", CHATS, "required: --model"),
    "no such model": ("finetune", ["--model", "{nowhere}", *CHATS], "nowhere"),
    "no such file": ("finetune", [*PLAIN, "--data", "{nowhere}"], "nowhere.jsonl"),
    "no text": ("finetune", [*PLAIN, "--data", "{numbers}"], "must have a column 'messages', or columns 'prompt' and"),
    "rank without adapters": ("finetune", [*ANSWERS, "--lora_r", "4"], "lora_r=4 needs lora"),
    "clipping without gradients": ("finetune", [*ANSWERS, "--optimizer_in_backward"], "max_grad_norm=1.0 must be 0"),
    "kept without streaming": ("finetune", [*ANSWERS, "--keep", "2"], "keep='2' needs stream"),
    "completions of texts": (
        "finetune", [*PLAIN, "--data", "{texts}", "--assistant_only_loss"], "only supported for conversational datasets"
    ),
    "an optimizer that is not installed": (
        "finetune", [*ANSWERS, "--optim", "adamw_torch_8bit"], "needs torchao: pip install torchao"
    ),
    "too many kept": ("finetune", [*ANSWERS, "--stream", "--keep", "3"], "keep=3 must be a number of layers from 0 to 2"),
    # A number of a YAML file is read as if typed, also of an option that takes a number or a size.
    "too many kept by a file": ("finetune", [*ANSWERS, "--config", "{yaml}"], "keep=3 must be a number of layers from 0 to 2"),
    "a message that says nothing": (
        "finetune", [*PLAIN, "--data", "{silent}"], "must have content in every message: one is"
    ),
    "chats that are texts": (
        "finetune", [*PLAIN, "--data", "{flat}"], "must have lists of messages in 'messages', and has"
    ),
    "a row without an answer": ("finetune", [*PLAIN, "--data", "{nulls}"], "must have 'completion' in every row"),
    "all too long": (
        "finetune", [*PLAIN, "--data", "{prompts}", "--max_length", "1"], "nothing to learn within max_length=1"
    ),
    "cut already": ("finetune-masked-lm", [*MASKED, "--num_blocks", "1"], "num_blocks must not be given"),
    "none fits": ("finetune-masked-lm", [*ANSWERS, "--max_length", "3"], "an answer that fits max_length=3"),
    "masked too long": ("finetune-masked-lm", [*ANSWERS, "--max_length", "257"], "max_position_embeddings=256"),
    "answers without prompts": ("finetune-masked-lm", [*PLAIN, "--data", "{texts}"], "must have a column 'messages', or"),
    "of another kind": ("finetune-block-diffusion", ANSWERS, "has model_type='llama', and must have 'diffusion_gemma'"),
    "canvases too long": ("finetune-block-diffusion", [*WRITER, "--max_length", "1025"], "max_position_embeddings=1024"),
    "dtype": ("finetune-block-diffusion", [*WRITER, "--dtype", "int8"], "dtype='int8' must be one of fp32"),
    "share": ("finetune-block-diffusion", [*WRITER, "--self_conditioning", "2"], "self_conditioning=2.0 must be from 0"),
    "no classifier": ("finetune-image-classification", ["--model", "{nowhere}", *DIGITS[2:]], "nowhere"),
    "no such labels": ("finetune-image-classification", [*DIGITS, "--label_column", "x"], "'x' must be a column of the train"),
    "rank": ("finetune-image-classification", [*DIGITS, "--lora", "--lora_r", "0"], "`r` should be a positive integer value"),
}  # fmt: skip


@pytest.mark.parametrize(("task", "given", "message"), TUNING.values(), ids=TUNING)
def test_of_tuning(tmp_path, files, model, masked, writer, digits, vit, capsys, task, given, message):
    (tmp_path / "options.yaml").write_text("keep: 3\nstream: true\n")
    names = {"model": model, "masked": masked, "writer": writer, "digits": digits / "train.parquet", "vit": vit}
    given = [option.format(yaml=tmp_path / "options.yaml", **names, **files) for option in given]
    assert message in refused(recipe_of(task), [*QUIET, "--max_steps", "3", *given, "--output_dir", str(tmp_path)], capsys)


PIPELINES = {
    "no such model": (["--model", "no/where", "--data", "{data}"], "model='no/where' must be a folder or hub id"),
    "no pipeline": (["--model", "{data}", "--data", "{data}"], "it has no model_index.json"),
    "a U-Net": (["--model", "{unet}", "--data", "{data}"], "is a StableDiffusionPipeline, whose denoiser is a U-Net"),
    "no transformer": (["--model", "{bare}", "--data", "{data}"], "is a FluxPipeline without a transformer"),
    "code of others": (["--model", "{foreign}", "--data", "{data}"], "not 'MyPipeline': code of others is not run"),
    "no such data": (["--model", "{flux}", "--data", "no/where"], "no/where"),
    "no captions": (["--model", "{flux}", "--data", "{plain}"], "caption_column='text' must be a column of data="),
    "a caption missing": (["--model", "{flux}", "--data", "{holes}"], "caption_column='text' is empty in row 1"),
    "captions for classes": (["--model", "{dit}", "--data", "{data}"], "must have numbers of classes, not 'a red cat 0'"),
    "classes for captions": (
        ["--model", "{flux}", "--data", "{data}", "--caption_column", "label"], "must have texts, not 0: the pipeline takes",
    ),
    "adapters of DiT": (["--model", "{dit}", "--data", "{data}", "--lora"], "DiTPipeline loads no adapters"),
    "no such layers": (["--model", "{flux}", "--lora", "--lora_layers", "nothing", "{cached}"], "nothing"),
    "an odd size": (
        ["--model", "{dit}", "--data", "{data}", "--caption_column", "label", "--resolution", "64"], "draws [4, 8, 8]"
    ),
    "another model's cache": (["--model", "{sd3}", "{cached}"], "was made with another model"),
    "another cache": (["--model", "{flux}", "{cached}", "--embedded_guidance", "1"], "embedded_guidance=3.5, not 1.0"),
    "min-SNR of flow": (["--model", "{flux}", "{cached}", "--snr_gamma", "5"], "snr_gamma=5.0 must not be set"),
    "unknown weighting": (["--model", "{flux}", "--data", "{data}", "--weighting_scheme", "big"], "must be one of none"),
    "dtype": (["--model", "{flux}", "--data", "{data}", "--dtype", "float16"], "dtype='float16' must be"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory, folders, captioned, options) -> dict[str, str]:
    """Folders that are not what they should be; and a cache of Flux's."""
    output = str(tmp_path_factory.mktemp("flux"))
    finetune_image_model.main([*options("flux"), "--max_steps", "1", "--num_samples", "0", "--output_dir", output])
    root = tmp_path_factory.mktemp("bad")
    parts = {part: ["diffusers", "X"] for part in ("transformer", "vae", "scheduler")}
    indices = {
        "unet": {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]},
        "bare": {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]},
        "foreign": {"_class_name": "MyPipeline"} | parts,
    }
    for name, index in indices.items():
        (root / name).mkdir()
        (root / name / "model_index.json").write_text(json.dumps(index))
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(["a cat", " "])]
    for name, lines in (("plain", [{"file_name": row["file_name"], "size": 1} for row in rows]), ("holes", rows)):
        (root / name).mkdir()
        for number in (0, 1):
            shutil.copy(Path(captioned, f"{number}.png"), root / name)
        (root / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folders | {name: str(root / name) for name in (*indices, "plain", "holes")} | {"data": captioned}


@pytest.mark.parametrize(("given", "message"), PIPELINES.values(), ids=PIPELINES.keys())
def test_of_tuning_image_models(tmp_path, bad, options, capsys, given, message):
    if "{cached}" in given:
        given = [*options("flux")[2:], *(each for each in given if each != "{cached}")]
    given = [*QUIET, *(each.format(**bad) for each in given), "--num_samples", "0", "--output_dir", str(tmp_path)]
    assert message in refused(finetune_image_model, given, capsys)
