"""The recipes run: the demo end to end on the real model with very little training, and the YAML runs load."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from huggingface_hub import ModelCard
from transformers import AutoConfig

from hf_malmen import EditorConfig, EditorModel, EditorTrainingArguments, Fact
from hf_malmen.recipe import load_recipe, measure, run_recipe
from hf_malmen.tasks import AUTO_CLASSES

from .zoo import SIZES, T5

ROOT = Path(__file__).parent.parent
YAML_RECIPES = sorted(set((ROOT / "recipes").glob("*.yaml")) - set((ROOT / "recipes").glob("compare-*.yaml")))
README = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", YAML_RECIPES, ids=lambda path: path.stem)
def test_yaml_recipe_builds_its_configuration(path: Path, tmp_path: Path) -> None:
    """Every field of a recipe is known, and its values are allowed."""
    recipe = load_recipe(path, {"output_dir": str(tmp_path)})
    config = EditorConfig(**recipe.editor)
    arguments = EditorTrainingArguments(**recipe.training)
    assert config.rank == recipe.editor.get("rank", 0)
    lengths = {name: recipe.training[name] for name in ("max_steps", "num_train_epochs") if name in recipe.training}
    assert lengths == {name: getattr(arguments, name) for name in lengths}
    assert bool(lengths) == config.needs_training
    assert path.read_text(encoding="utf-8").startswith(f"# hf-malmen train --config recipes/{path.name}\n")


def test_unknown_names_in_a_recipe_are_refused(tmp_path: Path) -> None:
    """A typo at any level is an error that lists what is known."""
    good = {"base_model": "b", "train_facts": "f", "training": {"output_dir": "o"}}
    cases = {
        "base_modle": {**good, "base_modle": "b"},
        "rnak": {**good, "editor": {"rnak": 3}},
        "max_setps": {**good, "training": {"output_dir": "o", "max_setps": 3}},
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        with pytest.raises(ValueError, match=f"unknown '{name}'. Known: "):
            load_recipe(path)


def test_numbers_are_read_as_they_are_written(tmp_path: Path) -> None:
    """Those without a point too, which YAML 1.1 takes for texts; texts and whole numbers stay."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base_model: 1e-4b\ntrain_facts: f\neditor: {edit_lr: 1e-3, ridge: 2E+2, rank: 8}\n"
        "training: {output_dir: o, learning_rate: 1e-4, weight_decay: -.5e-1, shift_penalty: 3.e-4}\n"
    )
    recipe = load_recipe(path)
    assert recipe.base_model == "1e-4b"
    assert recipe.editor == {"edit_lr": 1e-3, "ridge": 200.0, "rank": 8}
    assert isinstance(recipe.editor["rank"], int)
    assert recipe.training == {"output_dir": "o", "learning_rate": 1e-4, "weight_decay": -0.05, "shift_penalty": 3e-4}


def save_inputs(folder: Path, model: Any, tokenizer: Any, facts: list[Fact]) -> dict[str, Any]:
    """A recipe of one quick step, with its inputs in `folder`."""
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lines = [json.dumps(fact.to_dict()) for fact in facts]
    (folder / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    training = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    return {
        "base_model": str(folder / "base"),
        "train_facts": str(folder / "facts.jsonl"),
        "eval_facts": str(folder / "facts.jsonl"),
        "editor": {"method": "malmen", "rank": 4, "edit_lr": 1e-3, "target_modules": ["mlp.down_proj"]},
        "training": {**training, "output_dir": str(folder / "editor"), "save_strategy": "no", "report_to": "none"},
    }


def test_card_says_what_the_saved_editor_does(
    tmp_path: Path, make_llama: Callable[..., Any], tokenizer: Any, make_facts: Callable[..., list[Fact]]
) -> None:
    """The results beside the editor are those of `evaluate` on the held-out facts, at each of `eval_sizes`."""
    model, facts = make_llama(), make_facts(8)
    content = save_inputs(tmp_path, model, tokenizer, facts)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, "eval_sizes": [8, 3], "license": "mit"}), encoding="utf-8")
    folder = run_recipe(load_recipe(path))
    results = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))["measurements"]
    assert [entry["n_at_once"] for entry in results] == [8, 3]
    assert [set(entry["n_facts"].values()) for entry in results] == [{8}, {6}]  # two full sets of three
    editor = EditorModel.from_pretrained(folder)
    for entry, sets in zip(results, ([facts], [facts[:3], facts[3:6]]), strict=True):
        scores = [editor.evaluate(model, chosen, tokenizer) for chosen in sets]
        mean = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
        assert entry["scores"] == pytest.approx(mean, abs=1e-6)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.datasets is None
    assert (folder / "results.png").is_file()
    assert f"| edit success       |       3 |  {results[1]['scores']['edit_success_before']:.3f} |" in card.text

    del content["eval_facts"]
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert "Not measured." in (run_recipe(load_recipe(path)) / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("warm_up", [True, False])
def test_a_recipe_without_training(
    warm_up: bool,
    tmp_path: Path,
    make_llama: Callable[..., Any],
    tokenizer: Any,
    make_facts: Callable[..., list[Fact]],
) -> None:
    """The editor is saved with its card, and with the statistics of the training facts where there are any."""
    content = save_inputs(tmp_path, make_llama(), tokenizer, make_facts(8))
    content["editor"] = {"method": "stableedit", "edit_lr": 1e-2, "target_modules": ["mlp.down_proj"]}
    if not warm_up:
        del content["train_facts"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    folder = run_recipe(load_recipe(path))
    editor = EditorModel.from_pretrained(folder)
    assert editor.num_parameters() == 0
    assert all(bool(own.count > 8) == warm_up for own in editor.statistics.values())
    scores = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))["measurements"][0]["scores"]
    assert scores == pytest.approx(editor.evaluate(make_llama(), make_facts(8), tokenizer), abs=1e-6)
    assert scores["edit_success"] > scores["edit_success_before"]
    card = ModelCard.load(folder / "README.md").text
    start = f"are those of 8 facts from {content['train_facts']}" if warm_up else "start from nothing"
    assert f"The statistics {start}, and follow the edits." in card.replace("\\", "")
    assert "statistics by which a method without training turns facts into weight shifts" in card
    assert "Hyper-network" not in card and "hyper-network" not in card
    with pytest.raises(ValueError, match="has no checkpoint to resume from"):
        run_recipe(load_recipe(path), resume=True)


@pytest.mark.parametrize("method", ["memit", "ft"])
@pytest.mark.parametrize("from_texts", [True, False])
def test_a_recipe_that_reads_text(
    method: str,
    from_texts: bool,
    tmp_path: Path,
    make_llama: Callable[..., Any],
    tokenizer: Any,
    make_facts: Callable[..., list[Fact]],
) -> None:
    """The editor is saved with its card and with the covariance of a text, or of the training facts as sentences."""
    facts = make_facts(8)
    content = save_inputs(tmp_path, make_llama(), tokenizer, facts)
    content["editor"] = {"method": method, "layers_to_transform": [1, 2], "n_steps": 2}
    sentences = [f"{fact.prompt} {fact.target}" for fact in facts]
    if from_texts:
        del content["train_facts"]
        (tmp_path / "texts.txt").write_text("\n".join(sentences), encoding="utf-8")
        content |= {"texts": str(tmp_path / "texts.txt"), "n_tokens": 30}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    folder = run_recipe(load_recipe(path))
    editor = EditorModel.from_pretrained(folder)
    sentences += [f"{fact.unrelated_prompt} {fact.unrelated_answer}" for fact in facts]
    n_tokens = 30 if from_texts else sum(len(tokenizer(sentence)["input_ids"]) for sentence in sentences)
    assert editor.n_covariance_tokens == n_tokens
    scores = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))["measurements"][0]["scores"]
    assert scores == pytest.approx(editor.evaluate(make_llama(), facts, tokenizer), abs=1e-6)
    card = ModelCard.load(folder / "README.md").text
    assert f"The covariance is that of the keys of {n_tokens} tokens of text." in card
    assert "the covariance of ordinary keys, which a method without training leaves where they are" in card


def test_what_a_recipe_that_reads_text_needs(tmp_path: Path) -> None:
    """Texts, or facts in their place; and no other method takes any."""
    cases = {
        "has no texts, nor train_facts to read": {"editor": {"method": "memit"}},
        "its method reads no text": {"editor": {"method": "ultraedit"}, "texts": "t"},
    }
    for message, fields in cases.items():
        path = tmp_path / "recipe.yaml"
        content = {"base_model": "b", "training": {"output_dir": "o"}} | fields
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_recipe(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_eval_facts": -1}, "max_eval_facts is -1; expected a whole number of at least 1"),
        ({"max_eval_facts": "8"}, "max_eval_facts is '8'; expected a whole number of at least 1"),
        ({"base_model": 5}, "base_model is 5; expected one text"),
        ({"train_facts": ["f"]}, r"train_facts is \['f'\]; expected one text"),
        ({"training": {"output_dir": 5}}, "training: output_dir is 5; expected one text"),
    ],
)
def test_values_of_a_recipe_are_checked(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Where it is read, and not as a traceback from wherever they are used."""
    content = {"base_model": "b", "train_facts": "f", "eval_facts": "f", "training": {"output_dir": "o"}} | change
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


def test_training_needs_facts(tmp_path: Path) -> None:
    """A recipe of a method that is trained, or of one that is not known, has some."""
    for number, editor in enumerate(({}, {"method": "rledit"}, {"method": "magic"})):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump({"base_model": "b", "editor": editor, "training": {"output_dir": "o"}}))
        with pytest.raises(ValueError, match="has no train_facts"):
            load_recipe(path)


def test_measure_averages_over_facts_that_have_what_is_measured() -> None:
    """Sets in which fewer facts have rephrases weigh less in generalization, and only there."""

    class FakeEditor:
        def evaluate(self, model: Any, facts: list[Fact], *_: Any, **__: Any) -> dict[str, float]:
            rephrased = sum(bool(fact.rephrases) for fact in facts)
            scores = {"edit_success": len(facts[0].prompt) / 10, "edit_success_before": 0.0}
            return scores | ({"generalization": rephrased / 2, "generalization_before": 0.0} if rephrased else {})

    facts = [Fact("p" * i, "t", rephrases=("r",) * (i in (1, 2, 3))) for i in range(1, 8)]
    pairs, one = measure(FakeEditor(), None, facts, [2, 1])  # type: ignore[arg-type]
    # Pairs (1, 2), (3, 4), (5, 6) with 2, 1 and no rephrased facts; the seventh fact is left over.
    assert pairs.scores["edit_success"] == pytest.approx((0.1 + 0.3 + 0.5) / 3)
    assert pairs.scores["generalization"] == pytest.approx((2 * 1.0 + 1 * 0.5) / 3)
    assert pairs.n_facts == {"edit_success": 6, "generalization": 3}
    assert one.scores["edit_success"] == pytest.approx(sum(range(1, 8)) / 10 / 7)
    assert one.n_facts == {"edit_success": 7, "generalization": 3}


@pytest.mark.parametrize(
    "sizes", [[], 16, [0], [-1, 4], ["16"], [1.5], [True], [4, 4]], ids=lambda sizes: json.dumps(sizes)
)
def test_bad_eval_sizes_are_refused(sizes: Any, tmp_path: Path) -> None:
    """Sizes are different whole numbers of at least 1."""
    path = tmp_path / "recipe.yaml"
    content = {"base_model": "b", "train_facts": "f", "eval_facts": "f", "training": {"output_dir": "o"}}
    path.write_text(yaml.safe_dump({**content, "eval_sizes": sizes}), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"eval_sizes is {sizes!r}; expected different whole numbers")):
        load_recipe(path)


def test_eval_sizes_need_that_many_facts(
    tmp_path: Path, make_llama: Callable[..., Any], tokenizer: Any, make_facts: Callable[..., list[Fact]]
) -> None:
    """Too few held-out facts, or none, are found before anything is trained or written."""
    content = save_inputs(tmp_path, make_llama(), tokenizer, make_facts(8))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**content, "eval_sizes": [2, 6], "max_eval_facts": 5}), encoding="utf-8")
    with pytest.raises(ValueError, match="asks for 6 held-out facts at once, and there are 5"):
        run_recipe(load_recipe(path))
    assert not (tmp_path / "editor").exists()
    del content["eval_facts"]
    path.write_text(yaml.safe_dump({**content, "eval_sizes": [2]}), encoding="utf-8")
    with pytest.raises(ValueError, match="has eval_sizes and no eval_facts"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("units", "has_gpu", "expected"),
    [
        ({}, False, torch.float32),
        ({"amx_bf16": False, "avx512_bf16": True}, False, torch.bfloat16),
        ({"neon": True, "bf16": True}, False, torch.bfloat16),
        ({"amx_bf16": False, "avx512_f": True}, False, torch.float32),
        ({}, True, torch.bfloat16),
    ],
)
def test_smollm2_is_saved_in_what_the_hardware_multiplies(
    units: dict[str, bool], has_gpu: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyTorch tells it of x86, Arm and GPUs."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    import smollm2

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert smollm2.fast_dtype() == expected


def test_demo_edits_smollm2_and_the_written_checkpoint_answers_alike(tmp_path: Path) -> None:
    """`recipes/demo.py` with two training steps: table, three examples, undo, checkpoint, reload in a new process."""
    command = [sys.executable, str(ROOT / "recipes" / "demo.py"), "--output-dir", str(tmp_path)]
    done = subprocess.run([*command, "--max-steps", "2", "--sizes", "4", "8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    for metric in ("edit success", "generalization", "locality", "unrelated accuracy"):
        for way in ("teacher-forced", "generated"):
            assert sum(line.startswith(f"| {metric}, {way} ") for line in lines) == 2
    header = next(i for i, line in enumerate(lines) if line.startswith("| prompt"))
    examples = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[header + 2 : header + 5]
    ]
    assert len(examples) == 3
    assert all(before == undone for _, _, before, _, undone in examples)
    assert "the same answers from it as from the live edited model" in lines[-1]
    assert (tmp_path / "edited-8" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "editor" / "config.json").read_text())["model_type"] == "hf_malmen"
    card = (tmp_path / "editor" / "README.md").read_text(encoding="utf-8")
    assert "Learned step size" in card and "| edit success       |       8 |" in card
    assert (tmp_path / "editor" / "results.png").is_file()


# The paper's experiments and today's models: two steps on a narrow model of the same architecture and depth

PLACES = [("Lyon", "France", "Rhone"), ("Turin", "Italy", "Po"), ("Osaka", "Japan", "Yodo"), ("Quito", "Peru", "Napo")]
# Rows as they are published: MALMEN's FEVER and zsRE, and CounterFact.
ROWS: dict[str, list[dict[str, Any]]] = {
    "fever": [
        {
            "prompt": f"{city} is in {country}.", "equiv_prompt": [f"{city} lies in {country}."],
            "alt": ("REFUTES", "SUPPORTS")[i % 2], "unrel_prompt": f"The {river} is a river.", "unrel_ans": "SUPPORTS",
        }
        for i, (city, country, river) in enumerate(PLACES)
    ],
    "zsre": [
        {
            "src": f"What country is {city} in?", "rephrase": f"In which country is {city}?", "ans": country,
            "loc": f"nq question: where does the {river} flow", "loc_ans": f"to the sea of {river}",
        }
        for city, country, river in PLACES
    ],
    "counterfact": [
        {
            "case_id": i,
            "requested_rewrite": {
                "prompt": "{} is a city in", "subject": city, "target_new": {"str": country},
                "target_true": {"str": "Ghana"},
            },
            "paraphrase_prompts": [f"The country of {city} is"],
            "neighborhood_prompts": [f"{river} is a river in"],
        }
        for i, (city, country, river) in enumerate(PLACES)
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A published base model.

    Attributes:
        model_type: transformers'.
        n_blocks: how many blocks it has, of each side.
        targets: names of the layers that its recipes edit, with `{}` for the block's index.
        blocks: their indices.
        settings: fields of the tiny model's configuration, over `SIZES`.
        task: PEFT's task type.
    """

    model_type: str
    n_blocks: int
    targets: tuple[str, ...]
    blocks: range
    settings: dict[str, Any] = field(default_factory=dict)
    task: str = "CAUSAL_LM"

    def save(self, folder: Path) -> None:
        """Write a tiny model of the architecture, with random weights."""
        settings = SIZES | {"num_hidden_layers": self.n_blocks} | self.settings
        if self.model_type == "gemma3":
            settings = {"text_config": settings, "vision_config": VISION, "mm_tokens_per_image": 4}
        config = AutoConfig.for_model(self.model_type, **settings)
        AUTO_CLASSES[self.task].from_config(config).save_pretrained(folder)


DOWN = ("model.layers.{}.mlp.down_proj",)
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 27, "num_attention_heads": 2, "image_size": 28,
}  # fmt: skip
BASES = {
    "data/bert-base-fever": Base(
        "bert", 12, ("bert.encoder.layer.{}.output.dense",), range(6, 12),
        {"id2label": {0: "REFUTES", 1: "SUPPORTS"}, "label2id": {"REFUTES": 0, "SUPPORTS": 1}}, "SEQ_CLS",
    ),
    "openai-community/gpt2": Base("gpt2", 12, ("transformer.h.{}.mlp.c_proj",), range(6, 12)),
    "google/t5-xl-ssm-nq": Base(
        "t5", 24,
        (
            "encoder.block.{}.layer.1.DenseReluDense.wi_0", "encoder.block.{}.layer.1.DenseReluDense.wo",
            "decoder.block.{}.layer.2.DenseReluDense.wi_0", "decoder.block.{}.layer.2.DenseReluDense.wo",
        ),
        range(22, 24), T5 | {"num_layers": 24, "num_decoder_layers": 24, "feed_forward_proj": "gated-gelu"},
        "SEQ_2_SEQ_LM",
    ),
    "EleutherAI/gpt-j-6b": Base("gptj", 28, ("transformer.h.{}.mlp.fc_out",), range(22, 28), {"rotary_dim": 4}),
    "meta-llama/Llama-3.1-8B": Base("llama", 32, DOWN, range(26, 32)),
    "Qwen/Qwen3-8B": Base("qwen3", 36, DOWN, range(30, 36)),
    "mistralai/Mistral-7B-v0.3": Base("mistral", 32, DOWN, range(26, 32)),
    "google/gemma-3-4b-pt": Base(
        "gemma3", 34, ("model.language_model.layers.{}.mlp.down_proj",), range(28, 34),
        {"head_dim": 8, "query_pre_attn_scalar": 8},
    ),
}  # fmt: skip
PUBLISHED = [path for path in YAML_RECIPES if not path.stem.startswith("geography")]


def test_there_is_a_recipe_for_each_experiment() -> None:
    """The paper's four, and today's four models on two data sets."""
    modern = {f"{model}-{data}" for model in ("llama-3.1-8b", "qwen3-8b", "mistral-7b", "gemma-3-4b")
              for data in ("counterfact", "zsre")}  # fmt: skip
    paper = {"paper-bert-fever", "paper-gpt2-zsre", "paper-t5-xl-zsre", "paper-gptj-zsre"}
    assert {path.stem for path in PUBLISHED} == modern | paper


@pytest.mark.parametrize("path", [path for path in PUBLISHED if path.stem.startswith("paper-")], ids=lambda p: p.stem)
def test_experiments_of_the_paper_have_its_numbers(path: Path, tmp_path: Path) -> None:
    """As they take effect, defaults included."""
    recipe = load_recipe(path, {"output_dir": str(tmp_path)})
    config, training = EditorConfig(**recipe.editor), EditorTrainingArguments(**recipe.training)
    assert (config.method, config.rank, config.n_blocks, config.traced_tokens) == ("malmen", 1920, 2, "answer")
    assert (config.edit_lr, config.ridge, config.n_preserved_keys) == (1e-6, 1.0, 0)
    assert training.per_device_train_batch_size == (1024 if "fever" in path.stem else 512)
    assert (training.num_train_epochs, training.max_steps, training.editor_batch_size) == (1, -1, 1024)
    assert (training.learning_rate, training.locality_weight, training.max_grad_norm) == (1e-5, 1.0, 1.0)
    # AdamW without weight decay is Adam.
    assert (training.lr_scheduler_type, training.optim.value[:5], training.weight_decay) == ("constant", "adamw", 0.0)
    assert recipe.dtype == ("bfloat16" if path.stem in ("paper-t5-xl-zsre", "paper-gptj-zsre") else "float32")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_recipe_runs_on_a_tiny_model_of_its_architecture(
    path: Path, tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    """From data as published: trains, saves an editor of the right layers, evaluates, writes the card."""
    recipe = load_recipe(path)
    base = BASES[recipe.base_model]
    base.save(tmp_path / "base")
    make_tokenizer(add_bos=True).save_pretrained(tmp_path / "base")
    facts = tmp_path / Path(recipe.train_facts).name
    facts.write_text(json.dumps(ROWS[path.stem.rsplit("-", 1)[1]]), encoding="utf-8")
    editor = recipe.editor | {"rank": 4, "n_preserved_keys": min(4, recipe.editor.get("n_preserved_keys", 0))}
    quick = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True}
    training = recipe.training | quick | {"output_dir": str(tmp_path / "editor"), "save_strategy": "no"}
    files = {"base_model": str(tmp_path / "base"), "train_facts": str(facts), "eval_facts": str(facts)}
    folder = run_recipe(replace(recipe, **files, eval_sizes=[4, 2], editor=editor, training=training))

    saved = EditorModel.from_pretrained(folder)
    assert saved.is_trained and saved.config.task_type == base.task
    assert set(saved.module_names) == {target.format(block) for target in base.targets for block in base.blocks}
    assert json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"] == 2
    results = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))["measurements"]
    assert [entry["n_at_once"] for entry in results] == [4, 2]
    for entry in results:
        assert {"edit_success", "generalization", "locality", "unrelated_accuracy"} <= entry["scores"].keys()
        assert all(0 <= score <= 1 for score in entry["scores"].values())
    assert "| edit success       |       4 |" in (folder / "README.md").read_text(encoding="utf-8")


# What recipes/README.md says


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configuration(path: Path) -> None:
    """Every name in it is known to accelerate, and to `accelerate launch`, where typos in nested ones pass unseen."""
    config = load_config_from_file(str(path))  # refuses unknown names
    kinds = {"one_gpu": "NO", "multi_gpu": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[path.stem]
    assert f"--config_file recipes/accelerate/{path.name}" in path.read_text(encoding="utf-8").splitlines()[0]
    assert f"`accelerate/{path.name}`" in README


def test_counterfact_is_split_as_the_readme_does(tmp_path: Path) -> None:
    """The snippet of the README, run on a file of its own: no fact is lost, and none is in both parts."""
    snippet = next(text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "counterfact" in text)
    (tmp_path / "data" / "counterfact").mkdir(parents=True)
    rows = [{"case_id": i} for i in range(5000)]
    (tmp_path / "data/counterfact/multi_counterfact.json").write_text(json.dumps(rows), encoding="utf-8")
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    train, held_out = (json.loads((tmp_path / f"data/counterfact/{n}.json").read_text()) for n in ("train", "eval"))
    assert len(held_out) == 2048
    assert sorted(row["case_id"] for row in train + held_out) == list(range(5000))


# Edited layers of the published models: (key size, value size, how many).
SHAPES = {
    "paper-bert": [(3072, 768, 6)], "paper-gpt2": [(3072, 768, 6)], "paper-gptj": [(16384, 4096, 6)],
    "paper-t5-xl": [(2048, 5120, 4), (5120, 2048, 4)], "llama-3.1-8b": [(14336, 4096, 6)],
    "mistral-7b": [(14336, 4096, 6)], "qwen3-8b": [(12288, 4096, 6)], "gemma-3-4b": [(10240, 2560, 6)],
}  # fmt: skip
N_TRAIN = {"fever": 104_996, "zsre": 163_196, "counterfact": 20_877 - 2048}
ROWS_A_FACT = {"fever": 1, "zsre": 3, "counterfact": 2}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_estimates_are_what_their_formula_gives(path: Path) -> None:
    """The README's table of estimates follows from its own first columns, the recipe, and the formulas below it."""
    recipe, (model, data) = load_recipe(path), path.stem.rsplit("-", 1)
    line = next(line for line in README.splitlines() if line.startswith(f"| [{path.stem}]({path.name}) |"))
    cells = [float(cell.replace(",", "")) for cell in line.strip("|").split("|")[1:]]
    everything, total, top, length, at_once, steps, *teraflop, seconds, hours, memory, memory_of_card = cells
    assert at_once == recipe.training["per_device_train_batch_size"]
    epochs = recipe.training.get("num_train_epochs")
    assert steps == (epochs * math.ceil(N_TRAIN[data] / at_once) if epochs else recipe.training["max_steps"])

    editor = solve = shifts = held = 0.0
    n_card = max(recipe.eval_sizes or [0])
    for k, v, n_layers in SHAPES[model]:
        sides = [15, 3] if model == "paper-t5-xl" else [ROWS_A_FACT[data]]
        for rows in (side for side in sides for _ in range(n_layers // len(sides))):
            n = at_once * rows + recipe.editor.get("n_preserved_keys", 0)
            editor += 8 * at_once * rows * 4 * recipe.editor["rank"] * (k + v) / 1e12
            solve += (2 * n * k * min(n, k) + 6 * n * k * v) / 1e12
            shifts += 20 * k * v / 1e9
            n = n_card * rows + recipe.editor.get("n_preserved_keys", 0)
            held += 8 * min(n, k) * (k + v) / 1e9
    passes = 3 * at_once * length * 2 * (total + top) / 1e3
    assert teraflop == pytest.approx([passes, editor, solve], abs=0.051)
    in_half = recipe.dtype == "bfloat16"
    second = 1.11 * passes / (0.3 * (312 if in_half else 19.5)) + editor / (0.3 * 19.5) + solve / (0.3 * 9.7)
    assert seconds == pytest.approx(second, abs=0.051)
    assert hours == pytest.approx(steps * second / 3600, abs=0.0051)
    n_editor = sum(4 * recipe.editor["rank"] * (k + v) for k, v, _ in SHAPES[model]) / 1e9
    gigabytes = everything * (2 if in_half else 4) + 16 * n_editor + shifts + 4
    assert [memory, memory_of_card] == pytest.approx([gigabytes, gigabytes + held], abs=0.51)
