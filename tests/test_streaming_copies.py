"""Copies beside computing: nothing is used before it has come, and who waits for whom on a device with streams."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from streaming_models import MODELS, assert_same, backward, gradients, pair, tokens
from torch import nn

import hf_diffusionblocks as db
from hf_diffusionblocks.streaming import copies, stream
from hf_diffusionblocks.streaming.copies import Copies
from hf_diffusionblocks.streaming.gradients import _Arrive, _Leave, _Trip, tied


#: Waits that late_streams.py leaves out, to see that it finds that.
CONTROLS = ("fetches do not wait for room", "nothing waits for a fetch", "nobody waits for gradients")


class Event:
    """What is to be done when somebody waits for it."""

    def __init__(self, come: Callable[[], None] = lambda: None):
        self._come = come

    def synchronize(self) -> None:
        self._come()
        self._come = lambda: None


class LateCopies(Copies):
    """As slow as can be: what is copied is there when somebody waits for it, and NaN before."""

    def fetch(self, hosts):
        now, _ = super().fetch(hosts)
        late = [torch.full_like(each, torch.nan) for each in now]
        return late, Event(lambda: [there.copy_(value) for there, value in zip(late, now)])

    def wait_for(self, event):
        if event is not None:
            event.synchronize()

    def send_home(self, value):
        now, _ = super().send_home(value)
        late = torch.full_like(now, torch.nan)
        return late, Event(lambda: late.copy_(now))


@pytest.mark.parametrize("name", ["llama, tied", "t5", "openai-gpt, checkpoints nothing"])
@pytest.mark.parametrize("keep", [0, 1])
def test_nothing_is_used_before_it_has_come(name, keep, monkeypatch):
    monkeypatch.setattr(stream, "Copies", LateCopies)
    stock, model = pair(name)
    db.stream_layers(model, device="cpu", keep=keep)
    for step in range(3):
        for each in (stock, model):
            backward(each, MODELS[name].batch(), step)
        with torch.no_grad():
            for each in (stock, model):
                for parameter in each.parameters():
                    parameter -= 0.1 * parameter.grad
    assert_same(gradients(model), gradients(stock))


@pytest.mark.parametrize("keep", [0, 4])
def test_after_a_step_layers_are_fetched_ahead_as_ever(keep, monkeypatch):
    """Those that stay, too, of which there are old copies."""
    log: list[str] = []

    class Noted(Copies):
        def fetch(self, hosts):
            log.append(names[hosts[0][0]])
            return super().fetch(hosts)

    monkeypatch.setattr(stream, "Copies", Noted)
    _, model = pair("llama")
    db.stream_layers(model, device="cpu", keep=keep)
    names = {p: name for name, layer in model.model.layers.named_children() for p in layer.parameters()}
    names |= {p: name for name, p in model.named_parameters() if p not in names}
    for name, layer in model.model.layers.named_children():
        layer.register_forward_hook(lambda *_, name=name: log.append(f"{name} has run"))
    optimizer = torch.optim.SGD(model.parameters())
    for _ in range(3):
        backward(model, tokens())
        optimizer.step()
    log.clear()
    with torch.no_grad():
        model(**tokens())
    assert [each for each in log if each[0].isdigit()] == [
        "0", "1", "0 has run", "2", "1 has run", "3", "2 has run", "3 has run",
    ]  # fmt: skip


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_when_a_pass_ends_its_weights_have_left_host_memory(backward, monkeypatch):
    """Its caller may write into them, while the device computes."""
    events, used, come = [], [], []

    class Noted(Copies):
        def fetch(self, hosts):
            events.append(Event(partial(come.append, len(events))))
            return super().fetch(hosts)[0], events[-1]

        def wait_for(self, event):
            used.append(events.index(event))

    monkeypatch.setattr(stream, "Copies", Noted)
    _, model = pair("llama")
    db.stream_layers(model, device="cpu")
    model.requires_grad_(False)
    hidden = torch.randn(2, 12, 32, requires_grad=backward)
    for _ in range(2):  # the second fetches ahead
        logits = model(inputs_embeds=hidden).logits
        if backward:
            logits.sum().backward()
        assert come[-1] == max(used)  # (fetches are made in order)


def test_no_anomaly_is_found_in_gradients_on_their_way(monkeypatch):
    monkeypatch.setattr(stream, "Copies", LateCopies)
    _, model = pair("llama")
    db.stream_layers(model, device="cpu")
    with torch.autograd.set_detect_anomaly(True):
        backward(model, tokens())


def test_whoever_sends_a_gradient_home_does_not_wait_for_it():
    """On the device's own thread, it would have nothing to do meanwhile."""
    host = _Trip(LateCopies(torch.device("cpu"))).leave(torch.ones(2))
    assert host.isnan().all()


def test_a_default_device_does_not_matter_to_gradients():
    parameter, host = nn.Parameter(torch.ones(2)), Copies(torch.device("cpu"))
    with torch.device("meta"):
        (tied(parameter, parameter.detach().clone(), host) * 2).sum().backward()
    assert parameter.grad.tolist() == [2, 2]


@pytest.mark.parametrize("forgotten", ["wait_for", "wait"])
def test_it_tells_if_a_wait_is_forgotten(forgotten, monkeypatch):
    monkeypatch.setattr(stream, "Copies", LateCopies)
    target = LateCopies if forgotten == "wait_for" else stream.tied.__globals__["_Trip"]
    monkeypatch.setattr(target, forgotten, lambda *_: None)
    _, model = pair("llama")
    db.stream_layers(model, device="cpu")
    backward(model, tokens())
    assert any(each.isnan().any() for each in gradients(model).values())


class Stream:
    """Writes down what is asked of it."""

    def __init__(self, name: str, log: list[str]):
        self._name, self._log = name, log

    def wait_stream(self, other: Stream) -> None:
        self._log.append(f"{self._name} waits for {other._name}")

    def wait_event(self, event: Event) -> None:
        self._log.append(f"{self._name} waits for an event")

    def record_event(self) -> Event:
        self._log.append(f"event on {self._name}")
        return Event(lambda: self._log.append("host waits"))

    def __enter__(self) -> None:
        self._log.append(f"on {self._name}")

    def __exit__(self, *_) -> None:
        pass


def test_streams_wait_for_one_another_and_the_host_two_units_behind(monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(copies.torch.accelerator, "current_stream", lambda device: Stream("compute", log))
    made = Copies(torch.device("cpu"))
    made._inward, made._outward = Stream("inward", log), Stream("outward", log)
    found, event = made.fetch([(torch.ones(2), torch.bfloat16)])
    made.wait_for(event)
    # Memory that was let go is written again only when all that was asked for before is done.
    assert log == ["inward waits for compute", "on inward", "event on inward", "compute waits for an event"]
    assert found[0].dtype == torch.bfloat16
    log.clear()
    home, _ = made.send_home(torch.ones(2))
    assert log == ["outward waits for compute", "on outward", "event on outward"]
    assert torch.equal(home, torch.ones(2))
    for ask in (made.send_home, lambda value: made.fetch([(value, torch.bfloat16)])):
        for _ in range(3):
            made.next_unit()
        log.clear()
        for _ in range(5):
            made.next_unit()
            ask(torch.ones(2))
        made.next_unit()
        assert log.count("host waits") == 3  # of five units, what two have asked for is on its way


def test_what_is_let_go_is_free_when_the_device_is_done_with_it(monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(copies.torch.accelerator, "current_stream", lambda device: Stream("compute", log))
    _, model = pair("llama")
    layers = db.stream_layers(model, device="cpu")
    layers._copies._inward = Stream("inward", log)
    with torch.no_grad():
        model(**tokens())
    log.clear()
    layers.let_go()
    assert "inward waits for compute" in log


def test_what_is_let_go_is_free_when_every_stream_is_done_with_it(monkeypatch):
    """Two threads that evaluate may each have a stream of their own."""
    log: list[str] = []
    streams = [Stream("one", log), Stream("two", log)]
    monkeypatch.setattr(copies.torch.accelerator, "current_stream", lambda device: streams[0])
    made = Copies(torch.device("cpu"))
    made._inward = Stream("inward", log)
    for _ in streams:
        _, event = made.fetch([(torch.ones(2), torch.float32)])
        made.wait_for(event)
        streams.reverse()
    for _ in streams:
        log.clear()
        made.fetch([(torch.ones(2), torch.float32)])
        assert log.index("inward waits for one") < log.index("on inward") > log.index("inward waits for two")
        streams.reverse()


def test_a_gradient_on_its_way_home_is_written_into_by_nobody(monkeypatch):
    """Autograd gives one tensor to both sides of a sum, and sums into it what else comes to the other side."""
    monkeypatch.setattr(copies.torch.accelerator, "current_stream", lambda device: Stream("compute", []))
    made = Copies(torch.device("cpu"))
    made._inward, made._outward = Stream("inward", []), Stream("outward", [])
    under_way = []  # as late as can be; without a reference, which would keep autograd from it
    made.watch = lambda value, host, is_home: under_way.append((value.data_ptr(), host))

    def come() -> None:
        address, host = under_way.pop()
        host.copy_(torch.tensor((ctypes.c_float * 2).from_address(address)))

    monkeypatch.setattr(made._outward, "record_event", lambda: Event(come), raising=False)
    weight, given, trip = nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True), _Trip(made)
    placeholder = _Arrive.apply(weight, torch.float32, trip)  # (made before all else, so that the host looks at it last)
    hidden = given.view_as(given)
    others = hidden * 3
    summed = _Leave.apply(placeholder, torch.ones(2), trip) + hidden
    ((summed * 2).sum() + others.sum()).backward()
    assert weight.grad.tolist() == [2, 2] and given.grad.tolist() == [5, 5]


def test_a_gradient_that_is_home_leaves_the_device(monkeypatch):
    monkeypatch.setattr(copies.torch.accelerator, "current_stream", lambda device: Stream("compute", []))
    made = Copies(torch.device("cpu"))
    made._inward, made._outward = Stream("inward", []), Stream("outward", [])
    gradients = [torch.ones(2) for _ in range(6)]
    there = [weakref.ref(each) for each in gradients]
    _, arrival = made.send_home(gradients.pop(0))
    assert there[0]() is not None
    arrival.synchronize()
    assert there[0]() is None
    while gradients:
        made.next_unit()
        made.send_home(gradients.pop(0))
    made.next_unit()
    assert [each() is not None for each in there[1:]] == [False, False, False, True, True]


@pytest.fixture(scope="module")
def late_streams(tmp_path_factory) -> dict[str, float]:
    found = tmp_path_factory.mktemp("late") / "found.json"
    command = [sys.executable, Path(__file__).with_name("late_streams.py"), found]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(found.read_text())


def test_gradients_are_right_however_late_and_early_streams_work(late_streams):
    controls = {name: each for name, each in late_streams.items() if name in CONTROLS}
    assert len(controls) == len(CONTROLS) and all(each == float("inf") for each in controls.values())
    assert all(each < 1e-5 for name, each in late_streams.items() if name not in CONTROLS), late_streams
