"""README and docs: short, linked, and what they say is typed as they say it."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from newcomer import ROOT, Newcomer, make_hub

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: What makes training short: of commands by how they begin, and within Python.
SHORTER = {
    r"accelerate launch recipes/train_|diffusionblocks train (?!finetune)|recipes/jobs.sh": "--updates_per_block 2",
    r"accelerate launch recipes/finetune_image_model": "--max_steps 2 --use_cpu --resolution 64 --bucket_step 16 --sample_steps 2",
    # (torchao is not installed here)
    r"diffusionblocks train finetune --config recipes/configs/finetune_8b": "--max_steps 2 --use_cpu --optim adamw_torch",
    r"accelerate launch recipes/finetune|diffusionblocks train finetune": "--max_steps 2 --use_cpu",
}
SHORTER_PYTHON = {
    r"updates_per_block=\d+": "updates_per_block=2",
    r'(SFT|DPO)Config\("(\w+)"': r'\1Config("\2", max_steps=2, use_cpu=True',
}


def fences(page: Path) -> list[tuple[str, str]]:
    """Language ("" of what is printed) and text of each, in order."""
    return FENCE.findall(page.read_text())


def commands(text: str) -> list[str]:
    """Of a fence of bash, without comments."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [" ".join(line.split()) for line in lines if line]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_pages_are_short():
    words = {page.name: len(page.read_text().split()) for page in PAGES}
    assert words["README.md"] <= 1100
    assert words.pop("report.md") <= 2400
    assert sum(words.values()) <= 14_000, words
    assert len((ROOT / "docs" / "glossary.md").read_text().splitlines()) <= 20


# ---- what is typed


def type_command(newcomer: Newcomer, command: str) -> str:
    """What it prints. Training is made short; of what takes hours, or another machine, only that it exists is checked."""
    if command.startswith(("pip ", "make ", "sbatch ", "array=")):
        made = command.split()[1]
        known = (ROOT / ("setup.cfg" if made == "install" else "Makefile")).read_text()
        names = re.findall(r"\w+", command.partition("[")[2]) if made == "install" else [made]
        assert "sbatch" in command or all(re.search(rf"^{name}\b.*[:=]", known, re.MULTILINE) for name in names), command
        return ""
    if command.startswith(("python benchmarks/", "python recipes/evaluate_")):  # hours, or tasks of the Hub
        folder = command.split()[1].partition("/")[0]
        sources = "".join(file.read_text() for file in (ROOT / folder).glob("*.py"))
        _, script, *words = command.split()
        assert (ROOT / script).is_file(), command
        options = [word.removeprefix("--") for word in words if word.startswith("--")]
        assert all(re.search(rf'"--{option}"|^    {option}: ', sources, re.MULTILINE) for option in options), command
        return ""
    extra = next((words for start, words in SHORTER.items() if re.match(start, command)), "")
    done = newcomer.types(shlex.split(f"{command} {extra}"))
    assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    return done.stdout


def shortened(code: str) -> str:
    for found, shorter in SHORTER_PYTHON.items():
        code = re.sub(found, shorter, code)
    return code


def run_python(newcomer: Newcomer, code: str) -> str:
    done = newcomer.types([sys.executable, "-c", shortened(code)])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def looks_like(printed: str, shown: str, any_numbers: bool = False) -> bool:
    """Whether each line that the page shows was printed; "..." stands for anything.

    Args:
        any_numbers: other numbers will do, as shorter training gives.
    """

    def pattern(line: str) -> str:
        # Every second part is what was split at: dots, and numbers.
        parts = re.split(r"(\.\.\.|[\d.,]*\d(?:e-\d+)?)", " ".join(line.split()))
        anything = {"...": ".*"} | ({part: r"[\d.,e+-]+" for part in parts[1::2] if part != "..."} if any_numbers else {})
        return "".join(anything[part] if n % 2 and part in anything else re.escape(part) for n, part in enumerate(parts))

    lines = "\n".join(" ".join(line.split()) for line in printed.splitlines())
    return all(re.search(pattern(line), lines) for line in shown.splitlines() if line.strip())


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    make_hub(cache := tmp_path_factory.mktemp("hub"))
    return cache


@pytest.mark.parametrize("page", PAGES if "TYPE_ALL_DOCS" in os.environ else PAGES[:1], ids=lambda page: page.name)
def test_what_is_typed_runs(page, hub, tmp_path):
    """In the page's order, in one folder. Python that imports the package is whole; other Python is a part of something.

    `make test` types README; `make test-docs` types everything.
    """
    newcomer, printed, is_short = None, "", False
    for language, text in fences(page):
        if language == "":
            assert looks_like(printed, text, any_numbers=is_short), f"{text}\nis not in\n{printed}"
        elif language == "bash" or "import hf_diffusionblocks" in text:
            newcomer = newcomer or Newcomer(hub, tmp_path)
            typed = commands(text) if language == "bash" else [text]
            printed = "".join((type_command if language == "bash" else run_python)(newcomer, each) for each in typed)
            is_short = language == "python" and shortened(text) != text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_begins_with_something_that_runs(page):
    if page.name in ("README.md", "glossary.md", "api.md"):
        return
    (first, _), (second, _), *_ = fences(page)
    assert first in ("bash", "python") and second == "", "a command, and what it prints"


def test_a_page_that_shows_something_else_is_found():
    assert looks_like("accuracy 12.5 %\nblocks: 3\n", "accuracy 97.8 %", any_numbers=True)
    assert not looks_like("accuracy 12.5 %\nblocks: 3\n", "accuracy 97.8 %")
    assert looks_like("| end to end | 6,508 | 1.00x |", "| end to end | ... | 1.00x |")
    assert not looks_like("accuracy 12.5 %", "error 97.8 %", any_numbers=True)
    assert not looks_like("", "accuracy 97.8 %")
