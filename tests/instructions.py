"""What the recipes that fine-tune text run on: a tiny Llama with a chat template, and rows of every form."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from text_recipe_runs import paragraphs
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hf_diffusionblocks as db
from hf_diffusionblocks.recipes.text import ModelArguments, trained_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A stock Llama and its tokenizer, with a chat template."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = trained_tokenizer(paragraphs(0, 60), ModelArguments(vocab_size=300), is_main=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
        max_position_embeddings=256, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Rows of every form."""
    folder = tmp_path_factory.mktemp("instructions")
    rows = [(name, text.strip()[: 10 + 9 * (number % 4)]) for number, (name, text) in enumerate(topics.items())][:24]
    forms = {
        "chats": [{"messages": chat((name, answer[:8]), ("More", answer[8:]))} for name, answer in rows],
        "prompts": [{"prompt": f"{name}: ", "completion": answer} for name, answer in rows],
        "texts": [{"text": f"{name}: {answer}"} for name, answer in rows],
        "nulls": [{"prompt": "Why?", "completion": answer} for answer in ("So.", None)],
        "silent": [{"messages": chat(("Why?", answer))} for answer in ("So.", None)],
        "flat": [{"messages": f"{name}: {answer}"} for name, answer in rows],
        "unasked": [{"prompt": "", "completion": answer} for _, answer in rows],
        "numbers": [{"number": number} for number in range(3)],
    }
    for form, made in forms.items():
        (folder / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return {form: str(folder / f"{form}.jsonl") for form in forms} | {"nowhere": str(folder / "nowhere.jsonl")}


def save_masked(model: str, folder: Path, num_blocks: int) -> db.DiffusionBlocksForMaskedLM:
    """The plain model as a masked one, saved with a tokenizer that has a mask token, as the recipe saves one."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    tokenizer.save_pretrained(folder)
    made = db.convert(model, num_blocks, "fill-mask", mask_token_id=tokenizer.mask_token_id)
    made.save_pretrained(folder)
    return made


def chat(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": said} for turn in turns for role, said in zip(("user", "assistant"), turn)]
