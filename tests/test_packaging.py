"""What is given to others: wheel and sdist, the extras, the site, the notebooks."""

from __future__ import annotations

import ast
import configparser
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def run(*command: str, **kwargs) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the sdist's wheel installs."""
    work = tmp_path_factory.mktemp("packages")
    build = f"from setuptools import build_meta; print(build_meta.build_sdist({str(work)!r}))"
    run(sys.executable, "-c", build, cwd=ROOT)
    (sdist,) = work.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(sdist))
    (wheel,) = work.glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", str(work / "installed"), str(wheel))
    return work / "installed"


def test_the_wheel_of_the_sdist_has_all_that_is_no_code(installed):
    package = installed / "hf_diffusionblocks"
    for folder in ("recipes", "model_cards", "src/hf_diffusionblocks"):
        there = package / folder.removeprefix("src/hf_diffusionblocks")
        files = (
            each for each in (ROOT / folder).rglob("*") if each.is_file() and each.suffix in (".py", ".yaml", ".md", ".sh")
        )
        missing = [each.name for each in files if not (there / each.relative_to(ROOT / folder)).is_file()]
        assert not missing


def test_it_runs_from_outside_of_the_checkout(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    assert "from hf_diffusionblocks.cli import main" in (installed / "bin" / "diffusionblocks").read_text()
    recipe = (
        "from hf_diffusionblocks.cli import train; print(*train.find_recipes())\n"
        "from hf_diffusionblocks.recipes import train_image_classification as it; print(it.__file__); it.main()"
    )
    config = installed / "hf_diffusionblocks" / "recipes" / "configs" / "digits.yaml"
    printed = run(sys.executable, "-c", recipe, "--config", str(config), "--help", cwd=tmp_path, env=environment)
    assert "masked-lm" in printed and str(installed) in printed and "--num_blocks" in printed


def test_what_is_not_always_installed_is_in_the_extra_that_errors_name():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {
        name: {line.split(">=")[0].strip() for line in packages.split("\n") if line}
        for name, packages in setup["options.extras_require"].items()
    }
    asked = set()
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "from_extra":
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                words = [argument.value if isinstance(argument, ast.Constant) else None for argument in given]
                package, _, extra = [*words, "recipes"][:3]
                if package and extra:
                    asked.add((package, extra))
    assert asked and all(package in extras[extra] for package, extra in asked)


def test_the_site_builds_with_every_link_in_its_place(tmp_path):
    run(
        sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path), cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    api = (tmp_path / "api" / "index.html").read_text()
    assert "stream_layers" in api and "layers that stay on the device" in api  # (what a docstring says of an argument)


@pytest.mark.skipif("TYPE_ALL_DOCS" not in os.environ, reason="`make test-docs` runs them")
@pytest.mark.parametrize("file", NOTEBOOKS, ids=[file.stem for file in NOTEBOOKS])
def test_notebooks_run_as_they_stand(file, tmp_path, monkeypatch):
    """And end as what is stored in them: sizes, counts and equalities."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # (two test processes share the cores)
    stored = nbformat.read(file, 4)
    found = nbformat.read(file, 4)
    NotebookClient(found, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    for before, now in zip(stored.cells, found.cells, strict=True):
        for line in _printed(before):
            if "equal" in line or "parameters" in line or "at once" in line:
                assert line in _printed(now)


def _printed(cell) -> list[str]:
    return [line for output in cell.get("outputs", []) for line in output.get("text", "").splitlines()]
