"""`make check-gpu`: its table, and its exit status. (What it checks, it checks; without a GPU on the CPU, in small.)"""

from __future__ import annotations

import json
import sys

import gpu
import pytest
import torch.distributed as dist
from gpu_checks import CPU, passes
from gpu_common import FAMILIES, Check, Row

HOLDS = Check("holds", lambda machine: iter([Row("one and one", "2", "2", True), Row("of a GPU", "3.1x")]), needs_gpu=False)
FAILS = Check("fails", lambda machine: iter([Row("one and two", "4", "3", False)]), needs_gpu=False)
WAITS = Check("waits", lambda machine: iter([Row("never seen", "", holds=False)]), needs_gpu=True)


def raising(machine):
    yield Row("before", "1", holds=True)
    raise RuntimeError("out of\nluck")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the program with these checks, without a GPU; its status, and its rows by name."""
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)

    def run_with(*checks: Check, options=()):
        monkeypatch.setattr(gpu, "CHECKS", checks)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "rows.json"), *options])
        status = gpu.main()
        return status, {row["check"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}

    return run_with


@pytest.mark.parametrize(
    ("checks", "options", "status", "result"),
    [
        ([HOLDS, FAILS], [], 1, {"one and one": True, "of a GPU": None, "one and two": False}),
        ([HOLDS, FAILS], ["--only", "hold"], 0, {"one and one": True, "of a GPU": None}),
        ([HOLDS], ["--minutes", "0"], 1, {"holds": "not begun: out of time"}),
        ([WAITS], [], 0, {"waits": "needs a GPU"}),
    ],
)
def test_status_and_rows(run, checks, options, status, result):
    found, rows = run(*checks, options=options)
    told = {name: row["result"] if name in ("holds", "waits") else row["holds"] for name, row in rows.items()}
    assert (found, told) == (status, result)


def test_where_all_holds_it_succeeds_and_measures_count_neither_way(run, capsys):
    status, rows = run(HOLDS)
    assert status == 0 and rows["one and one"]["holds"] is True and rows["of a GPU"]["holds"] is None
    assert "| one and one | 2      | 2       | yes   |" in capsys.readouterr().out


def test_what_raises_is_a_row_and_the_others_go_on(run):
    status, rows = run(Check("raises", raising, needs_gpu=False), HOLDS)
    assert status == 1 and rows["raises"]["result"] == "RuntimeError: out of luck"
    assert rows["before"]["holds"] and rows["one and one"]["holds"]


def test_it_says_what_it_ran_on(run, tmp_path, capsys):
    run(HOLDS)
    about = json.loads((tmp_path / "rows.json").read_text())
    assert about["device"].startswith("CPU") and {"torch", "transformers", "seconds"} <= about.keys()
    assert "No GPU here" in capsys.readouterr().out


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_compared_between_devices_can_be_computed(name):
    found = passes(FAMILIES[name], CPU)
    assert len(found) >= 3 and all(tensor.isfinite().all() for tensor in found)


def test_fsdp2_is_tried_on_a_gpu_alone_and_leaves_no_process_group(monkeypatch):
    checks = [each for each in gpu.CHECKS if "FSDP2" in each.name]
    assert [each.needs_gpu for each in checks] == [True]
    joined = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda backends, **how: joined("gloo", **how))
    monkeypatch.setattr(dist.fsdp, "CPUOffloadPolicy", dist.fsdp.OffloadPolicy)  # (here is no way to the host)
    rows = list(checks[0].run(gpu.Machine(CPU)))
    assert len(rows) == 3 and all("tokens/s" in row.result for row in rows)
    assert not dist.is_initialized()
