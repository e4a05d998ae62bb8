"""README and docs: short, linked, and the quick start runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def test_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 200


@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("README.md", "accuracy"),
        ("docs/image_generation.md", "'eval_loss_block_2'"),
        ("docs/masked_text.md", " by the interpreter."),
        ("docs/recurrent_depth.md", "likeliest at each step:"),
    ],
)
def test_quick_start_runs(tmp_path, page, printed):
    """As it stands, only in fewer updates."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    code = next(block for block in blocks if "updates_per_block=" in block)
    shorter = re.sub(r"updates_per_block=\d+", "updates_per_block=2", code)
    assert shorter != code
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", shorter], cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert printed in run.stdout
