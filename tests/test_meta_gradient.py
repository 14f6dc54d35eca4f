"""The decoupled meta-gradient, against autograd end to end through a dense rewriting of the whole step.

The rewriting shares no code with the package: it tokenises with the tokenizer itself, runs one unpadded sequence at a
time, writes the shifts into the weights, and lets autograd differentiate standardisation, hyper-network, solve and
language model in one graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import EditorModel, EditorTrainer, Fact
from hf_malmen.least_squares import DualSolution

from .zoo import KINDS, Given, Kind

LOCALITY_WEIGHT = 0.7
# Every fact has two rephrases, so that two a fact are all of them, and nothing is drawn by chance.
N_REPHRASES = 2
CAUSAL = KINDS["llama"]  # of any causal language model


@dataclass
class DenseStep:
    """What one training step must come to.

    Attributes:
        loss: the meta loss.
        gradients: that of each parameter of the editor; None where the loss does not depend on it.
        n_rows: traced tokens.
        shifts: the weight shift of each module.
    """

    loss: float
    gradients: dict[str, Tensor | None]
    n_rows: int
    shifts: dict[str, Tensor]


def dense_step(
    editor: EditorModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: Sequence[Fact],
    locality_weight: float = LOCALITY_WEIGHT,
    kind: Kind = CAUSAL,
    *,
    past: Sequence[Sequence[Fact]] = (),
    decay: float = 1.0,
    penalty: float = 0.0,
) -> DenseStep:
    """The meta loss of editing `facts` and its gradients, by autograd alone.

    `past` are sets that `model` was edited with before, newest first, and look for what is left of them: the one that
    was edited k steps ago counts `decay` to the power of k.
    """
    names = list(editor.config.target_modules or ())
    parameters = {name: value.detach().clone().requires_grad_() for name, value in editor.named_parameters()}
    buffers = {name: value.detach().clone() for name, value in editor.named_buffers()}
    selection = editor.config.token_selection or {"mend": "all"}.get(editor.config.method, "answer")
    traced = [kind.rows(model, tokenizer, names, fact, selection) for fact in facts]
    keys = {name: torch.cat([rows[name][0] for rows in traced]) for name in names}
    gradients = {name: torch.cat([rows[name][1] for rows in traced]) for name in names}

    shifts: dict[str, Tensor] = {}
    by_shape: dict[tuple[int, int], list[str]] = {}
    for name in names:
        by_shape.setdefault((keys[name].shape[1], gradients[name].shape[1]), []).append(name)
    for (key_size, value_size), members in by_shape.items():
        prefix = f"networks.{key_size}x{value_size}"
        # Statistics first take in the step's own rows, those of all layers of the shape.
        rows = torch.cat([torch.cat((keys[name], gradients[name]), dim=1) for name in members])
        old, old_mean = buffers[f"{prefix}.statistics.count"], buffers[f"{prefix}.statistics.mean"]
        squares = buffers[f"{prefix}.statistics.squared_deviation"] + old * old_mean**2 + (rows**2).sum(0)
        count = old + len(rows)
        mean = (old * old_mean + rows.sum(0)) / count
        deviation = ((squares - count * mean**2) / (count - 1)).sqrt()
        for index, name in enumerate(members):
            z = (torch.cat((keys[name], gradients[name]), dim=1) - mean) / deviation
            for block in range(editor.config.n_blocks):
                part = {
                    key: parameters[f"{prefix}.blocks.{block}.{key}"]
                    for key in ("down", "up", "bias", "scale", "shift")
                }
                live = torch.relu(z @ part["down"] @ part["up"] + part["bias"])
                z = z + part["scale"][index] * live + part["shift"][index]
            pseudo_keys, pseudo_gradients = z[:, :key_size], z[:, key_size:]
            edit_lr = parameters[f"{prefix}.log_edit_lr"][index].exp()
            ridge = parameters[f"{prefix}.log_ridge"][index].exp()
            if editor.config.method == "mend":
                shifts[name] = -edit_lr * torch.einsum("nk,nv->kv", pseudo_keys, pseudo_gradients)
            else:
                u = keys[name]
                differences = -edit_lr * torch.einsum("nk,nk,nv->nv", u, pseudo_keys, pseudo_gradients)
                gram = u.T @ u + ridge * torch.eye(key_size).to(u)
                preserved = buffers[f"{prefix}.preserved_keys"][index]
                if len(preserved):
                    weight = parameters[f"{prefix}.log_preservation"][index].exp() / len(preserved)
                    gram = gram + weight * preserved.T @ preserved
                shifts[name] = torch.linalg.solve(gram, u.T @ differences)

    edited = {}
    for name, shift in shifts.items():
        module = model.get_submodule(name)
        edited[f"{name}.weight"] = module.weight.detach() + (shift.T if isinstance(module, nn.Linear) else shift)

    def after(given: Given) -> Tensor:
        return functional_call(model, edited, kwargs=given.inputs).logits

    loss = penalty * torch.stack([shift.square().sum() for shift in shifts.values()]).sum()
    for age, measured in enumerate((facts, *past)):
        likelihoods, divergences = [], []
        for fact in measured:
            for rephrase in fact.rephrases:
                given = kind.given(tokenizer, rephrase, fact.target)
                likelihoods.append(given.likelihoods(after(given)))
            given = kind.given(tokenizer, str(fact.unrelated_prompt), str(fact.unrelated_answer))
            with torch.no_grad():
                before = given.logs(model(**given.inputs).logits)
            divergences.append((before.exp() * (before - given.logs(after(given)))).sum(-1))
        # Each part is a mean over all of its answer tokens.
        own = -torch.cat(likelihoods).mean() + locality_weight * torch.cat(divergences).mean()
        loss = loss + decay**age * own
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    n_rows = sum(len(rows[names[0]][0]) for rows in traced)
    shifts = {name: shift.detach() for name, shift in shifts.items()}
    return DenseStep(loss.item(), dict(zip(parameters, found, strict=True)), n_rows, shifts)


def step(trainer: EditorTrainer, facts: Sequence[Fact], accumulation: int = 1) -> float:
    """One training step, as `Trainer` calls it; its loss."""
    trainer.current_gradient_accumulation_steps = accumulation
    return trainer.training_step(trainer.model, {"facts": list(facts)}).item()


def gradients_of(editor: EditorModel) -> dict[str, Tensor]:
    """A copy of the gradient of every parameter that has one."""
    return {name: value.grad.clone() for name, value in editor.named_parameters() if value.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The same parameters have a gradient, and each differs by `tolerance` of its norm at most.

    In float32 by `tolerance` of the norm of the whole gradient: the few numbers of η, λ and κ are differences of large
    terms, which that precision cannot give to six digits of their own.
    """
    assert found.keys() == expected.keys()
    whole = float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    for name, gradient in expected.items():
        norm = float(gradient.norm())
        assert norm > 0, name
        scale = norm if gradient.dtype == torch.float64 else whole
        assert float((found[name] - gradient).norm()) < tolerance * scale, name


def distance(gradient: dict[str, Tensor], other: dict[str, Tensor] | None = None) -> float:
    """The norm of the whole gradient, or of its difference from another."""
    parts = [value - other[name] if other else value for name, value in gradient.items()]
    return float(torch.stack([part.norm() for part in parts]).norm())


BLOCKS = [2, 3]
# Name: model, its arguments, configuration of the editor, number of facts, and how many tokens they must come to beside
# the smallest and largest key size.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, str]] = {
    "malmen, llama, few tokens": ("llama", {}, {"target_modules": ["down_proj", "o_proj"]}, 4, "fewer"),
    "malmen, llama, one token": ("llama", {}, {"target_modules": ["down_proj", "o_proj"]}, 1, "fewer"),
    "malmen, llama, both solvers": ("llama", {}, {"target_modules": ["down_proj", "o_proj"]}, 8, "between"),
    "malmen, llama, many tokens": ("llama", {}, {"target_modules": ["down_proj", "o_proj"]}, 14, "more"),
    "malmen, llama, up and down": ("llama", {}, {"target_modules": ["up_proj", "down_proj"]}, 5, "fewer"),
    "malmen, llama, all tokens": (
        "llama", {}, {"target_modules": ["up_proj", "down_proj"], "token_selection": "all"}, 6, "more"
    ),
    "malmen, llama, square": (
        "llama", {"intermediate_size": 32}, {"target_modules": ["down_proj", "up_proj", "o_proj"]}, 5, "fewer"
    ),
    "malmen, gpt2, few tokens": ("gpt2", {}, {"target_modules": ["c_proj"]}, 4, "fewer"),
    "malmen, gpt2, many tokens": ("gpt2", {}, {"target_modules": ["c_proj"], "token_selection": "all"}, 14, "more"),
    "malmen, gpt2, one block": ("gpt2", {}, {"target_modules": ["c_proj", "c_attn"], "n_blocks": 1}, 8, "between"),
    "malmen, llama, few keys preserved": (
        "llama", {}, {"target_modules": ["down_proj", "o_proj"], "n_preserved_keys": 9, "preservation": 5.0}, 3, "fewer"
    ),
    "malmen, gpt2, many keys preserved": (
        "gpt2", {}, {"target_modules": ["c_proj"], "n_preserved_keys": 200, "preservation": 20.0}, 8, "between"
    ),
    "mend, llama": ("llama", {}, {"method": "mend", "target_modules": ["down_proj", "o_proj"]}, 6, "more"),
    "mend, llama, answer tokens": (
        "llama", {}, {"method": "mend", "target_modules": ["up_proj"], "token_selection": "answer"}, 4, "fewer"
    ),
    "mend, gpt2": ("gpt2", {}, {"method": "mend", "target_modules": ["c_proj"]}, 4, "between"),
}  # fmt: skip


@pytest.fixture
def builders(
    make_llama: Callable[..., PreTrainedModel], make_gpt2: Callable[..., PreTrainedModel]
) -> dict[str, Callable[..., PreTrainedModel]]:
    """Tiny models by name."""
    return {"llama": make_llama, "gpt2": make_gpt2}


@pytest.mark.parametrize("case", CASES)
def test_gradient_equals_end_to_end_autograd(
    case: str,
    builders: dict[str, Callable[..., PreTrainedModel]],
    tokenizer: PreTrainedTokenizerFast,
    make_long_facts: Callable[..., list[Fact]],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """A step's loss, and its gradient of every parameter (η, λ and κ too), to eight digits."""
    architecture, shape, config, n_facts, regime = CASES[case]
    model, facts = builders[architecture](torch.float64, **shape), make_long_facts(n_facts)
    editor = make_editor(model, layers_to_transform=BLOCKS, **config)
    expected = dense_step(editor, model, tokenizer, facts)
    sizes = [key_size for key_size, _ in (editor.config.module_shapes or {}).values()]
    regimes = {"fewer": expected.n_rows <= min(sizes), "more": expected.n_rows > max(sizes)}
    assert regimes.get(regime, min(sizes) < expected.n_rows <= max(sizes)), (expected.n_rows, sizes)

    trainer = make_trainer(
        editor, model, facts, rephrases_per_fact=N_REPHRASES, locality_weight=LOCALITY_WEIGHT, lm_batch_size=3,
        editor_batch_size=11,
    )  # fmt: skip
    assert step(trainer, facts) == pytest.approx(expected.loss, rel=1e-6)  # Trainer keeps losses in float32
    wanted = {name: gradient for name, gradient in expected.gradients.items() if gradient is not None}
    assert_same(gradients_of(editor), wanted, 1e-8)
    for name in wanted:  # one number a layer: each to eight digits of its own
        if "log_" in name:
            torch.testing.assert_close(gradients_of(editor)[name], wanted[name], rtol=1e-8, atol=0)
    missing = {name for name, gradient in expected.gradients.items() if gradient is None}
    assert missing == {name for name in expected.gradients if "log_ridge" in name and config.get("method") == "mend"}


@pytest.mark.parametrize("preserved", [0, 9])
def test_passes_of_few_facts_read_the_factors_of_a_shift(
    preserved: int,
    make_llama: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    make_long_facts: Callable[..., list[Fact]],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its factors or as a whole, a shift has the same loss and the same gradient of every parameter."""
    seen: list[bool] = []
    factors = DualSolution.factors.fget
    losses, gradients = [], []
    for is_factored in (True, False):
        model, facts = make_llama(torch.float64), make_long_facts(2)
        editor = make_editor(model, layers_to_transform=BLOCKS, n_preserved_keys=preserved, preservation=5.0)
        trainer = make_trainer(editor, model, facts, locality_weight=LOCALITY_WEIGHT)

        def given(solution: DualSolution, is_factored: bool = is_factored) -> tuple[Tensor, Tensor] | None:
            found: tuple[Tensor, Tensor] | None = factors(solution)  # type: ignore[misc] # a property
            seen.append(found is not None)
            return found if is_factored else None

        monkeypatch.setattr(DualSolution, "factors", property(given))
        losses.append(step(trainer, facts))
        gradients.append(gradients_of(editor))
    assert seen
    assert all(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_same(*gradients, 1e-9)


@pytest.mark.parametrize("preserved", [0, 9])
@pytest.mark.parametrize("name", ["bert", "bert, one logit", "llama, classes", "t5", "bart", "gpt2, square", "falcon"])
def test_gradient_of_every_family_and_task(
    name: str,
    preserved: int,
    tokenizer: PreTrainedTokenizerFast,
    make_long_facts: Callable[..., list[Fact]],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """A step's loss and gradient, of the default targets: encoder, decoders, both with classes, encoder-decoders."""
    kind = KINDS[name]
    model, facts = kind.build(torch.float64), kind.facts(make_long_facts(5))
    editor = make_editor(model, n_preserved_keys=preserved, preservation=5.0)
    expected = dense_step(editor, model, tokenizer, facts, kind=kind)
    trainer = make_trainer(
        editor, model, facts, rephrases_per_fact=N_REPHRASES, locality_weight=LOCALITY_WEIGHT, lm_batch_size=3,
        editor_batch_size=7,
    )  # fmt: skip
    assert step(trainer, facts) == pytest.approx(expected.loss, rel=1e-6)
    wanted = {key: gradient for key, gradient in expected.gradients.items() if gradient is not None}
    assert wanted.keys() == dict(editor.named_parameters()).keys()
    # Attention of T5 and GPT-2 rounds to float32 on the way.
    assert_same(gradients_of(editor), wanted, 1e-8 if name.startswith(("bert", "llama")) else 1e-6)


@pytest.mark.parametrize("method", ["malmen", "mend"])
def test_second_step_and_no_locality(
    method: str,
    builders: dict[str, Callable[..., PreTrainedModel]],
    tokenizer: PreTrainedTokenizerFast,
    make_long_facts: Callable[..., list[Fact]],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Gradients of later steps add up, on statistics that have seen the earlier ones, from an editor with none."""
    model, facts = builders["llama"](torch.float64), make_long_facts(9)
    editor = make_editor(model, method=method, target_modules=["down_proj"], layers_to_transform=BLOCKS)
    for network in editor.networks.values():
        for buffer in network.get_submodule("statistics").buffers():
            buffer.zero_()
    trainer = make_trainer(editor, model, facts, rephrases_per_fact=N_REPHRASES, locality_weight=0.0)
    total: dict[str, Tensor] = {}
    for chosen in (facts[:5], facts[5:], facts[:5]):
        expected = dense_step(editor, model, tokenizer, chosen, locality_weight=0.0)
        step(trainer, chosen)
        for name, gradient in expected.gradients.items():
            if gradient is not None:
                total[name] = total.get(name, torch.zeros_like(gradient)) + gradient
        assert_same(gradients_of(editor), total, 1e-8)


def test_accumulation_divides_loss_and_gradient(
    builders: dict[str, Callable[..., PreTrainedModel]],
    tokenizer: PreTrainedTokenizerFast,
    make_long_facts: Callable[..., list[Fact]],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """One of four accumulated steps counts a quarter."""
    model, facts = builders["llama"](torch.float64), make_long_facts(4)
    editor = make_editor(model, target_modules=["down_proj", "o_proj"], layers_to_transform=BLOCKS)
    expected = dense_step(editor, model, tokenizer, facts)
    trainer = make_trainer(editor, model, facts, rephrases_per_fact=N_REPHRASES, locality_weight=LOCALITY_WEIGHT)
    assert step(trainer, facts, accumulation=4) == pytest.approx(expected.loss / 4, rel=1e-6)
    wanted = {name: gradient / 4 for name, gradient in expected.gradients.items() if gradient is not None}
    assert_same(gradients_of(editor), wanted, 1e-8)


@pytest.mark.parametrize(
    ("architecture", "target"), [("llama", ["down_proj", "o_proj"]), ("gpt2", ["c_proj"])], ids=["llama", "gpt2"]
)
@pytest.mark.parametrize("look_back", [1, 2, 3])
def test_sequence_of_sets(
    look_back: int,
    architecture: str,
    target: list[str],
    builders: dict[str, Callable[..., PreTrainedModel]],
    tokenizer: PreTrainedTokenizerFast,
    make_long_facts: Callable[..., list[Fact]],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """RLEdit: every turn starts from the model as edited so far, answers for the sets before it, and pays for ‖S‖².

    The dense step of a turn runs on a model whose weights hold the earlier shifts, which count as constants. The
    sequence ends with the optimizer step: the next one starts from the base model again.
    """
    model, facts = builders[architecture](torch.float64), make_long_facts(10)
    editor = make_editor(model, method="rledit", rank=8, n_blocks=2, target_modules=target, layers_to_transform=BLOCKS)
    trainer = make_trainer(
        editor, model, facts, rephrases_per_fact=N_REPHRASES, locality_weight=LOCALITY_WEIGHT, lm_batch_size=3,
        editor_batch_size=7, look_back=look_back, look_back_decay=0.6, shift_penalty=0.03,
    )  # fmt: skip
    assert trainer.args.is_sequential
    as_before = {name: value.clone() for name, value in model.state_dict().items()}
    for sets in ([facts[:3], facts[3:7], facts[7:]], [facts[2:6], facts[6:8]]):  # two optimizer steps
        edited = builders[architecture](torch.float64)
        editor.zero_grad()
        total: dict[str, Tensor] = {}
        for turn, chosen in enumerate(sets):
            past = sets[:turn][::-1][: look_back - 1]
            expected = dense_step(
                editor, edited, tokenizer, chosen, LOCALITY_WEIGHT, past=past, decay=0.6, penalty=0.03
            )
            loss = step(trainer, chosen, accumulation=len(sets))
            assert loss == pytest.approx(expected.loss / len(sets), rel=1e-6)
            for name, gradient in expected.gradients.items():
                assert gradient is not None
                total[name] = total.get(name, torch.zeros_like(gradient)) + gradient / len(sets)
            assert_same(gradients_of(editor), total, 1e-8 if architecture == "llama" else 1e-6)
            with torch.no_grad():
                for name, shift in expected.shifts.items():
                    module = edited.get_submodule(name)
                    module.weight += shift.T if isinstance(module, nn.Linear) else shift
    assert all(torch.equal(value, as_before[name]) for name, value in model.state_dict().items())


def test_rledit_with_a_window_of_one_is_malmen(
    builders: dict[str, Callable[..., PreTrainedModel]],
    make_long_facts: Callable[..., list[Fact]],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """One set a sequence and no penalty: the same gradient to the last bit, step after step."""
    model, facts = builders["llama"](), make_long_facts(9)
    results = []
    for method, settings in (
        ("malmen", {}),
        ("rledit", {"look_back": 1, "shift_penalty": 0.0, "locality_weight": 1.0}),
    ):
        editor = make_editor(
            model, method=method, rank=8, n_blocks=2, target_modules=["down_proj"], layers_to_transform=BLOCKS
        )
        trainer = make_trainer(editor, model, facts, rephrases_per_fact=N_REPHRASES, **settings)
        losses = [step(trainer, chosen) for chosen in (facts[:5], facts[5:])]
        results.append((losses, gradients_of(editor)))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_trunk_does_not_change_the_gradient(
    architecture: str,
    dtype: torch.dtype,
    tolerance: float,
    builders: dict[str, Callable[..., PreTrainedModel]],
    make_long_facts: Callable[..., list[Fact]],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Blocks below the first target run in full, replayed within a step, or replayed from an earlier one: all alike."""
    target = {"llama": ["down_proj", "o_proj"], "gpt2": ["c_proj"]}[architecture]
    model, facts = builders[architecture](dtype), make_long_facts(6)
    results = []
    for kind in ("in full", "step by step", "kept"):
        editor = make_editor(model, target_modules=target, layers_to_transform=BLOCKS)
        keep = {} if kind == "kept" else {"trunk_cache_gib": 0.0}
        trainer = make_trainer(editor, model, facts, rephrases_per_fact=N_REPHRASES, lm_batch_size=4, **keep)
        assert trainer.passes.trunk.is_usable
        assert len(trainer.passes.trunk.blocks) == BLOCKS[0]
        if kind == "in full":
            trainer.passes.trunk.blocks = []
        per_step = []
        for chosen in (facts[:4], facts[3:], facts[:4]):  # in other batches, so that rows are replayed from elsewhere
            editor.zero_grad()
            step(trainer, chosen)
            per_step.append(gradients_of(editor))
        results.append(per_step)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert_same(found, expected, tolerance)


@pytest.mark.parametrize(
    ("name", "n_blocks"), [("bert", 1), ("llama, classes", 1), ("modernbert", 1), ("t5", 0), ("bart", 0)]
)
def test_trunk_of_other_architectures(
    name: str,
    n_blocks: int,
    make_facts: Callable[..., list[Fact]],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Shared where there is one stack of blocks, which changes nothing; else all runs in full, and the log says so."""
    kind = KINDS[name]
    model, facts = kind.build(torch.float64), kind.facts(make_facts(4))
    results = []
    for blocks in (None, []):
        editor = make_editor(model)
        with caplog.at_level("INFO", logger="hf_malmen.trunk"):
            trainer = make_trainer(editor, model, facts, rephrases_per_fact=N_REPHRASES, lm_batch_size=3)
            assert len(trainer.passes.trunk.blocks) == n_blocks
        assert ("running all in full" in caplog.text) == (n_blocks == 0)
        if blocks is not None:
            trainer.passes.trunk.blocks = blocks
        step(trainer, facts)
        assert trainer.passes.trunk.is_usable == (n_blocks > 0 and blocks is None)
        results.append(gradients_of(editor))
    assert_same(results[0], results[1], 1e-7)


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "gptj", "gemma2", "opt, projected", "mpt", "qwen3_moe", "bert", "llama, classes", "t5", "bart"],
)
def test_what_is_kept_does_not_change_the_gradient(
    name: str,
    make_long_facts: Callable[..., list[Fact]],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The gradients of a first and of later epochs, from memory and from disk, are those of plain passes.

    Plain: no memory, no trunk, vocabulary projection and last block at every token, facts traced and unrelated prompts
    answered anew at every step. In float32 they agree to 1e-6 of the gradient, or, where plain passes are off by more
    than that themselves, by less than these are: how far that is, plain passes in float64 tell.
    """
    kind = KINDS[name]
    facts = kind.facts(make_long_facts(7))

    def gradients(way: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """Those of four steps, of which the third has the facts of the first."""
        model = kind.build()
        editor = make_editor(model, n_preserved_keys=5, **kind.config).to(dtype)
        model.to(dtype)
        arguments: dict[str, Any] = {"rephrases_per_fact": N_REPHRASES, "lm_batch_size": 4}
        if "disk" in way:
            arguments |= {"trunk_cache_dir": str(tmp_path / str(dtype)), "trunk_cache_gib": 0.0}
        trainer = make_trainer(editor, model, facts, **arguments)
        per_step = []
        with monkeypatch.context() as patch:
            if way == "plain":
                patch.setattr("hf_malmen.tracing._head", lambda _: None)
                patch.setattr(trainer.passes, "_shortened", [])
                trainer.passes.trunk.blocks = []
            for chosen in (facts[:4], facts[3:], facts[:4], facts[2:6]):
                if way == "plain":
                    trainer.passes.features.clear()
                editor.zero_grad()
                step(trainer, chosen)
                per_step.append({name: gradient.double() for name, gradient in gradients_of(editor).items()})
        trainer.passes.features.clear()
        return per_step

    exact, plain = gradients("plain", torch.float64), gradients("plain", torch.float32)
    for way in ("kept", "to disk", "from disk"):
        for found, expected in zip(gradients(way, torch.float64), exact, strict=True):
            assert_same(found, expected, 1e-6)  # not less: some models compute norms and attention in float32 even then
        for found, expected, true in zip(gradients(way, torch.float32), plain, exact, strict=True):
            assert found.keys() == expected.keys()
            assert distance(found, expected) <= max(1e-6 * distance(expected), distance(expected, true)), way


def test_later_epochs_run_the_base_model_for_the_shifted_passes_alone(
    make_llama: Callable[..., PreTrainedModel],
    make_long_facts: Callable[..., list[Fact]],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What each part is run on: the trunk on no token in a later epoch, the edited blocks on the prompts, and on one of
    them for what follows the vocabulary projection; that and the last feed-forward layers on answer tokens alone.
    """
    for module in ("trunk", "passes", "training"):
        monkeypatch.setattr(f"hf_malmen.{module}.pass_cost", lambda _: 10**6)  # so that every pass is one batch
    model, facts = make_llama(), make_long_facts(5)
    editor = make_editor(model, target_modules=["down_proj"], layers_to_transform=BLOCKS)
    trainer = make_trainer(editor, model, facts, rephrases_per_fact=N_REPHRASES)
    runs: dict[str, list[int]] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda _, args, __: runs.setdefault(name, []).append(args[0].shape[:-1].numel())

    for name in ("model.layers.0.mlp", "model.layers.2.mlp", "model.layers.3.mlp.down_proj", "lm_head"):
        model.get_submodule(name).register_forward_hook(count(name))
    step(trainer, facts)
    n_first = {name: len(tokens) for name, tokens in runs.items()}
    runs.clear()
    step(trainer, facts)
    assert "model.layers.0.mlp" not in runs
    # A trace, a pass over the prompts that others share, and two over six tokens that try whether it can be replayed.
    assert n_first["model.layers.0.mlp"] == 4
    assert len(runs["model.layers.2.mlp"]) == 3
    rephrases = [trainer.tokenize(text, fact.target) for fact in facts for text in fact.rephrases]
    unrelated = [trainer.tokenize(str(fact.unrelated_prompt), str(fact.unrelated_answer)) for fact in facts]
    n_answers = [sum(len(sequence.target_ids) for sequence in part) for part in (rephrases, unrelated)]
    assert sorted(runs["lm_head"]) == sorted([n_answers[0], n_answers[1], n_answers[1]])
    assert set(n_answers) <= set(runs["model.layers.3.mlp.down_proj"])
    assert sum(runs["model.layers.3.mlp.down_proj"]) < sum(runs["model.layers.2.mlp"]) / 3


@pytest.mark.parametrize("method", ["malmen", "mend"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_batch_sizes_do_not_change_the_gradient(
    method: str,
    dtype: torch.dtype,
    tolerance: float,
    builders: dict[str, Callable[..., PreTrainedModel]],
    make_long_facts: Callable[..., list[Fact]],
    make_editor: Callable[..., EditorModel],
    make_trainer: Callable[..., EditorTrainer],
) -> None:
    """Neither the sequences a pass of the language model nor the tokens a pass of the hyper-network matter."""
    model, facts = builders["llama"](dtype), make_long_facts(7)
    losses, gradients = [], []
    for sizes in ((64, 4096), (1, 1), (3, 5), (7, 64)):
        editor = make_editor(model, method=method, target_modules=["down_proj"], layers_to_transform=BLOCKS)
        trainer = make_trainer(
            editor, model, facts, rephrases_per_fact=N_REPHRASES, lm_batch_size=sizes[0], editor_batch_size=sizes[1]
        )
        losses.append(step(trainer, facts))
        gradients.append(gradients_of(editor))
    assert losses[1:] == pytest.approx([losses[0]] * 3, rel=1e-6)
    for found in gradients[1:]:
        assert_same(found, gradients[0], tolerance)
