"""Where `place` puts a base model that one process holds alone. Of several processes, see `test_distributed.py`."""

import pytest
import torch
from torch import nn

from hf_malmen.sharding import place


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that stands for the machine's GPU."""
    device = torch.device("meta")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    return device


def test_a_model_goes_to_the_accelerator(gpu: torch.device) -> None:
    """All of it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    place(model)
    assert {tensor.device for tensor in model.state_dict().values()} == {gpu}


def test_a_given_device_comes_first(gpu: torch.device) -> None:
    """As a trainer's arguments give it."""
    model = nn.Linear(2, 2)
    place(model, torch.device("cpu"))
    assert model.weight.device.type == "cpu"
    place(model, gpu)
    assert model.weight.device == gpu


def test_a_model_that_is_placed_or_asked_to_stay(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate has placed stays there, whatever device is given; `ACCELERATE_USE_CPU` keeps all on the CPU."""
    model = nn.Linear(2, 2)
    model._hf_hook = object()
    place(model)
    place(model, gpu)
    assert model.weight.device.type == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    model = nn.Linear(2, 2)
    place(model)
    assert model.weight.device.type == "cpu"


def test_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays where it is."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    model = nn.Linear(2, 2)
    place(model)
    assert model.weight.device.type == "cpu"


@pytest.mark.usefixtures("gpu")
def test_a_model_too_large_for_the_accelerator(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes back to the CPU, all of it and with the values it had, and the user is told."""
    model = nn.Linear(2, 2)
    moves = []
    move = nn.Module.to

    def full(module: nn.Module, device: torch.device | str) -> nn.Module:
        moves.append(device)
        if str(device) == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return move(module, device)

    monkeypatch.setattr(nn.Module, "to", full)
    before = model.weight.clone()
    place(model)
    assert list(map(str, moves)) == ["meta", "cpu"]
    assert torch.equal(model.weight, before)
    assert "does not fit the memory of meta" in caplog.text
