"""The estimate is the ledger of the same step, without memory for its tensors."""

from __future__ import annotations

import inspect
from dataclasses import asdict, replace

import pytest
import torch
from families import CASES
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPT2Config, LlamaConfig, Qwen3Config, ViTConfig

import hf_diffusionblocks as db
from hf_diffusionblocks.cli import estimate as estimate_command, main
from hf_diffusionblocks.conversion import read_config
from hf_diffusionblocks.diffusion import objectives
from hf_diffusionblocks.memory.estimate import smallest_number_of_blocks
from hf_diffusionblocks.memory.ledger import Parts
from hf_diffusionblocks.memory.scenarios import ledger_of
from hf_diffusionblocks.memory.table import COLUMNS, in_column, ledger_table, parse_bytes
from hf_diffusionblocks.memory.ways import Way, Workload, formulations_for, ways_of_blocks, ways_of_stock_models
from hf_diffusionblocks.tasks import TASKS

SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
GPT2_SIZES = {"n_embd": 32, "n_head": 2, "vocab_size": 307, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = GPT2Config(n_layer=4, **GPT2_SIZES)
TINY = GPT2Config(n_layer=2, **GPT2_SIZES)  #: for tables, which follow every way to train
CONFIGS = {
    "gpt2": (GPT2, 24),
    "qwen3": (Qwen3Config(**SIZES, vocab_size=307, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True), 24),
    "vit": (ViTConfig(**SIZES, image_size=16, patch_size=4, num_channels=1, num_labels=5), None),
}
FORMULATIONS = formulations_for(TASKS["text-generation"], GPT2Config())
TEXT = TASKS["text-generation"]
WAYS = {way.name: way for way in ways_of_stock_models() + ways_of_blocks(TEXT, FORMULATIONS)}
OTHERS = {"local head": {"preset": "recommended", "local_head_layers": 1}}
OTHER_WAYS = {way.name: way for way in ways_of_blocks(TEXT, OTHERS) if way.job}


@pytest.fixture(scope="module")
def tiny() -> db.MemoryEstimate:
    """Of all that can be asked."""
    asked = {"ema": True, "bf16": True, "keep": 1, "bandwidth": "10GB/s", "tflops": 50, "budget": "1 TiB"}
    return db.estimate_memory(TINY, 2, 3, 24, preset="recommended", local_head_layers=0, **asked)


def estimated(way: Way, workload: Workload) -> db.Ledger:
    return ledger_of(way, workload, FakeTensorMode(allow_non_fake_inputs=True))


def check(way: Way, workload: Workload) -> None:
    """Every part, and the peak, to which earlier blocks that run forward add nothing but in models as small as these."""
    expected, actual = ledger_of(way, workload), estimated(way, workload)
    assert asdict(actual.parts) == pytest.approx(asdict(expected.parts), rel=0.005)
    assert actual.total == pytest.approx(expected.total, rel=0.05)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "family, dtype",
    [("qwen3", torch.bfloat16), ("vit", torch.float32)],
    ids=str,
)
def test_the_estimate_is_the_ledger(family, dtype, way):
    config, length = CONFIGS[family]
    check(way, Workload(config, 3, batch_size=3, sequence_length=length, dtype=dtype))


@pytest.mark.parametrize("way", OTHER_WAYS.values(), ids=OTHER_WAYS)
@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_so_it_is_in_other_formulations(family, way):
    config, length = CONFIGS[family]
    check(way, Workload(config, 3, batch_size=3, sequence_length=length))


def test_logits_are_as_many_as_the_device_reads_out_at_a_time(monkeypatch):
    """A few rows' on a CPU, more on others: what a CPU holds if it reads out as many."""
    monkeypatch.setattr(objectives, "WHOLE", 0)
    monkeypatch.setattr(objectives, "CPU_CHUNK", 2**12)
    monkeypatch.setattr(objectives, "ACCELERATOR_CHUNK", 2**14)
    way = WAYS["recommended: all blocks in turn"]
    workload = Workload(GPT2, 3, batch_size=3, sequence_length=24)
    on_cpu, on_gpu = (estimated(way, replace(workload, device=kind)).parts.logits for kind in ("cpu", "cuda"))
    assert ledger_of(way, workload).parts.logits == on_cpu
    monkeypatch.setattr(objectives, "CPU_CHUNK", 2**14)
    assert ledger_of(way, workload).parts.logits == on_gpu > 3 * on_cpu
    found = db.estimate_memory(TINY, 2, 3, 24, device="cuda", preset="recommended", local_head_layers=0)
    assert found.ledgers[way.name].parts.logits == on_gpu and "AdamW, cuda" in str(found)


def test_the_largest_block_is_among_those_that_are_followed():
    """Cut unevenly: no block's job holds more."""
    fields = {"preset": "paper", "shared": "per_block", "layers_per_block": [1, 2, 1]}
    way = Way("job", fields, job=True)
    workload = Workload(GPT2, 3, 3, 24)
    totals = []
    for block in range(3):
        model = db.convert(GPT2, 3, resident_blocks=[block], **fields).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        batch = workload.batch()
        totals.append(db.measure_memory(model, optimizer, lambda: model(**batch, block_index=block).loss).total)
    assert estimated(way, workload).total == pytest.approx(max(totals), rel=0.01)


def test_what_is_too_large_to_allocate_is_estimated():
    """3 blocks of a layer of 3 GiB, on a machine of any size."""
    config = LlamaConfig(num_hidden_layers=3, hidden_size=8192, intermediate_size=24576, num_attention_heads=64, vocab_size=320)
    estimate = db.estimate_memory(config, num_blocks=3, batch_size=2, sequence_length=512, preset="paper")
    plain = estimate.ledgers["end to end"]
    layer = 4 * (4 * 8192**2 + 3 * 8192 * 24576 + 2 * 8192)
    assert plain.parts.blocks == 3 * layer
    assert plain.parts.optimizer == pytest.approx(2 * plain.parts.gradients, rel=1e-6)
    assert estimate.ledgers["paper: job, shared part frozen"].parts.blocks == layer


def test_the_budget_is_met_by_the_smallest_number_of_blocks(tiny):
    way = WAYS["recommended: job, own embeddings and head, around the earlier blocks"]
    totals = {blocks: estimated(way, Workload(GPT2, blocks, 3, 24)).total for blocks in (1, 2, 4)}
    assert totals[1] > totals[2] > totals[4]
    for budget, expected in ((totals[2], 2), (totals[2] - 1, 4), (totals[4] - 1, None)):
        assert smallest_number_of_blocks(way, Workload(GPT2, 3, 3, 24), budget) == expected
    assert set(tiny.fitting.values()) == {1}
    assert "fits 1 TiB" in str(tiny) and str(tiny).count("yes") == len(tiny.ledgers)


def test_a_diffusionblocks_model_is_estimated_as_it_is():
    model = db.convert(TINY, 2, preset="recommended", local_head_layers=0).to(torch.bfloat16)
    estimate = db.estimate_memory(model, batch_size=3, sequence_length=24)
    expected = db.estimate_memory(TINY, 2, 3, 24, dtype="bf16", preset="recommended", local_head_layers=0)
    assert estimate.ledgers == expected.ledgers
    assert [name for name in estimate.ledgers if name.startswith("recommended: ")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_blocks": 5}, "num_blocks=5 must be at most the model's 4 layers"),
        ({"dtype": "fp8"}, "dtype='fp8' must be one of fp32"),
        *(({"budget": text}, "budget=.* must be a number of bytes") for text in ("", "GiB", "-1", "0", "1e3", "24gib")),
        ({"budget": "24 apples"}, "budget='24 apples' must be a number of bytes, or one with a unit: KiB"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number from 1"),
        ({"sequence_length": None}, "sequence_length=None must be a whole number from 2"),
        ({"sequence_length": 64}, "sequence_length=64 must be at most max_position_embeddings=32"),
        ({"device": "gpu"}, "device='gpu' must be a kind of device that PyTorch knows"),
        ({"bandwidth": "25GB/h"}, "bandwidth='25GB/h' must be"),
        ({"tflops": 0}, "tflops=0 must be a number above 0"),
        ({"bf16": True, "dtype": "bf16"}, "bf16=True is autocast, over parameters in float32: dtype='bfloat16' is not"),
        ({"keep": 9}, "keep=9 must be a number of layers from 0 to 4"),
        ({"preset": "both"}, "preset='both' must be one of 'recommended', 'paper'"),
        ({"presett": "paper"}, "presett: not a field of DiffusionBlocksConfig"),
    ],
    ids=str,
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        db.estimate_memory(GPT2, **{"num_blocks": 2, "batch_size": 3, "sequence_length": 24, **arguments})


def test_images_have_no_sequence_length():
    with pytest.raises(ValueError, match="sequence_length=24 must be None for task 'image-classification'"):
        db.estimate_memory(CONFIGS["vit"][0], 2, 3, 24)


@pytest.mark.parametrize(
    "text, size", [("1000", 1000), (1000, 1000), ("24GiB", 24 * 2**30), ("1.5 MB", 1_500_000), ("2KiB", 2048)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.fixture
def asked(monkeypatch) -> list:
    """What the command asks `estimate_memory` for; the answer is "a table"."""
    calls = []
    monkeypatch.setattr(estimate_command, "estimate_memory", lambda *args, **kwargs: calls.append((args, kwargs)) or "a table")
    return calls


def bound(call: tuple) -> dict:
    """Arguments by name, without those that have their default."""
    signature = inspect.signature(db.estimate_memory)
    arguments = signature.bind(*call[0], **call[1]).arguments
    given = arguments.pop("config_fields", {})
    return {name: value for name, value in arguments.items() if value != signature.parameters[name].default} | given


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            "--dtype bf16 --preset recommended --local_head_layers 0 --num_blocks 2 --batch-size 3 --sequence-length 24",
            {
                "dtype": "bf16", "preset": "recommended", "local_head_layers": 0, "num_blocks": 2, "batch_size": 3,
                "sequence_length": 24,
            },
        ),
        (
            "--sequence_length 24 --bf16 --keep 1 --bandwidth 10GB/s --tflops 50",
            {"sequence_length": 24, "dtype": "fp32", "bf16": True, "keep": 1, "bandwidth": "10GB/s", "tflops": 50.0},
        ),
        (
            "--keep 2GiB --budget 16GiB --device cuda --ema --task fill-mask",
            {"dtype": "fp32", "keep": "2GiB", "budget": "16GiB", "device": "cuda", "ema": True, "task": "fill-mask"},
        ),
    ],
    ids=["blocks", "streamed", "all else"],
)  # fmt: skip
def test_the_command_asks_for_what_it_is_told_and_prints_the_answer(options, expected, asked, tmp_path, capsys):
    """With underscores or hyphens."""
    TINY.save_pretrained(tmp_path)
    main(["estimate", "--model", str(tmp_path), *options.split()])
    assert capsys.readouterr().out == "a table\n"
    (call,) = asked
    arguments = bound(call)
    assert arguments.pop("model_or_config").to_json_string() == read_config(str(tmp_path)).to_json_string()
    assert arguments == expected


def test_the_command_reads_a_model_of_diffusers(asked, tmp_path):
    CASES["dit"].plain().save_pretrained(tmp_path)
    main(["estimate", "--model", str(tmp_path)])
    (((config, *_), _),) = asked
    assert config.to_dict() == CASES["dit"].config.to_dict()


def test_a_tiny_model_s_table_says_something(tiny):
    """In KiB, where MiB would be 0 everywhere; with bandwidth and speed."""
    estimate, printed = tiny, " ".join(str(tiny).split())
    for heading in ("host", "copying, s (10 GB/s)", "AdamW on the host, s", "copies hidden from batch size (50 TFLOPS)"):
        assert f"| {heading} |" in printed
    assert "float32, computing in bfloat16" in printed
    table = str(estimate).split("\n\n")[1]
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    assert header[0] == "KiB"
    for row in rows:
        cells, ledger = dict(zip(header, row)), estimate.ledgers[row[0]]
        for column in COLUMNS:
            assert float(cells[column].replace(",", "")) == pytest.approx(in_column(ledger.parts, column) / 1024, abs=0.5)
        assert float(cells["sum"].replace(",", "")) > 100


@pytest.mark.parametrize(
    "size, unit, printed",
    [
        (1_234, "KiB", "1"), (99 * 2**20, "KiB", "101,376"), (148 * 2**20 + 2**19, "MiB", "148.5"),
        (5_663 * 2**20, "MiB", "5,663"), (9_999 * 2**20, "MiB", "9,999"), (10 * 2**30, "GiB", "10.0"),
        (1_288 * 2**30, "GiB", "1,288.0"),
    ],
    ids=str,
)  # fmt: skip
def test_the_first_row_gives_the_unit(size, unit, printed):
    """Whole MiB for GPT-2 small, GiB for a large Llama."""
    first, second = (db.Ledger(Parts(blocks=each), Parts(blocks=each)) for each in (size, 2**20))
    header, _, row, _ = ledger_table({"end to end": first, "other": second}, {}).splitlines()
    assert header.split("|")[1].strip() == unit
    assert [row.split("|")[column].strip() for column in (2, 7, 8)] == [printed] * 3


def test_the_command_fails_in_one_line(tmp_path, capsys):
    GPT2.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["estimate", "--model", str(tmp_path), "--sequence_length", "24", "--dtype", "int8"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diffusionblocks estimate: error: dtype='int8' must be one of")
    with pytest.raises(SystemExit):
        main(["estimate", "--model", str(tmp_path / "nowhere"), "--sequence_length", "24"])
    assert "--model" in capsys.readouterr().err
