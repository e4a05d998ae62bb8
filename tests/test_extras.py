"""What `pip install hf-diffusionblocks` alone can do: every package that it does not bring along is taken away."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_diffusionblocks as db

#: argv[1] names top-level packages; for this process they are not installed.
WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.partition(".")[0] in gone else self.finder.find_spec(name, *args)

    def find_distributions(self, context):
        found = getattr(self.finder, "find_distributions", lambda context: ())(context)
        return (each for each in found if each.name.replace("-", "_") not in gone)

gone = set(sys.argv[1].split(","))
sys.meta_path[:] = map(Without, sys.meta_path)
import torch
torch.set_num_threads(1)
import hf_diffusionblocks as db
assert not gone & {name.partition(".")[0] for name in sys.modules}
"""
TRAINING = """
from transformers import AutoModelForCausalLM, GPT2Config

config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0)
model = db.convert(config, 2, preset="recommended", local_head_layers=0)
rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
args = db.DiffusionBlocksTrainingArguments(
    sys.argv[2], max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="steps", save_steps=1
)
trainer = db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
trainer.train()
trainer.evaluate()
trainer.save_model()
again = AutoModelForCausalLM.from_pretrained(sys.argv[2])
assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
again.to_plain().save_pretrained(sys.argv[2] + "/plain")
print(db.estimate_memory(config, 2, 1, 8, preset="recommended", local_head_layers=0))
"""
VERBS = """
from hf_diffusionblocks.cli import main
from transformers import ViTConfig

folder = sys.argv[2] + "/images"
ViTConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, image_size=8, patch_size=4).save_pretrained(folder)
main(["convert", folder + "/config.json", folder + "/blocks", "--fresh", "--num_blocks", "2"])
main(["merge", folder + "/merged", folder + "/blocks"])
main(["inspect", folder + "/merged"])
main(["card", folder + "/merged"])
"""
MISSING = {
    "SampleImages": ("db.SampleImages", "diffusers"),
    "DiffusionBlocksImagePipeline": ("db.DiffusionBlocksImagePipeline", "diffusers"),
    "plots": (
        "from hf_diffusionblocks.recipes import plots; plots.plot_noise_partition(db.NoiseSchedule(2), '')",
        "matplotlib",
    ),
}
#: Runs each of these, and writes how it ended, as JSON.
USES = """
import json, traceback

ends = {}
for name, use in json.loads(sys.argv[3]).items():
    try:
        exec(use)
        ends[name] = "no error"
    except Exception as error:
        ends[name] = traceback.format_exception_only(error)[-1].strip()
print(json.dumps(ends))
"""
COMMANDS = """
for task in ("causal-lm", "finetune"):
    try:
        main(["train", task])
    except SystemExit as stop:
        assert stop.code == 1
"""


def others() -> set[str]:
    """Top-level packages that are installed here, but not by this library."""
    needed, new = set(), {"hf-diffusionblocks"}
    while new:
        needed |= new
        wanted = [Requirement(line) for name in new for line in requires(name) or ()]
        wanted = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
        new = {canonicalize_name(each.name) for each in wanted} - needed
    return {
        package
        for package, owners in packages_distributions().items()
        if not needed & set(map(canonicalize_name, owners)) and not package.startswith("_")
    }


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT + script, ",".join(others()), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_others_are_those_of_the_extra_and_more():
    assert {"datasets", "peft", "matplotlib", "sklearn", "PIL", "pytest"} <= others()
    assert not {"torch", "transformers", "accelerate", "safetensors", "numpy", "yaml", "hf_diffusionblocks"} & others()


def test_the_library_alone_is_enough(tmp_path):
    """To train, to be used by commands, and to say of what else it needs what that is; commands do, in one line."""
    result = run(TRAINING + VERBS + COMMANDS + USES, tmp_path, json.dumps({name: use for name, (use, _) in MISSING.items()}))
    assert result.returncode == 0, result.stderr
    ends = json.loads(result.stdout.splitlines()[-1])
    for name, (_, package) in MISSING.items():
        end = ends[name]
        assert end.startswith("hf_diffusionblocks.extras.MissingExtraError: "), name
        extra = "diffusers" if package == "diffusers" else "recipes"
        assert end.endswith(f" needs {package}: pip install hf-diffusionblocks[{extra}]"), name
    lines = [
        f"diffusionblocks train: error: a recipe needs {package}: pip install hf-diffusionblocks[{extra}]"
        for package, extra in (("datasets", "recipes"), ("trl", "sft"))
    ]
    assert [line for line in result.stderr.splitlines() if " error: " in line] == lines


def test_a_name_that_is_none_is_named():
    with pytest.raises(AttributeError, match="module 'hf_diffusionblocks' has no attribute 'lore'"):
        db.lore
