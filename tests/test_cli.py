"""`hf-malmen`: its commands do what the Python calls do, and whatever is wrong with the input is one clear line."""

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_malmen import Edit, EditorConfig, EditorModel, Fact, TruncationWarning, __version__, cli, read_history
from hf_malmen.shifts import FactoredShift

Build = Callable[..., Any]

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    make_llama: Build,
    make_gpt2: Build,
    make_editor: Build,
    make_facts: Build,
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A folder with a model, an editor and a saved edit for it, facts, and another model. No test writes to it."""
    folder = tmp_path_factory.mktemp("home")
    model = make_llama()
    editor = make_editor(model, edit_lr=2e-3, fingerprint_policy="ignore")
    facts = make_facts()
    for name, base in {"model": model, "gpt2": make_gpt2()}.items():
        base.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    editor.save_pretrained(folder / "editor")
    editor.make_edit(model, facts, tokenizer).save_pretrained(folder / "edit")
    lines = [json.dumps(fact.to_dict()) for fact in facts]
    (folder / "facts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def call(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs a command in this process, in the folder `home`."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: Any) -> Done:
        monkeypatch.setattr(sys, "argv", ["hf-malmen", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Done(code, *capfd.readouterr())

    return run


def start(folder: Path, *arguments: Any, file_limit: int | None = None, **variables: str) -> "subprocess.Popen[str]":
    """Starts a command in a process of its own, which cannot write beyond `file_limit` bytes of a file."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder.parent / "hf-home"),
        "COLUMNS": "200",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)

    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.Popen(
        [sys.executable, "-m", "hf_malmen.cli", *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def spawn(folder: Path, *arguments: Any, **keywords: Any) -> Done:
    """Runs a command in a process of its own; keywords as in `start`."""
    process = start(folder, *arguments, **keywords)
    out, err = process.communicate()
    # What bitsandbytes, which peft imports where it is installed, says about itself.
    return Done(
        process.returncode, out, re.sub(r"^Failed to load CPU .* from kernels-community.*\n", "", err, flags=re.M)
    )


def refused(done: Done, code: int, message: str) -> None:
    """The exit code, and one line on stderr that begins with the program's name."""
    assert (done.code, done.out) == (code, ""), done
    assert re.fullmatch(r"hf-malmen: \S.*\n", done.err), done.err
    assert re.search(message, done.err), done.err


def below(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# Help


def test_the_commands_there_are() -> None:
    """Each has a line of its own in the overview."""
    known = "train apply write log undo recover evaluate inspect export-lora push"
    assert set(known.split()) <= set(COMMANDS)


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_mentions_everything(name: str | None, tmp_path: Path) -> None:
    """Every command in the overview, and every argument and option of a command, with a sentence about it."""
    done = spawn(tmp_path, *([name] if name else []), "--help")
    assert (done.code, done.err) == (0, "")
    if name is None:
        assert "--version" in done.out
        for command in COMMANDS:
            assert re.search(rf"^\W*{command}\s+\w", done.out, re.MULTILINE), command
        return
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"{name}: {parameter.name} has no help"
        shown = parameter.opts if parameter.param_type_name == "option" else [parameter.name]
        for word in shown:
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", done.out, re.IGNORECASE), f"{name}: {word}"


def test_version_and_start_are_quick(tmp_path: Path) -> None:
    """Neither the version, nor help, nor the package itself waits for torch; a history does not for transformers."""
    assert spawn(tmp_path, "--version") == Done(0, f"hf_malmen {__version__}\n", "")
    for module, heavy in {
        "hf_malmen": "torch transformers datasets numpy huggingface_hub typer",
        "hf_malmen.cli": "torch transformers datasets numpy huggingface_hub",
        "hf_malmen.report": "transformers peft datasets",
    }.items():
        check = f"import sys, {module}; print(*sorted(set({heavy.split()}) & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "\n"), module


def test_the_console_script() -> None:
    """`hf-malmen` runs the same function; it turns errors into a line."""
    (script,) = entry_points(group="console_scripts", name="hf-malmen")
    assert script.load() is cli.main


def test_without_a_command_it_shows_help(call: Callable[..., Done]) -> None:
    """Not an error message."""
    done = call()
    assert "Usage" in done.out + done.err
    assert "export-lora" in done.out + done.err


# What the commands do


def said(n_facts: int, folder: Path) -> str:
    """The line about an edit of four layers."""
    return f"Wrote {n_facts} facts into 4 layers of {folder}. Undo: hf-malmen undo {folder}\n"


def undated(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, without the moments at which edits were made and what follows from them."""
    files = below(folder)
    for name, data in files.items():
        if data is not None and not name.endswith(".safetensors"):
            files[name] = re.sub(rb"20\d\d-\d\d-\d\d(T[\d:]+\+00:00)?|\"card_sha256\": .*", b"", data)
    return files


def test_apply_in_its_own_process(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is byte for byte what `editor.apply` writes; the saved edit is the one that was written."""
    before = below(home)
    done = spawn(
        home,
        "apply",
        "editor",
        "model",
        "facts.jsonl",
        "--output-dir",
        tmp_path / "a",
        "--save-edit",
        tmp_path / "edit",
    )
    assert done == Done(0, said(8, tmp_path / "a"), "")
    assert below(home) == before
    monkeypatch.chdir(home)
    expected = EditorModel.from_pretrained("editor").apply("model", "facts.jsonl", output_dir=tmp_path / "b")
    assert undated(tmp_path / "a") == undated(tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (home / "model" / "model.safetensors").read_bytes()
    saved = Edit.from_pretrained(tmp_path / "edit")
    assert saved.facts == expected.facts
    assert all(torch.equal(saved.shifts[name], shift) for name, shift in expected.shifts.items())


@pytest.mark.parametrize("options", [[], ["--facts-per-turn", "3"], ["--batch-size", "1"], ["--max-memory", "1000000"]])
def test_apply_in_place(home: Path, call: Callable[..., Done], options: list[str], tmp_path: Path) -> None:
    """With the options that the Python call has."""
    shutil.copytree(home / "model", tmp_path / "model")
    done = call("apply", "editor", tmp_path / "model", "facts.jsonl", "--in-place", *options)
    assert (done.code, done.err) == (0, "")
    assert done.out == said(8, tmp_path / "model")
    keywords = {
        name.removeprefix("--").replace("-", "_"): int(value) for name, value in zip(*[iter(options)] * 2, strict=True)
    }
    EditorModel.from_pretrained("editor").apply("model", "facts.jsonl", output_dir=tmp_path / "expected", **keywords)
    assert undated(tmp_path / "model") == undated(tmp_path / "expected")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_evaluate(home: Path, call: Callable[..., Done], dtype: str, tmp_path: Path) -> None:
    """The scores of `editor.evaluate`, as a table and as JSON; nothing else is written."""
    before = below(home)
    path = tmp_path / "new" / "scores.json"
    options = ["--n-facts", 5, "--generate", "--dtype", dtype, "--batch-size", 3, "--output", path]
    done = call("evaluate", "editor", "model", "facts.jsonl", *options)
    assert (done.code, done.err) == (0, "")
    facts = [Fact(**{**row, "rephrases": tuple(row["rephrases"])}) for row in rows(home / "facts.jsonl")][:5]
    model = AutoModelForCausalLM.from_pretrained("model", dtype=dtype)
    expected = EditorModel.from_pretrained("editor").evaluate(model, facts, batch_size=3, generate=True)
    assert json.loads(path.read_text(encoding="utf-8")) == expected
    assert 0 < expected["locality"] < 1, "some answers change, so that the numbers are worth comparing"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.out.splitlines()]
    shown = [line[:4] for line in lines]
    assert ["locality, teacher-forced", "5", "1.000", f"{expected['locality']:.3f}"] in shown
    assert ["locality, generated", "5", "1.000", f"{expected['locality_generated']:.3f}"] in shown
    assert all(re.fullmatch(r"[01]\.\d{3} to [01]\.\d{3}", line[4]) for line in lines[2:])
    assert len(lines) == 2 + 11  # four metrics, teacher-forced and generated, and three of them contained
    assert below(home) == before


def test_side_effects_need_all_that_hold_the_model(
    call: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where processes act as one, all measure and one writes; before that, it has written the scores of facts."""
    scores, per_fact = tmp_path / "scores.json", tmp_path / "facts.parquet"
    (tmp_path / "texts.txt").write_text("Lyon is a city in France.", encoding="utf-8")
    command = ["evaluate", "editor", "model", "facts.jsonl", "--n-facts", 3, "--texts", tmp_path / "texts.txt"]
    command += ["--output", scores, "--per-fact", per_fact]
    calls: list[bool] = []

    def measure(*_: Any, **__: Any) -> dict[str, float]:
        calls.append(scores.is_file() and per_fact.is_file())
        return {"perplexity": 3.0, "perplexity_before": 2.0, "perplexity_change": 1.0}

    monkeypatch.setattr("hf_malmen.side_effects.measure_side_effects", measure)
    monkeypatch.setattr("hf_malmen.distributed.writes", lambda: False)
    assert call(*command) == Done(0, "", "") and calls == []
    monkeypatch.setattr("hf_malmen.distributed.in_unison", lambda: True)
    monkeypatch.setattr("hf_malmen.sharding.place", lambda _: None)  # there is nothing to shard with
    assert call(*command) == Done(0, "", "") and calls == [False]
    assert not scores.exists() and not per_fact.exists()
    monkeypatch.setattr("hf_malmen.distributed.writes", lambda: True)
    assert "| perplexity " in call(*command).out and calls == [False, True]
    assert {"perplexity", "edit_success"} <= set(json.loads(scores.read_text(encoding="utf-8")))

    def fail(*_: Any, **__: Any) -> dict[str, float]:
        raise ValueError("too long")

    monkeypatch.setattr("hf_malmen.side_effects.measure_side_effects", fail)
    per_fact.unlink()
    done = call(*command)
    assert done.code == 2 and "edit success" in done.out and "too long" in done.err
    kept = json.loads(scores.read_text(encoding="utf-8"))
    assert per_fact.is_file() and "edit_success" in kept and "perplexity" not in kept


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_inspect(home: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    """An editor, an edit, and a checkpoint in one file or several; each by what it holds."""
    editor, edit = EditorModel.from_pretrained(home / "editor"), Edit.from_pretrained(home / "edit")
    done = call("inspect", "editor")
    assert (done.code, done.err) == (0, "")
    assert "malmen editor" in done.out
    assert "; trained" in done.out
    for name in editor.module_names:
        assert re.search(
            rf"{re.escape(name)} .*48x32.* {editor.edit_lr(name):.3g} .* {editor.ridge(name):.3g} ", done.out
        )
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    EditorModel.from_base(model, EditorConfig(method="ultraedit")).save_pretrained(tmp_path / "untrained")
    done = call("inspect", tmp_path / "untrained")
    assert "ultraedit editor" in done.out and "learned" not in done.out
    assert "nothing to train; statistics of 0 rows, which follow the edits" in done.out
    done = call("inspect", home / "edit")
    assert "Edit of 8 facts" in done.out
    assert "The country of Lyon is -> Italy" in done.out
    assert "... and 3 more" in done.out
    for name, shift in edit.shifts.items():
        assert re.search(rf"{re.escape(name)} .*48x32 .*{shift.norm():.4g}", done.out)
    AutoModelForCausalLM.from_pretrained(home / "model").save_pretrained(tmp_path / "shards", max_shard_size="90KB")
    n_shards = len(list((tmp_path / "shards").glob("*.safetensors")))
    assert n_shards > 1
    size = (
        sum(t.numel() for t in AutoModelForCausalLM.from_pretrained(home / "model").state_dict().values()) * 4 / 2**20
    )
    for folder, files in (
        (home / "model", "1 safetensors file"),
        (tmp_path / "shards", f"{n_shards} safetensors files"),
    ):
        done = call("inspect", folder)
        assert done.code == 0
        assert re.fullmatch(rf"Checkpoint of a llama model: 39 tensors \(F32\), {size:.1f} MiB in {files}\n", done.out)


def test_export_lora(call: Callable[..., Done], tmp_path: Path) -> None:
    """A folder for PEFT, of the wanted rank."""
    assert call("export-lora", "edit", tmp_path / "full") == Done(0, f"Saved the adapter to {tmp_path / 'full'}.\n", "")
    with pytest.warns(TruncationWarning):
        assert call("export-lora", "edit", tmp_path / "small", "--rank", 2).code == 0
    ranks = [json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] for name in ("full", "small")]
    assert ranks == [8, 2], "the eight facts have an answer of one token each"


def write_recipe(path: Path, **changes: Any) -> Path:
    """A recipe for two quick steps."""
    content = {
        "base_model": "model",
        "train_facts": "facts.jsonl",
        "eval_facts": "facts.jsonl",
        "max_eval_facts": 4,
        "editor": {"method": "malmen", "rank": 4, "edit_lr": 1e-3, "target_modules": ["mlp.down_proj"]},
        "training": {
            "output_dir": str(path.parent / "editor"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


def test_train(call: Callable[..., Done], tmp_path: Path) -> None:
    """A YAML file becomes a trained editor with its card; options override the file; a stopped run goes on."""
    recipe = write_recipe(tmp_path / "run.yaml")
    done = call("train", "--config", recipe, "--max-steps", 1, "--output-dir", tmp_path / "other")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith(f"Saved the editor to {tmp_path / 'other'}. Try it: hf-malmen evaluate")
    assert not (tmp_path / "editor").exists()
    assert state_of(tmp_path / "other")["global_step"] == 1
    first = EditorModel.from_pretrained(tmp_path / "other")
    assert first.is_trained
    assert "base_model_fingerprint" in (tmp_path / "other" / "config.json").read_text(encoding="utf-8")

    done = call("train", "--config", recipe, "--output-dir", tmp_path / "other", "--resume")
    assert done.code == 0, done.err
    assert state_of(tmp_path / "other")["global_step"] == 2
    assert call("train", "--config", recipe).code == 0
    resumed, whole = (EditorModel.from_pretrained(tmp_path / name).state_dict() for name in ("other", "editor"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, msg=name)
    card = (tmp_path / "editor" / "README.md").read_text(encoding="utf-8")
    assert "| locality " in card
    assert call("evaluate", tmp_path / "editor", "model", "facts.jsonl").code == 0

    editor = {"method": "malmen", "rank": 4, "edit_lr": 1e-3, "target_modules": ["mlp.up_proj"]}
    other = write_recipe(tmp_path / "other.yaml", editor=editor)
    saved = below(tmp_path / "editor")
    done = call("train", "--config", other, "--resume", "--max-steps", 3)
    refused(done, 2, r"checkpoint-2 was trained with target_modules .*down_proj.*, and this editor has .*up_proj")
    assert below(tmp_path / "editor") == saved


def state_of(folder: Path) -> dict[str, Any]:
    """The trainer's state."""
    state: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return state


# Checkpoints and their history


def copy_of(home: Path, folder: Path, n_edits: int = 0) -> Path:
    """A checkpoint of its own, edited some times."""
    shutil.copytree(home / "model", folder)
    for number in range(n_edits):
        another_edit(home, number).write(folder, in_place=True)
    return folder


def another_edit(home: Path, number: int) -> Edit:
    """The saved edit, which a checkpoint takes once, with other facts; 0: with its own."""
    edit = Edit.from_pretrained(home / "edit")
    edit.facts = [replace(fact, prompt=f"{number} {fact.prompt}" if number else fact.prompt) for fact in edit.facts]
    return edit


def test_write_log_and_undo_in_their_own_processes(home: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    """What `edit.write` does; undoing both edits leaves every byte as it was."""
    model, expected = copy_of(home, tmp_path / "model"), copy_of(home, tmp_path / "expected", 1)
    before = below(model)
    told = r"Wrote edit {} \(8 facts, 4 layers\) into {}; rounding cost up to \S+ of a layer's shift\. Undo: .* {}\n"
    done = spawn(home, "write", "edit", model, "--in-place")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(told.format("0001", model, model), done.out)
    assert undated(model) == undated(expected)
    between = below(model)

    copy = tmp_path / "copy"
    done = call("write", "edit", model, "--output-dir", copy)
    assert (done.code, done.out) == (2, "")
    assert "already, as its edit 0001" in done.err
    done = call("write", another_edit(home, 1).save_pretrained(tmp_path / "another"), model, "--output-dir", copy)
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(told.format("0002", copy, copy), done.out)
    assert below(model) == between
    done = spawn(home, "log", copy, "--json")
    assert (done.code, done.err) == (0, "")
    shown = json.loads(done.out)
    assert [(edit["id"], edit["n_facts"]) for edit in shown] == [("0001", 8), ("0002", 8)]
    assert shown == json.loads(json.dumps([vars(record.summary) for record in read_history(copy)]))

    undone = "Undid edit {} (8 facts): every byte is as before it. Edits in force: {}.\n"
    assert spawn(home, "undo", copy) == Done(0, undone.format("0002", "0001"), "")
    assert below(copy) == between
    assert call("undo", copy, "--edit", "1") == Done(0, undone.format("0001", "none"), "")
    assert below(copy) == before


def test_undo_of_an_earlier_edit(home: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    """It says that the layers were added up anew, and which edits stay."""
    model = copy_of(home, tmp_path / "model", 2)
    done = call("undo", model, "--edit", "0001")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"Undid edit 0001 \(8 facts\): layers .* added up anew, .* Edits in force: 0002\.\n", done.out)
    assert [record.id for record in read_history(model)] == ["0002"]


def test_log_and_inspect_of_an_edited_checkpoint(home: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    """A row an edit, with the scores of one that was measured; a history cannot move the cursor of a terminal."""
    model = copy_of(home, tmp_path / "model")
    assert call("log", model) == Done(0, f"{model} has no edits in force.\n", "")
    done = call("apply", "editor", model, "facts.jsonl", "--in-place", "--measure")
    assert (done.code, done.err) == (0, "")
    edit = another_edit(home, 1)
    edit.editor["name_or_path"] = "org/\x1b[2Jeditor\u202e"
    edit.write(model, in_place=True)
    first, _ = read_history(model)
    assert first.summary.measured.keys() == {"edit_success", "generalization", "locality", "unrelated_accuracy"}

    done = call("log", model)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    scores = ", ".join(f"{name.replace('_', ' ')} {score:.3f}" for name, score in first.summary.measured.items())
    assert rows == [
        ["0001", first.summary.created_at, "8", "malmen (editor)", "4", f"{max(first.rounding.values()):.2g}", scores],
        ["0002", edit.created_at, "8", "malmen (org/ [2Jeditor )", "4", rows[1][5], "not measured"],
    ]
    shown = call("inspect", model)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith("Checkpoint of a llama model: 39 tensors (F32), ")
    assert shown.out.endswith(f" in 1 safetensors file\n\n{done.out}")
    assert "Edit of 8 facts" in call("inspect", model / "edits" / "0001").out


def test_a_killed_writer_and_recover(home: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the weights; then the bytes are those of before, every one."""
    model, names = tmp_path / "model", [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    model.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(2048, 4096, generator=generator).bfloat16() for name in names}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})  # 64 MiB
    shutil.copy(home / "model" / "config.json", model)
    shifts = {
        name: FactoredShift(*(torch.randn(4, size, generator=generator) for size in (4096, 2048))) for name in names
    }
    Edit(shifts, facts=[Fact("a", "b")]).save_pretrained(tmp_path / "edit")
    before = below(model)

    def head() -> bytes:
        with open(model / "model.safetensors", "rb") as stream:
            return stream.read(2**16)

    old = head()
    writer = start(home, "write", tmp_path / "edit", model, "--in-place")
    while head() == old and writer.poll() is None:
        time.sleep(0.001)
    writer.send_signal(signal.SIGKILL)
    out, err = writer.communicate()
    assert (writer.returncode, out) == (-signal.SIGKILL, ""), err
    assert (model / "edits" / ".journal").is_dir()
    assert spawn(home, "recover", model) == Done(0, f"Recovered: {model}. Edits in force: none.\n", "")
    assert below(model) == before
    assert spawn(home, "recover", model) == Done(0, f"Nothing to recover: {model}. Edits in force: none.\n", "")


def test_facts_month_after_month(home: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    """What is in force is skipped, what changed is replaced, and the log shows both, as a table and as JSON."""
    model = copy_of(home, tmp_path / "model")
    prompts = ["Bergen is a city in", "Fez is a city in"]
    for month, targets in {"january": ["Ghana", "Peru"], "february": ["Ghana", "Chile | x"]}.items():
        lines = [json.dumps({"prompt": p, "target": t}) for p, t in zip(prompts, targets, strict=True)]
        (tmp_path / f"{month}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for month in ("january", "february", "february"):
        done = call("apply", "editor", model, tmp_path / f"{month}.jsonl", "--in-place", "--accumulate")
        assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Skipped 2 facts that are in force already, or come twice. Nothing was left to write;")
    assert [record.summary.n_facts for record in read_history(model)] == [2, 1]
    done = call("log", model, "--facts")
    assert (done.code, done.err) == (0, "")
    first, _, *table = done.out.splitlines()
    assert first == "Facts in force: 2. Replaced: 1."
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in table[2:]]
    assert rows == [
        ["0001", prompts[0], "Ghana", "in force"],
        ["0001", prompts[1], "Peru", "replaced by edit 0002"],
        ["0002", prompts[1], "Chile \\| x", "in force"],
    ]
    found = json.loads(call("log", model, "--facts", "--json").out)
    assert [entry["replaced_by"] for entry in found["facts"]] == [None, "0002", None]
    assert (found["n_in_force"], found["facts"][2]["fact"]["target"]) == (2, "Chile | x")


# Failures that are not the input's fault: exit code 1, one line


def test_a_checkpoint_that_another_process_writes(home: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    """Is left alone."""
    model = copy_of(home, tmp_path / "model", 1)
    (tmp_path / "new.jsonl").write_text('{"prompt": "Bergen is a city in", "target": "Ghana"}', encoding="utf-8")
    before = below(model)
    holder = os.open(model, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        refused(spawn(home, "undo", model), 1, "Another process is writing to")
        for command in (["write", "edit", model], ["apply", "editor", model, tmp_path / "new.jsonl"]):
            refused(call(*command, "--in-place"), 1, "Another process is writing to")
    finally:
        os.close(holder)
    assert below(model) == before


def test_a_disk_that_fails(home: Path, tmp_path: Path) -> None:
    """Before the weights are touched, nothing has changed; after it, `recover` takes the change back, or ends it."""
    model = copy_of(home, tmp_path / "model")
    another_edit(home, 1).write(model, in_place=True)
    before = below(model)
    # The saved weights are smaller than the file that they come from and go back to.
    small, large = 2**10, (model / "edits" / "0001" / "originals.safetensors").stat().st_size + 2**10
    assert large < 0.5 * (model / "model.safetensors").stat().st_size
    refused(spawn(home, "write", "edit", model, "--in-place", file_limit=small), 1, "File too large")
    assert below(model) == before
    refused(spawn(home, "write", "edit", model, "--in-place", file_limit=large), 1, "File too large.*hf-malmen recover")
    assert (model / "edits" / ".journal").is_dir()
    assert spawn(home, "recover", model) == Done(0, f"Recovered: {model}. Edits in force: 0001.\n", "")
    assert below(model) == before
    refused(spawn(home, "undo", model, file_limit=large), 1, "File too large.*hf-malmen recover")
    done = spawn(home, "log", model)
    assert (done.code, done.out) == (0, f"{model} has no edits in force.\n")
    assert done.err == "A change that had not ended was finished or taken back first.\n"
    assert below(model) == below(home / "model")


def test_an_edit_that_cannot_be_saved_beside(home: Path, tmp_path: Path, call: Callable[..., Done]) -> None:
    """The facts are written by then, and the command says so."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    options = ["--output-dir", tmp_path / "new", "--save-edit", tmp_path / "link" / "edit"]
    done = call("apply", "editor", "model", "facts.jsonl", *options)
    assert (done.code, done.out) == (2, said(8, tmp_path / "new"))
    assert re.fullmatch(r"hf-malmen: .*link.*\n", done.err)
    assert [record.id for record in read_history(tmp_path / "new")] == ["0001"]


def test_a_hub_that_does_not_answer(home: Path) -> None:
    """Nobody listens at the discard port."""
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x"}
    refused(spawn(home, "push", "edit", "org/edit", **online), 1, "refused")


# Bad input: exit code 2, one line, nothing written


@pytest.fixture
def bad(home: Path, make_llama: Build, tmp_path: Path) -> Path:
    """Files and folders that are wrong in one way each."""
    folder = tmp_path / "bad"
    folder.mkdir()
    texts = {
        "broken.json": '[{"prompt": "a",',
        "two.jsonl": '{"prompt": "a", "target": "b"}\n{"prompt": "a", "target": "c"}\n',
        "empty.jsonl": "",
        "columns.csv": "question,answer\nq,a\n",
        "half.json": '[{"prompt": "a", "target": ""}]',
        "long.json": json.dumps([{"prompt": "Lyon " * 80, "target": "b"}]),
        "not.yaml": "a: [1\n",
        "list.yaml": "- 1\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "nothing").mkdir()
    for name, config in {"broken": "{oops", "list": "[]", "number": "3"}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config, encoding="utf-8")
    (folder / "used").mkdir()
    (folder / "used" / "x").write_text("x", encoding="utf-8")
    make_llama().save_pretrained(folder / "no tokenizer")
    (folder / "pickles").mkdir()
    (folder / "pickles" / "pytorch_model.bin").write_bytes(b"x")
    (folder / "pickles" / "config.json").write_bytes((home / "model" / "config.json").read_bytes())
    for name in ("model", "editor"):
        shutil.copytree(home / name, folder / f"damaged {name}")
        os.truncate(folder / f"damaged {name}" / "model.safetensors", 5000)
    shutil.copytree(home / "edit", folder / "half an edit")
    (folder / "half an edit" / "edit.safetensors").unlink()
    edited = copy_of(home, folder / "edited", 1)
    shutil.copytree(edited, folder / "hostile")
    record = folder / "hostile" / "edits" / "0001" / "record.json"
    record.write_text(
        record.read_text(encoding="utf-8").replace('"model.safetensors"', '"../edited/model.safetensors"')
    )
    weights = load_file(copy_of(home, folder / "quantised") / "model.safetensors")
    key = next(key for key in weights if key.endswith("down_proj.weight"))
    save_file(weights | {key: weights[key].to(torch.int8)}, folder / "quantised" / "model.safetensors")
    write_recipe(folder / "unknown.yaml", editor={"rnak": 4})
    write_recipe(folder / "dtype.yaml", dtype="float23")
    write_recipe(folder / "model.yaml", base_model="")
    write_recipe(folder / "nowhere.yaml", training={"max_steps": 1})
    write_recipe(folder / "value.yaml", editor={"method": "magic"})
    write_recipe(folder / "settings.yaml", editor=[1])
    write_recipe(folder / "facts.yaml", train_facts="no.jsonl")
    write_recipe(folder / "an editor.yaml", base_model="editor")
    write_recipe(folder / "good.yaml")
    (folder / "older run" / "checkpoint-7").mkdir(parents=True)
    for name, training in {
        "older": {"output_dir": str(folder / "older run")},
        "below": {"output_dir": str(folder / "half.json" / "editor")},
        "quotes": {"lm_batch_size": "4"},
        "resumes": {"resume_from_checkpoint": "editor/checkpoint-1"},
        "idle": {"do_train": False},
    }.items():
        write_recipe(folder / f"{name}.yaml", training={"output_dir": str(folder / "new")} | training)
    untrained = {"editor": {"method": "ultraedit"}, "training": {"output_dir": str(folder / "older run")}}
    write_recipe(folder / "untrained.yaml", **untrained)
    return folder


APPLY = ["apply", "editor", "model", "facts.jsonl"]
OUT = ["--output-dir", "new/folder"]
BAD_INPUT: dict[str, tuple[list[str], str]] = {
    "facts that are not there": (["apply", "editor", "model", "no.jsonl", *OUT], r"There is no file no\.jsonl"),
    "broken facts": (["apply", "editor", "model", "BAD/broken.json", *OUT], r"broken\.json is not valid JSON"),
    "contradicting facts": (["apply", "editor", "model", "BAD/two.jsonl", *OUT], r"Facts 0 and 1 give .* two targets"),
    "no facts": (["apply", "editor", "model", "BAD/empty.jsonl", *OUT], r"No facts in .*empty\.jsonl"),
    "other columns": (["apply", "editor", "model", "BAD/columns.csv", *OUT], r"has the columns question, answer\."),
    "an empty target": (["apply", "editor", "model", "BAD/half.json", *OUT], r"Fact 0 has an empty target"),
    "a fact too long": (["apply", "editor", "model", "BAD/long.json", *OUT], r"the model reads at most 64"),
    "a folder of facts": (["apply", "editor", "model", "BAD", *OUT], r"is not a file of facts"),
    "no destination": (["apply", "editor", "model", "facts.jsonl"], r"needs output_dir=.*give exactly one"),
    "two destinations": (["apply", "editor", "model", "facts.jsonl", "--in-place", *OUT], r"give exactly one"),
    "a used destination": (["apply", "editor", "model", "facts.jsonl", "--output-dir", "BAD/used"], r"is not empty"),
    "a destination inside": (["apply", "editor", "model", "facts.jsonl", "--output-dir", "model/new"], r"lies inside"),
    "no editor": (["apply", "no/editor", "model", "facts.jsonl", *OUT], r"."),
    "an empty folder for an editor": (["apply", "BAD/nothing", "model", "facts.jsonl", *OUT], r"BAD/nothing"),
    "a model for an editor": (["apply", "model", "model", "facts.jsonl", *OUT], r"model holds no editor.*llama"),
    "an edit for an editor": (["apply", "edit", "model", "facts.jsonl", *OUT], r"edit holds no editor.*a saved edit"),
    "a broken editor": (["apply", "BAD/broken", "model", "facts.jsonl", *OUT], r"BAD/broken"),
    "no model": (["apply", "editor", "no/model", "facts.jsonl", *OUT], r"There is no folder no/model, and"),
    "an editor for a model": (["apply", "editor", "editor", "facts.jsonl", *OUT], r"holds an editor; expected the"),
    "another model": (["apply", "editor", "gpt2", "facts.jsonl", *OUT], r"GPT2LMHeadModel has no module"),
    "a model without a tokenizer": (
        ["apply", "editor", "BAD/no tokenizer", "facts.jsonl", *OUT],
        r"No tokenizer",
    ),
    "a model in pickles": (["apply", "editor", "BAD/pickles", "facts.jsonl", *OUT], r"\.bin files only"),
    "evaluation of no facts": (["evaluate", "editor", "model", "no.jsonl"], r"There is no file no\.jsonl"),
    "evaluation of no editor": (["evaluate", "model", "model", "facts.jsonl"], r"model holds no editor"),
    "a limit of nothing": (
        ["evaluate", "editor", "model", "facts.jsonl", "--limit", "3"],
        r"--limit is for benchmarks",
    ),
    "tasks that are not there": (
        ["evaluate", "editor", "model", "facts.jsonl", "--tasks", "tiny_history", "--include-path", "BAD/nothing"],
        r"lm-eval has no task 'tiny_history'",
    ),
    "scores into a folder": (["evaluate", "editor", "model", "facts.jsonl", "--output", "BAD/used"], r"is a folder"),
    "scores below a file": (
        ["evaluate", "editor", "model", "facts.jsonl", "--output", "BAD/half.json/x"],
        r"below a file",
    ),
    "scores into one file": (
        ["evaluate", "editor", "model", "facts.jsonl", "--output", "new", "--per-fact", "new/../new"],
        r"new cannot hold both the scores and the results by fact",
    ),
    "a revision of a folder": ([*APPLY, *OUT, "--revision", "v1"], r"--revision is of a repo on the Hub, and model is"),
    "writing a revision": (["write", "edit", "model", *OUT, "--revision", "v1"], r"--revision is of a repo on the Hub"),
    "evaluation of no model": (
        ["evaluate", "editor", "nosuch", "facts.jsonl"],
        r"There is no folder nosuch, and no repo",
    ),
    "evaluation of no folder": (["evaluate", "editor", "./no", "facts.jsonl"], r"There is no folder \./no\. Check the"),
    "evaluation of a file": (
        ["evaluate", "editor", "facts.jsonl", "facts.jsonl"],
        r"facts\.jsonl is a file; expected a",
    ),
    "evaluation of an editor": (
        ["evaluate", "editor", "editor", "facts.jsonl"],
        r"editor holds an editor; expected the",
    ),
    "evaluation by no folder": (
        ["evaluate", "/no", "model", "facts.jsonl"],
        r"There is no folder /no\. Check the path",
    ),
    "evaluation by no editor": (
        ["evaluate", "nosuch", "model", "facts.jsonl"],
        r"There is no folder nosuch, and no repo",
    ),
    "evaluation of another model": (["evaluate", "editor", "gpt2", "facts.jsonl"], r"GPT2LMHeadModel has no module"),
    "inspection of nothing": (["inspect", "no/thing"], r"."),
    "inspection of an empty folder": (["inspect", "BAD/nothing"], r"has no config\.json; expected an editor"),
    "inspection of a broken folder": (["inspect", "BAD/broken"], r"config\.json does not hold valid JSON"),
    "inspection of a list": (["inspect", "BAD/list"], r"config\.json holds a JSON list; expected an object"),
    "inspection of a file": (["inspect", "facts.jsonl"], r"facts\.jsonl"),
    "LoRA of an editor": (["export-lora", "editor", "new/folder"], r"editor holds an editor"),
    "LoRA of nothing": (["export-lora", "no/edit", "new/folder"], r"There is no folder no/edit, and no repo"),
    "LoRA into a used folder": (["export-lora", "edit", "BAD/used"], r"BAD/used exists and is not empty"),
    "a used place for the edit": ([*APPLY, *OUT, "--save-edit", "BAD/used"], r"BAD/used exists and is not empty"),
    "a destination below a file": ([*APPLY, "--output-dir", "BAD/half.json/x"], r"half\.json/x lies below a file"),
    "an edit below a file": (
        [*APPLY, "--in-place", "--save-edit", "BAD/half.json/x"],
        r"half\.json/x lies below a file",
    ),
    "LoRA below a file": (["export-lora", "edit", "BAD/half.json/x"], r"half\.json/x lies below a file"),
    "one place for both": ([*APPLY, *OUT, "--save-edit", "new/../new/folder"], r"cannot hold both"),
    "a damaged model": (["evaluate", "editor", "BAD/damaged model", "facts.jsonl"], r"."),
    "a damaged editor": (["apply", "BAD/damaged editor", "model", "facts.jsonl", *OUT], r"."),
    "application to a damaged model": (["apply", "editor", "BAD/damaged model", "facts.jsonl", *OUT], r"is damaged"),
    "application to a hostile one": (["apply", "editor", "BAD/hostile", "facts.jsonl", *OUT], r"names the file"),
    "writing of nothing": (["write", "no/edit", "model", *OUT], r"There is no folder no/edit, and no repo"),
    "writing of an editor": (["write", "editor", "model", *OUT], r"editor holds an editor"),
    "writing of half an edit": (["write", "BAD/half an edit", "model", *OUT], r"edit\.safetensors"),
    "writing nowhere": (["write", "edit", "model"], r"needs output_dir=.*give exactly one"),
    "writing into no model": (["write", "edit", "BAD/absent", "--in-place"], r"There is no folder"),
    "writing into another model": (["write", "edit", "gpt2", *OUT], r"model\.layers\.\d\.mlp\.down_proj"),
    "writing into a quantised one": (
        ["write", "edit", "BAD/quantised", "--in-place"],
        r"down_proj.* in I8 .*cannot take",
    ),
    "writing into a damaged one": (["write", "edit", "BAD/damaged model", "--in-place"], r"It is damaged"),
    "writing into pickles": (["write", "edit", "BAD/pickles", "--in-place"], r"\.bin files only"),
    "writing into a hostile one": (["write", "edit", "BAD/hostile", "--in-place"], r"record\.json names the file"),
    "log of nothing": (["log", "BAD/absent"], r"There is no folder BAD/absent"),
    "log of a file": (["log", "facts.jsonl"], r"There is no folder facts\.jsonl"),
    "log of a hostile one": (["log", "BAD/hostile"], r"record\.json names the file"),
    "inspection of a hostile one": (["inspect", "BAD/hostile"], r"record\.json names the file"),
    "undo in no folder": (["undo", "BAD/absent"], r"There is no folder BAD/absent"),
    "undo of no edits": (["undo", "model"], r"model has no edits in force"),
    "undo of another edit": (["undo", "BAD/edited", "--edit", "7"], r"has no edit 7 in force\. Its edits: 0001\."),
    "undo of no number": (["undo", "BAD/edited", "--edit", "../0001"], r"has no edit \.\./0001 in force"),
    "undo in a hostile one": (["undo", "BAD/hostile"], r"record\.json names the file"),
    "recovery of nothing": (["recover", "BAD/absent"], r"There is no folder BAD/absent"),
    "push of nothing": (["push", "BAD/nothing", "org/name"], r"has no config\.json"),
    "no recipe": (["train", "--config", "no.yaml"], r"There is no file no\.yaml"),
    "a recipe that is no YAML": (["train", "--config", "BAD/not.yaml"], r"not\.yaml is not valid YAML"),
    "a recipe that is a list": (["train", "--config", "BAD/list.yaml"], r"list\.yaml holds a list; expected base"),
    "a recipe with a typo": (["train", "--config", "BAD/unknown.yaml"], r"editor: unknown 'rnak'\. Known: .*rank"),
    "a recipe without a model": (["train", "--config", "BAD/model.yaml"], r"model\.yaml has no base_model"),
    "a recipe without an output": (["train", "--config", "BAD/nowhere.yaml"], r"has no training\.output_dir"),
    "a recipe of another dtype": (["train", "--config", "BAD/dtype.yaml"], r"dtype is 'float23'; allowed: auto"),
    "a recipe with a bad value": (["train", "--config", "BAD/value.yaml"], r"EditorConfig\.method is 'magic'; allowed"),
    "a recipe with bad settings": (["train", "--config", "BAD/settings.yaml"], r"editor is \[1\]; expected settings"),
    "a recipe without facts": (["train", "--config", "BAD/facts.yaml"], r"There is no file no\.jsonl"),
    "a recipe of an editor": (["train", "--config", "BAD/an editor.yaml"], r"editor holds an editor; expected the"),
    "a recipe over an older run": (
        ["train", "--config", "BAD/older.yaml"],
        r"has checkpoints of an earlier run, .* checkpoint-7\. --resume goes on with it; or choose another output_dir",
    ),
    "a recipe without training over a run": (
        ["train", "--config", "BAD/untrained.yaml", "--resume"],
        r"the last of them checkpoint-7\. This method is not trained: choose another output_dir",
    ),
    "a recipe into a file": (
        ["train", "--config", "BAD/below.yaml"],
        r"output_dir is .*/editor, which is a file or lies",
    ),
    "a recipe with quotes": (
        ["train", "--config", "BAD/quotes.yaml"],
        r"training: .*lm_batch_size is '4'; expected a whole",
    ),
    "a recipe that resumes": (
        ["train", "--config", "BAD/resumes.yaml"],
        r"resume_from_checkpoint is .*expected none\. --res",
    ),
    "a recipe without training": (
        ["train", "--config", "BAD/idle.yaml"],
        r"training: do_train is False; expected none",
    ),
    "nothing to resume": (["train", "--config", "BAD/good.yaml", "--resume"], r"has no checkpoint to resume from"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str, home: Path, bad: Path, call: Callable[..., Done]) -> None:
    """The line starts with the program's name, and there is no traceback."""
    arguments, message = BAD_INPUT[case]
    before = below(home), below(bad.parent)
    done = call(*[argument.replace("BAD", str(bad)) for argument in arguments])
    refused(done, 2, message.replace("BAD", re.escape(str(bad))))
    assert (below(home), below(bad.parent)) == before


@pytest.mark.parametrize("case", ["no destination", "another model", "undo in a hostile one"])
def test_bad_input_in_its_own_process(case: str, home: Path, bad: Path) -> None:
    """Also where progress bars and library messages are not turned off."""
    arguments, message = BAD_INPUT[case]
    refused(spawn(home, *[argument.replace("BAD", str(bad)) for argument in arguments]), 2, message)
    assert not (home / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["apply", "editor"],
        ["apply", "editor", "model", "facts.jsonl", "--outptu-dir", "new"],
        ["apply", "editor", "model", "facts.jsonl", *OUT, "--facts-per-turn", "0"],
        ["apply", "editor", "model", "facts.jsonl", *OUT, "--batch-size", "two"],
        ["evaluate", "editor", "model", "facts.jsonl", "--n-facts", "0"],
        ["evaluate", "editor", "model", "facts.jsonl", "--dtype", "float23"],
        ["export-lora", "edit", "new", "--rank", "-1"],
        ["write", "edit", "--in-place"],
        ["undo", "model", "1"],
        ["log"],
        ["recover"],
        ["push", "edit"],
        ["train"],
        ["train", "--config", "run.yaml", "--max-steps", "0"],
    ],
)
def test_usage_errors(arguments: list[str], home: Path, call: Callable[..., Done]) -> None:
    """What does not fit a command's own options: usage, exit code 2, and nothing has started."""
    before = below(home)
    done = call(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage" in done.err
    assert "Traceback" not in done.err
    assert below(home) == before


def test_a_failure_that_is_not_the_inputs_fault(home: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    """A model whose numbers overflow: exit code 1, one line that names the layer."""
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(1e30)
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / "model" / name, tmp_path / "model" / name)
    done = call("apply", "editor", tmp_path / "model", "facts.jsonl", "--output-dir", tmp_path / "new")
    assert (done.code, done.out) == (1, "")
    assert re.fullmatch(r"hf-malmen: model\.layers\.\d\.mlp\.down_proj: .* not finite.*\n", done.err)
    assert not (tmp_path / "new").exists()
