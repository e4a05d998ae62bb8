"""Streamed layers: what a step holds on the device and in host memory, measured and foretold, and what it costs."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig, OpenAIGPTConfig, DbrxConfig, HGNetV2Config,
    HrmTextConfig, SwinConfig,
)  # fmt: skip

import hf_diffusionblocks as db
from hf_diffusionblocks.memory import costs as costs_module
from hf_diffusionblocks.memory.costs import Costs, Operations, seconds_of_a_parameter
from hf_diffusionblocks.memory.formulas import EIGHT_BIT, FSDP, QLORA
from hf_diffusionblocks.memory.scenarios import followed_stream, ledger_of
from hf_diffusionblocks.memory.ways import CHECKPOINTING, LORA, Way, Workload, ways_of_stock_models, ways_of_streams
from hf_diffusionblocks.streaming import loss as streamed_loss

LAYERS = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
LLAMA = LlamaConfig(**LAYERS, vocab_size=1003, tie_word_embeddings=False)
GPT2 = GPT2Config(n_layer=4, n_embd=64, n_head=2, vocab_size=1003, n_positions=64, bos_token_id=0, eos_token_id=0)
OTHERS = {
    "gemma2": Gemma2Config(**LAYERS | {"num_hidden_layers": 2}, num_key_value_heads=2, head_dim=8, vocab_size=307),
    "openai-gpt": OpenAIGPTConfig(n_layer=3, n_embd=32, n_head=2, vocab_size=307, n_positions=64),  # checkpoints nothing
    "mixtral": MixtralConfig(**LAYERS | {"num_hidden_layers": 2}, num_key_value_heads=2, vocab_size=307, num_local_experts=4),
    "swin": SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4),
    "hgnet_v2": HGNetV2Config(  # convolutions alone
        embedding_size=8, depths=[1, 1], hidden_sizes=[16, 32], stem_channels=[3, 8, 8], stage_in_channels=[8, 16],
        stage_mid_channels=[8, 8], stage_out_channels=[16, 32], stage_num_blocks=[1, 1], stage_numb_of_layers=[1, 1],
        stage_downsample=[False, True], stage_light_block=[False, False], stage_kernel_size=[3, 3], image_size=32,
    ),
    "hrm_text": HrmTextConfig(  # whose layers repeat
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=307,
        num_layers_per_stack=1, H_cycles=1, L_cycles=2,
    ),
}  # fmt: skip
IMAGES = (HGNetV2Config, SwinConfig)
EVERYTHING, IN_BACKWARD, ADAPTERS = ways_of_streams()
DTYPES = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}, "masters": {"bf16": True}}


def fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def followed(way: Way, config, fake: bool = True, **options):
    options = {"batch_size": 3, "sequence_length": None if isinstance(config, IMAGES) else 48, **options}
    torch.manual_seed(0)
    return followed_stream(way, Workload(config, None, **options), fake_mode() if fake else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [EVERYTHING, ADAPTERS], ids=["everything", "LoRA"])
@pytest.mark.parametrize("config, in_parts", [(GPT2, False), (LLAMA, True)], ids=["gpt2", "llama, logits in parts"])
def test_the_estimate_is_the_ledger(config, in_parts, way, dtype, monkeypatch):
    if in_parts:
        monkeypatch.setattr(streamed_loss, "PART_BYTES", 2**16)
    expected, of_step = followed(way, config, fake=False, **DTYPES[dtype])
    actual, foretold = followed(way, config, **DTYPES[dtype])
    assert asdict(actual.parts) == pytest.approx(asdict(expected.parts), rel=0.02)
    assert actual.total == pytest.approx(expected.total, rel=0.02)
    assert actual.host == pytest.approx(expected.host, rel=0.02)
    assert foretold == of_step


@pytest.mark.parametrize("dtype, a_parameter", [("float32", 16), ("masters", 16), ("bfloat16", 8)])
def test_host_memory_has_weights_gradients_and_moments_and_the_device_two_units(dtype, a_parameter):
    ledger, costs = followed(EVERYTHING, LLAMA, **DTYPES[dtype])
    model = AutoModelForCausalLM.from_config(LLAMA)
    size = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert ledger.host == pytest.approx(a_parameter * size, rel=0.01)
    assert costs.trained == size
    element = 4 if dtype == "float32" else 2
    assert ledger.parts.blocks == pytest.approx(2 * layer * element, rel=0.01)
    assert ledger.parts.gradients <= 1003 * 64 * 4 + layer * 4
    # Layers twice, but the last one, which is still there; the head once; the embedding again, ahead of what comes next.
    table, of_embedding = 1003 * 64, 4 if dtype == "masters" else element  # (autocast does not cast an embedding)
    assert costs.to_device == pytest.approx(7 * layer * element + table * (element + 2 * of_embedding), rel=0.01)
    assert costs.to_host == pytest.approx(4 * layer * element + table * (element + of_embedding), rel=0.01)


@pytest.mark.parametrize("dtype, element, in_bf16", [("float32", 4, 0), ("masters", 4, 2), ("bfloat16", 2, 0)])
def test_an_optimizer_in_the_backward_pass_leaves_the_largest_gradient_in_host_memory(dtype, element, in_bf16):
    """Of masters it comes in bfloat16, and is cast there."""
    size = sum(p.numel() for p in AutoModelForCausalLM.from_config(LLAMA).parameters())
    for fake in (True, False):
        ledger, costs = followed(IN_BACKWARD, LLAMA, fake, **DTYPES[dtype])
        assert ledger.host == pytest.approx(element * 3 * size + (element + in_bf16) * 1003 * 64, rel=0.01)
        assert costs == followed(EVERYTHING, LLAMA, **DTYPES[dtype])[1]


def test_the_ledger_follows_a_streamed_model_of_one_s_own():
    model = AutoModelForCausalLM.from_config(LLAMA)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(1003, (3, 48))
    torch.manual_seed(0)
    expected, _ = followed(EVERYTHING, LLAMA)
    with db.stream_layers(model, "cpu") as stream:
        for _ in range(2):  # in the first, nothing comes ahead of its use
            before = stream.copied
            with db.StepMemory(model, optimizer) as memory:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            ledger = memory.ledger()
            optimizer.zero_grad()
        assert stream.peak_units == 2 and stream.copied["to_device"] > before["to_device"]
    assert ledger.total == pytest.approx(expected.total, rel=0.02)
    assert ledger.host == pytest.approx(expected.host, rel=0.02)
    assert "in host memory" in str(ledger)


def test_layers_that_stay_are_counted_on_the_device():
    alone, _ = followed(EVERYTHING, LLAMA)
    kept, costs = followed(EVERYTHING, LLAMA, keep=2)
    layer = alone.parts.blocks // 2
    assert kept.parts.blocks - alone.parts.blocks == pytest.approx(2 * layer, rel=0.01)
    assert costs.to_device < followed(EVERYTHING, LLAMA)[1].to_device


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_any_causal_model_or_image_classifier_is_estimated(config):
    length = None if isinstance(config, IMAGES) else 24
    estimate = db.estimate_memory(config, batch_size=2, sequence_length=length)
    cut = any("recommended" in name for name in estimate.ledgers)
    assert cut is not isinstance(config, HrmTextConfig) and not any("paper" in name for name in estimate.ledgers)
    assert any("LoRA" in name for name in estimate.ledgers) is not isinstance(config, HGNetV2Config)  # adapters are of matrices
    streamed, plain = (estimate.ledgers[name] for name in (EVERYTHING.name, CHECKPOINTING))
    assert streamed.total < plain.total and streamed.host > 0 == plain.host
    assert config.model_type in str(estimate) and ("B=" in str(estimate)) is cut
    options = {"batch_size": 2, "sequence_length": length}
    measured, _ = followed(EVERYTHING, config, fake=False, **options)
    assert streamed.total == pytest.approx(measured.total, rel=0.02)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gemma2", {"sequence_length": 24, "preset": "paper"}, "preset='paper' must be 'recommended' for model_type='gemma2'"),
        ("hrm_text", {"sequence_length": 24, "num_blocks": 2}, "HrmTextForCausalLM cannot be cut into blocks"),
    ],
)
def test_what_cannot_be_cut_has_no_blocks(name, fields, message):
    with pytest.raises(ValueError, match=message):
        db.estimate_memory(OTHERS[name], **fields)


def test_what_a_step_makes_of_values_cannot_be_followed():
    """Dbrx looks up which experts have tokens."""
    experts = {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1}
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=32, vocab_size=99, ffn_config=experts,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"cannot be estimated: its step depends on values \(aten.nonzero"):
        db.estimate_memory(config, batch_size=1, sequence_length=8)


# ---- by formula


@pytest.fixture(scope="module")
def of_llama() -> dict[str, db.Ledger]:
    return db.estimate_memory(LLAMA, 2, 3, 48, preset="recommended").ledgers


def test_eight_bit_moments_are_a_byte_each(of_llama):
    model = AutoModelForCausalLM.from_config(LLAMA)
    counts = {name: p.numel() for name, p in model.named_parameters()}
    full = sum(count for name, count in counts.items() if "norm" in name or "embed" in name)
    state = 8 * full + (sum(counts.values()) - full) * (2 + 8 / 256)
    assert of_llama[EIGHT_BIT].parts.optimizer == pytest.approx(state, rel=0.001)
    assert of_llama[CHECKPOINTING].total - of_llama[EIGHT_BIT].total == (
        of_llama[CHECKPOINTING].parts.optimizer - of_llama[EIGHT_BIT].parts.optimizer
    )


def test_a_base_in_4_bits_is_an_eighth_and_its_scales(of_llama):
    matrices = 4 * (4 * 64 * 64 + 3 * 64 * 128)
    saved = of_llama[f"{LORA}, checkpointing"].parts.blocks - of_llama[QLORA].parts.blocks
    assert saved == pytest.approx(matrices * (4 - 0.516), rel=0.001)
    assert of_llama[f"{LORA}, checkpointing"].total - of_llama[QLORA].total == saved - 64 * 128 * 4


def test_fsdp_holds_a_unit_its_gradients_and_what_is_on_its_way(of_llama):
    ledger, head = of_llama[FSDP], 1003 * 64 * 4
    layer = (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) * 4
    others = of_llama[CHECKPOINTING].parts
    at_head, at_layer = 2 * head + others.activations + others.logits, 2 * layer + 2 * head + others.activations
    assert ledger.total == max(at_head, at_layer)
    assert ledger.host == 16 * (2 * 1003 * 64 + 4 * layer // 4 + 64)


def test_gradients_are_gone_as_they_are_used(of_llama):
    """And that is what a real optimizer in hooks holds."""
    way = next(way for way in ways_of_stock_models() if way.in_backward)
    measured = ledger_of(way, Workload(LLAMA, None, 3, 48))
    assert measured.parts.gradients == 0 and of_llama[way.name].total == pytest.approx(measured.total, rel=0.02)
    assert of_llama[way.name].parts.total == of_llama[CHECKPOINTING].parts.total - of_llama[CHECKPOINTING].parts.gradients


# ---- what it costs


def test_seconds_follow_from_bytes_bandwidth_and_operations(monkeypatch):
    costs = Costs(to_device=30 * 10**9, to_host=20 * 10**9, trained=10**9, operations=8 * 10**12)
    assert costs.copying(25e9) == 2.0
    # 2 rows are 8 * 10^12 operations, a row 0.04 s at 100 TFLOPS
    assert costs.hidden_from(25e9, 100, batch_size=2) == 50
    monkeypatch.setattr(costs_module, "seconds_of_a_parameter", {torch.float32: 4e-9, torch.bfloat16: 2e-9}.get)
    assert costs.stepping(torch.float32) == 4.0 and costs.stepping(torch.bfloat16) == 2.0


def test_the_probe_takes_a_step_that_moves_all_that_there_is():
    """A parameter is 16 bytes that are read and 12 that are written: some seconds for 10^9 of them."""
    assert 1e-11 < seconds_of_a_parameter(torch.float32) < 1e-7


def test_operations_are_those_of_products_of_matrices():
    first, second = torch.ones(10, 20, requires_grad=True), torch.ones(20, 30, requires_grad=True)
    with Operations() as operations:
        (first @ second).sum().backward()
    assert operations.total == 3 * 2 * 10 * 20 * 30
