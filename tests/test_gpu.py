"""What only a GPU can show: marked `gpu`, and skipped where there is none. (That a step waits for none: test_device.py.)"""

from __future__ import annotations

import pytest
import torch
from families import CASES, Case, grid, same

import hf_diffusionblocks as db
from hf_diffusionblocks.diffusion.randomness import draw, keyed_generators

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TRAINED = {"text": "gpt2, recommended", "images": "vit, recommended", "diffusion": "dit", "masked": "bert"}
trained = pytest.mark.parametrize("case", [CASES[name] for name in TRAINED.values()], ids=TRAINED)


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on(device: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def trainer_of(model, case: Case, folder, **arguments) -> db.DiffusionBlocksTrainer:
    args = db.DiffusionBlocksTrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to=[], disable_tqdm=True, save_strategy="no",
        measure_memory=False, **arguments,
    )  # fmt: skip
    return db.DiffusionBlocksTrainer(model=model, args=args, train_dataset=case.dataset())


@pytest.mark.parametrize(**grid(lambda case: case.trained))
def test_losses_and_gradients_are_those_of_the_cpu(case):
    """Of the same noise: what a row's generator on the CPU draws goes to the device."""
    results = []
    for device in ("cpu", DEVICE):
        model, found = case.model().train().to(device), {}
        for block in case.blocks:
            model.zero_grad()
            loss = model(**on(device, case.rows()), block_index=block, generator=keyed_generators([0], range(4))).loss
            loss.backward()
            found[block] = loss.detach().cpu()
            found |= {(block, name): p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        results.append(found)
    on_cpu, on_device = results
    assert on_cpu.keys() == on_device.keys()
    for name, expected in on_cpu.items():
        atol = 1e-4 * expected.abs().max().item() + 1e-7
        torch.testing.assert_close(on_device[name], expected, rtol=1e-3, atol=atol, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("name", ["vit, paper", "dit", "bert"])
def test_evaluation_meets_the_same_noise_as_on_the_cpu(name):
    case = CASES[name]
    model = case.model().eval()
    losses = []
    for device in ("cpu", DEVICE):
        with torch.no_grad():
            losses.append(model.to(device)(**on(device, case.rows())).loss.cpu())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_training_noise_is_drawn_there_and_a_row_s_own():
    whole = draw(torch.randn, (4, 7), keyed_generators([3], range(4), DEVICE))
    half = draw(torch.randn, (2, 7), keyed_generators([3], range(2, 4), DEVICE))
    assert whole.device.type == torch.device(DEVICE).type and torch.equal(whole[2:], half)


def test_fresh_weights_made_there_leave_its_generator_as_it_was():
    case = CASES["vit, recommended"]
    torch.manual_seed(3)
    before = torch.cuda.get_rng_state()
    with torch.device(DEVICE):
        model = db.convert(case.config, len(case.blocks))
    assert model.device.type == DEVICE and torch.equal(torch.cuda.get_rng_state(), before)


@trained
def test_a_streamed_block_has_the_gradients_of_one_that_is_not(case, monkeypatch):
    """Bit for bit, where kernels are deterministic."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = []
        for streamed in (False, True):
            model = case.model().to(DEVICE).train()
            if streamed:
                db.stream_layers(model, DEVICE)
            for block in case.blocks:
                generator = torch.Generator(DEVICE).manual_seed(block)
                model(**on(DEVICE, case.rows()), block_index=block, generator=generator).loss.backward()
            found.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(*found)


@trained
def test_a_step_waits_for_the_device_nowhere(case, tmp_path):
    """Nor does a turn that begins, from the third round on, when all is there that is made once; the optimizer's moves included
    where blocks train together."""
    rounds = 4 * len(case.blocks)
    trainer = trainer_of(case.model(), case, tmp_path, max_steps=rounds)
    steps = []

    def watched(method):
        def run(*args, **kwargs):
            steps.append(trainer.state.global_step)
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error" if steps[-1] >= rounds // 2 else "default")
            try:
                return method(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return run

    trainer.training_step, trainer.begin_block = watched(trainer.training_step), watched(trainer.begin_block)
    trainer.train()
    assert set(steps) == set(range(rounds))


def test_a_step_that_waits_is_found():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(3, device=DEVICE).sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
