"""Several processes, joined over gloo, against one: the same losses, gradients, editors, edits and scores."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from hf_malmen import read_history

from . import ranks
from .conftest import build_llama, build_long_facts, build_tokenizer

ROOT = Path(__file__).resolve().parents[1]
State = dict[str, Tensor]


@pytest.fixture(scope="module", params=[2, 3])
def stepped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the steps come to on one process, and on each of several."""
    folder = tmp_path_factory.mktemp("steps")
    found = ranks.run("steps", request.param, folder)
    assert [entry.pop("n_processes") for entry in found] == [request.param] * request.param
    return ranks.steps(folder), found


def assert_close(found: State, expected: State, tolerance: float) -> None:
    """The same names, and each tensor differs by `tolerance` of the norm of all at most."""
    whole = float(torch.stack([value.double().norm() for value in expected.values()]).norm())
    for name, value in expected.items():
        assert float((found[name].double() - value.double()).norm()) <= tolerance * whole, name


@pytest.mark.parametrize("name", ranks.STEPS)
def test_steps_of_several_processes_are_those_of_one(
    stepped: tuple[dict[str, Any], list[dict[str, Any]]], name: str
) -> None:
    """Shares are uneven, and some processes have no facts; losses, gradients, statistics and preserved keys agree."""
    expected, found = stepped
    dtype, _, sizes = ranks.STEPS[name]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    for step in (f"{name} {i}" for i in range(len(sizes))):
        for of_process in found:
            assert of_process[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5), step
            # A divergence between nearly equal distributions is a difference, exact to the rounding of its terms only.
            torch.testing.assert_close(of_process[step]["parts"], expected[step]["parts"], rtol=tolerance, atol=1e-6)
            gradients = of_process[step]["gradients"]
            # One process leaves None where there is nothing to learn (λ of a sum), several a zero.
            extra = gradients.keys() - expected[step]["gradients"].keys()
            assert not any(gradients[key].any() for key in extra)
            assert_close(gradients, expected[step]["gradients"], tolerance)
            for key, value in expected[step]["buffers"].items():
                torch.testing.assert_close(of_process[step]["buffers"][key], value, rtol=tolerance, atol=tolerance)
            # Of one another, the same bits: they take the same step.
            for key, value in found[0][step]["gradients"].items():
                assert torch.equal(gradients[key], value), key


def test_a_gradient_that_is_not_finite_stops_all_processes_alike(
    stepped: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    """Also where it is that of one process's part of the loss: none goes on with it, and none waits for another."""
    expected, found = stepped
    assert expected["failure"].startswith("Step 1: ")
    assert "not finite at model.layers." in expected["failure"]
    assert {of_process["failure"] for of_process in found} == {expected["failure"]}


def test_edits_and_scores_of_several_processes_are_those_of_one(tmp_path: Path) -> None:
    """Of lists, streams and checkpoints on disk, which one process writes; an error of one process reaches all."""
    build_llama().save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    lines = [json.dumps(fact.to_dict()) for fact in build_long_facts(7)]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    expected = ranks.edit_and_measure(tmp_path)
    for n in (2, 3):
        found = ranks.run("edit_and_measure", n, tmp_path)
        for name in ("rows", "products", "sum"):  # shared out, not done by each
            shares = [of_process[f"traced {name}"] for of_process in found]
            assert sum(shares) == expected[f"traced {name}"] > max(shares) > 0
        for index, of_process in enumerate(found):
            for name, value in expected.items():
                if isinstance(value, dict) and "shifts" in value:
                    assert of_process[name]["facts"] == value["facts"], name
                    assert_close(of_process[name]["shifts"], value["shifts"], 1e-5)
            assert_close(of_process["edit after a failure"], expected["edit after a failure"], 1e-5)
            for name in ("scores", "measured"):
                assert of_process[name] == pytest.approx(expected[name], abs=1e-6)
            for row, wanted in zip(of_process["per_fact"], expected["per_fact"], strict=True):
                assert {k: v for k, v in row.items() if isinstance(v, str)} == {
                    k: v for k, v in wanted.items() if isinstance(v, str)
                }
            text = of_process["failure"]
            assert "takes" in text
            assert (text == expected["failure"]) == (index == 1)
            assert text.startswith(f"Process 1 of {n} failed. FactError: ") == (index != 1)
        tensors = load_file(tmp_path / f"edited-{n}" / "model.safetensors")
        assert_close(tensors, load_file(tmp_path / "edited-1" / "model.safetensors"), 1e-5)
        assert len(read_history(tmp_path / f"edited-{n}")) == 1


def test_sharded_base_trains_edits_and_scores_like_a_whole_one(tmp_path: Path) -> None:
    """Two processes that hold the base together, as recipes/accelerate/fsdp.yaml asks for it, against one process."""
    build_llama().save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    expected = ranks.with_sharded_base(tmp_path)
    assert not expected["sharded"]
    config = yaml.safe_load((ROOT / "recipes/accelerate/fsdp.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    settings = {name.upper(): str(value).lower() for name, value in config.items() if name != "fsdp_auto_wrap_policy"}
    settings["FSDP_AUTO_WRAP_POLICY"] = config["fsdp_auto_wrap_policy"]
    found = ranks.run("with_sharded_base", 2, tmp_path, {"ACCELERATE_USE_FSDP": "true", **settings})
    for of_process in found:
        assert of_process["sharded"] == expected["edited"].keys()
        for name in ("trained", "edited", "accumulated", "without the first"):
            assert_close(of_process[name], expected[name], 1e-5)
        assert of_process["scores"] == pytest.approx(expected["scores"], abs=1e-6)
    tensors = load_file(tmp_path / "sharded-2" / "model.safetensors")
    assert_close(tensors, load_file(tmp_path / "sharded-1" / "model.safetensors"), 1e-5)
    assert len(read_history(tmp_path / "sharded-2")) == 1


def test_training_and_resuming_with_another_number_of_processes(tmp_path: Path) -> None:
    """Two epochs end alike on one process and two, and on one that resumes where two stopped and the other way round.

    The sets are the same as well, the short last one of each epoch included.
    """
    (one := tmp_path / "one").mkdir()
    whole = ranks.train(one)
    assert sorted(map(len, whole["sets"])) == [3, 3, 4, 4]
    several = ranks.run("train_and_resume", 2, tmp_path)
    assert several[0]["n_processes"] == 2
    from_two = ranks.train(tmp_path / "back", resume_from=tmp_path / "several" / "checkpoint-1")
    for found, start in [(rank[kind], kind == "resumed") for rank in several for kind in ("whole", "resumed")] + [
        (from_two, True)
    ]:
        assert found["sets"] == whole["sets"][start:]
        torch.testing.assert_close(found["losses"], whole["losses"], rtol=1e-5, atol=1e-6)
        assert found["state"].keys() == whole["state"].keys()
        for name, value in whole["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-7, atol=1e-8, msg=name)
    for name, value in several[0]["whole"]["state"].items():  # of one another, the same bits
        assert torch.equal(several[1]["whole"]["state"][name], value), name
