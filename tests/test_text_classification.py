"""The paper's classes of texts: what a block is shown, and where it is read out. (What every family does is in
test_families.py, how walks go in test_image_classification.py.)"""

from __future__ import annotations

import pytest
import torch
from conftest import randomized
from families import CASES, TEXT_CONFIGS
from transformers import AutoModelForSequenceClassification

import hf_diffusionblocks as db
from hf_diffusionblocks.diffusion.gaussian import precondition

DECODERS = [*TEXT_CONFIGS]
IDS = torch.randint(1, 48, (3, 6), generator=torch.Generator().manual_seed(1))


def made(name: str, **fields):
    torch.manual_seed(0)
    config = type(TEXT_CONFIGS[name])(**{**TEXT_CONFIGS[name].to_dict(), "num_labels": 5, "pad_token_id": 0})
    plain = randomized(AutoModelForSequenceClassification.from_config(config)).eval()
    return plain, db.convert(plain, preset="paper", **fields).eval()


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_block_starts_as_the_plain_model_of_text_and_noisy_label(name):
    """AdaLN at its start: the class is read out where the label stands, after the tokens."""
    plain, model = made(name, num_blocks=1)
    labels, sigma = torch.tensor([0, 1, 4]), torch.tensor([0.05, 0.5, 5.0])
    noise = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    found = model(IDS, labels=labels, block_index=0, sigma=sigma, noise=noise).logits
    z = model.label_embeddings.vectors()[labels] + sigma[:, None] * noise
    label = precondition(sigma, model.config.sigma_data).input[:, None] * z + model.noisy_labels[0].position[0]
    embeds = torch.cat([plain.get_input_embeddings()(IDS), label[:, None]], 1)
    if name == "gpt2":  # (the label's position is one of its own)
        embeds[:, -1] -= plain.transformer.wpe.weight[6]
    hidden = plain.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, plain.score(hidden[:, -1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(name, side):
    _, model = made(name, num_blocks=2)
    model = randomized(model)
    tokens, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, length in enumerate((6, 4, 1)):
        there = slice(0, length) if side == "right" else slice(8 - length, 8)
        tokens[row, there], mask[row, there] = IDS[row, :length], 1
    together = model(tokens, attention_mask=mask).logits
    for row, length in enumerate((6, 4, 1)):
        assert torch.allclose(together[row], model(IDS[row : row + 1, :length]).logits[0], atol=1e-5)


def test_resized_embeddings_are_those_of_all_blocks(tmp_path):
    model = CASES["gpt2, classes, paper, own"].model().eval()
    model.resize_token_embeddings(100)
    model(IDS + 50, labels=torch.tensor([0, 1, 2]), block_index=1)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(IDS + 50).logits, model(IDS + 50).logits)


def test_what_these_decoders_have_not_is_refused():
    model = CASES["llama, classes, paper"].model()
    with pytest.raises(ValueError, match="token_type_ids must not be given with preset='paper'"):
        model(IDS, token_type_ids=torch.zeros_like(IDS), labels=torch.tensor([0, 1, 2]), block_index=0)
