"""The recipe that asks a masked model what lm-evaluation-harness asks: likelihoods, what is greedy, writing, errors."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from lm_eval.api.instance import Instance
from recipe_runs import model, save_masked

from hf_diffusionblocks.recipes import evaluate_masked_lm
from hf_diffusionblocks.recipes.evaluate_masked_lm import MaskedDiffusionLM

pytestmark = pytest.mark.usefixtures("own_cache")
TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def masked(tmp_path_factory, model) -> str:
    made = save_masked(model, folder := tmp_path_factory.mktemp("masked"), 1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # so that contexts tell
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def asked(masked) -> MaskedDiffusionLM:
    return MaskedDiffusionLM(masked, num_samples=4, batch_size=3, device="cpu")


def likelihoods(lm: MaskedDiffusionLM, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    return lm.loglikelihood(requests, disable_tqdm=True)


def masked_logits(lm: MaskedDiffusionLM, context: list[int], masks: int) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([context + [lm.model.mask_token_id] * masks])).logits[0, len(context) :]


def test_an_answer_of_one_token_has_its_exact_likelihood(asked):
    context, answer = "The statement", asked.tokenizer.decode([40])
    (found, greedy), = likelihoods(asked, (context, answer))  # fmt: skip
    logits = masked_logits(asked, asked.tok_encode(context), 1)[0]
    assert found == pytest.approx(logits.log_softmax(-1)[40].item(), abs=1e-5)
    assert greedy == (logits.argmax().item() == 40)


def test_a_likelihood_does_not_depend_on_the_others_and_is_drawn_by_the_seed(asked, masked):
    pairs = [("The yield", " statement is here"), ("A", " b"), ("One more", " of the longer answers there are")]
    together = likelihoods(asked, *pairs)
    alone = [likelihoods(asked, pair)[0] for pair in pairs]
    assert [each[0] for each in together] == pytest.approx([each[0] for each in alone], abs=1e-4)
    other = likelihoods(MaskedDiffusionLM(masked, num_samples=4, seed=1, device="cpu"), *pairs)
    assert other[0][0] != pytest.approx(together[0][0], abs=1e-4)


def test_many_samples_end_at_the_mean_over_all_sets_of_masks(masked):
    """Of two tokens: half of the time both are masked, half of the time either."""
    lm = MaskedDiffusionLM(masked, num_samples=600, device="cpu")
    context, answer = [40, 41], [50, 60]

    def nats(*masked_tokens: int) -> float:
        tokens = torch.tensor([context + answer])
        places = [2 + index for index in masked_tokens]
        shown = tokens.clone()
        shown[0, places] = lm.model.mask_token_id
        with torch.no_grad():
            logits = lm.model(input_ids=shown).logits[0].log_softmax(-1)
        return -sum(logits[place, tokens[0, place]].item() for place in places)

    expected = 0.5 * nats(0, 1) + 0.5 * 2 * (nats(0) + nats(1)) / 2
    ((found, _),) = lm._loglikelihood_tokens([(None, context, answer)], disable_tqdm=True)
    spread = abs(nats(0) - nats(1)) / 2 * 600**-0.5
    assert -found == pytest.approx(expected, abs=4 * spread + 1e-4)


def test_what_the_model_fills_in_surest_first_is_greedy(asked):
    prompt = asked.tok_encode("The statement")
    made = asked.model.generate(torch.tensor([prompt]), max_new_tokens=3, temperature=0, remasking="low_confidence")
    own = made[0, len(prompt) :].tolist()
    other = [*own[:-1], own[-1] + 1]
    requests = [(None, prompt, own), (None, prompt, other)]
    assert [greedy for _, greedy in asked._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False]


def test_writing_ends_where_a_task_says(asked, monkeypatch):
    answer = asked.tok_encode("one two three", add_special_tokens=False)
    made = lambda input_ids, **given: torch.cat([input_ids, torch.tensor([answer])], 1)  # noqa: E731
    monkeypatch.setattr(asked.model, "generate", made, raising=False)
    for until, expected in (([" three", " two"], "one"), ([], "one two three"), ("none", "one two three")):
        request = Instance("generate_until", {}, ("The yield", {"until": until, "max_gen_toks": 8}), 0)
        assert asked.generate_until([request], disable_tqdm=True) == [expected]


def test_tasks_are_run_and_results_written_or_one_line_says_why_not(tmp_path, masked, capsys, monkeypatch):
    only_ours = partial(evaluate_masked_lm.TaskManager, include_defaults=False)  # (thousands of files take long)
    monkeypatch.setattr(evaluate_masked_lm, "TaskManager", only_ours)
    rows = [{"question": f"Is {number} even?", "answer": number % 2} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    options = ["--tasks", "tiny_choice", "--include_path", str(tmp_path), "--limit", "4", "--num_samples", "2"]
    options += ["--device", "cpu"]
    found = evaluate_masked_lm.main(["--model", masked, *options, "--output", str(tmp_path / "results.json")])
    assert 0 <= found["tiny_choice"]["acc,none"] <= 1 and "tiny_choice" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["tiny_choice"]["acc,none"] == found["tiny_choice"]["acc,none"]
    for options, message in (
        (["--tasks", "no_such_task"], "tasks=['no_such_task'] must be names that lm_eval knows"),
        (["--tasks", "tiny_choice", "--num_samples", "0"], "num_samples=0 must be a whole number from 1"),
        (["--tasks", "tiny_choice", "--max_length", "-5"], "max_length=-5 must be a whole number from 2"),
        (["--tasks", *options[1:4], "--max_length", "999"], "max_length=999 must be at most the model's max_position_embed"),
        (["--tasks", *options[1:4], "--device", "zz"], "device='zz' must be one that is there"),
        (["--tasks", "tiny_choice", "--output", str(tmp_path)], "Is a directory"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate_masked_lm.main(["--model", masked, *options])
        assert stop.value.code.startswith("evaluate_masked_lm.py: error: ") and message in stop.value.code
