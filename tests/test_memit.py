"""MEMIT: targets and shifts against one fact at a time and a dense solve in float64, with weights really written."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_malmen import (
    EditorConfig,
    EditorModel,
    EditStateError,
    Fact,
    FactError,
    FactStream,
    ModelMismatchError,
    NumericalError,
)
from hf_malmen.batches import IGNORED, Tokenizer, TokenSequence
from hf_malmen.memit import _variants, find_moves, tokenize_facts
from hf_malmen.sequential import standing_of
from hf_malmen.shifts import Shift, materialise
from hf_malmen.targets import find_targets
from hf_malmen.tracing import frozen
from hf_malmen.writing import find_answered, keys_beside, read_lookups, room_of, write_targets

from .zoo import KINDS

CITIES = ("Lyon", "Turin", "Osaka", "Quito", "Perth", "Accra")
TEXTS = [
    "Lyon is a city in France. The country of Turin is Italy.",
    "Osaka, Quito and Perth are cities",
    "",
    "is",
    "The country of Cairo is Ghana and that of Delhi is Ecuador. " * 3,
]
LAYERS = [1, 2]
MALMIT = {"method": "malmit", "rank": 8}
BLOCKS = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}"}
MODULES = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}
# A random model hardly looks back at a subject. Here the subject's last token is what the answer follows.
AT_SUBJECT = [
    Fact(f"The country of {city}", country, subject=city)
    for city, country in zip(CITIES, ["Italy", "Ghana", "Japan", "France", "Italy", "Japan"], strict=False)
]
FAR = {"n_steps": 30, "clamp_factor": 5.0}
CONTEXTS = ["It is a city. ", "So"]
INFIXES = [", a city,", " (as Turin)", " and"]


def build(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, covariance: bool = True, **config: Any
) -> EditorModel:
    """An editor for two blocks in the middle."""
    texts = {"n_word_dropouts": 0, "texts_per_step": 0}  # the prompt, in all steps, where nothing else is asked for
    # The keys of tiny models have so few features that every fact would be crowded.
    settings = {"layers_to_transform": LAYERS, "n_steps": 4, "n_passes": 1, "preservation": 3.0, "crowding": 0}
    settings |= {"method": "memit"} | texts | config
    torch.manual_seed(0)
    editor = EditorModel.from_base(model, EditorConfig(**settings)).to(model.dtype)
    with torch.no_grad():  # as if trained, where there is a network
        for parameter in editor.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if covariance:
        editor.collect_covariance(model, TEXTS, tokenizer)
    return editor


def offsets_end(tokenizer: PreTrainedTokenizerFast, text: str, part: str) -> int:
    """Index of the token with the last character of `part`, which occurs in `text` once."""
    end = text.index(part) + len(part)
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return next(i for i, (start, stop) in enumerate(spans) if start < end <= stop)


def inputs_and_outputs(
    model: PreTrainedModel, ids: list[int], module: str, block: str, move: Tensor | None = None, at: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """One unpadded text, by plain hooks: the module's inputs, the block's output and the logits.

    Optionally with a move of the block's output at one token.
    """
    seen: dict[str, Tensor] = {}

    def moved(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if move is not None:
            added = torch.zeros_like(hidden)
            added[0, at] = 1
            hidden = hidden + added * move
        seen["block"] = hidden[0]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [
        model.get_submodule(module).register_forward_hook(lambda _, args, __: seen.update(module=args[0][0])),
        model.get_submodule(block).register_forward_hook(moved),
    ]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return seen["module"], seen["block"], logits


def reference_move(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    fact: Fact,
    block: str,
    config: EditorConfig,
) -> tuple[Tensor, Tensor]:
    """δ of one fact and h, one unpadded text a pass, with the updates of Adam written out."""
    module = f"{block}.{MODULES['gpt2' if 'transformer' in block else 'llama']}"
    texts = [f"{context} {fact.prompt}".strip() for context in ("", *(config.context_prefixes or ()))]
    before_end, behind = fact.prompt.split(str(fact.subject))
    infixes = config.context_infixes or []
    texts += [f"{before_end}{fact.subject}{infix}{behind}" for infix in infixes]
    texts += [
        f"{before_end}{fact.subject}{variant}"
        for variant in _variants(fact.prompt, behind, infixes, config.n_word_dropouts)[len(infixes) :]
    ]  # which words these have is tested by itself
    asked = []
    for text in texts:
        prompt = tokenizer(text)["input_ids"]
        whole = tokenizer(f"{text} {fact.target}")["input_ids"]
        assert whole[: len(prompt)] == prompt
        asked.append((whole, len(prompt), offsets_end(tokenizer, text, str(fact.subject))))
    essence = f"{fact.subject} is a"
    kl_ids = tokenizer(essence)["input_ids"]
    kl_at = max(1, offsets_end(tokenizer, essence, str(fact.subject)))  # behind a subject that is the first token alone
    with torch.no_grad():
        state = inputs_and_outputs(model, asked[0][0][:-1], module, block)[1][asked[0][2]]
        before = inputs_and_outputs(model, kl_ids, module, block)[2][-1].log_softmax(-1)
    unit = state.square().mean().sqrt()
    found = torch.zeros_like(state)
    first, second = torch.zeros_like(state), torch.zeros_like(state)
    for step in range(1, config.n_steps + 1):
        scaled = found.clone().requires_grad_()
        loss = config.target_decay * (scaled * unit).norm() ** 2 / state.norm() ** 2
        n_chosen = config.texts_per_step or len(asked)
        for ids, start, at in [asked[((step - 1) * n_chosen + i) % len(asked)] for i in range(n_chosen)]:
            logits = inputs_and_outputs(model, ids[:-1], module, block, scaled * unit, at)[2]
            loss = loss - logits[start - 1 :].log_softmax(-1)[range(len(ids) - start), ids[start:]].sum() / n_chosen
        after = inputs_and_outputs(model, kl_ids, module, block, scaled * unit, kl_at)[2][-1].log_softmax(-1)
        loss = loss + config.kl_weight * (after.exp() * (after - before)).sum()
        gradient = torch.autograd.grad(loss, scaled)[0]
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        found = found - config.edit_lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        length = (found * unit).norm() / (config.clamp_factor * state.norm())
        found = found / length.clamp(min=1)
    return found * unit, state


def moves_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, editor: EditorModel, facts: list[Fact],
             batch_size: int = 32) -> Tensor:  # fmt: skip
    """What `find_moves` finds."""
    tokenize = editor.tokenizer_for(model, tokenizer)
    requests = tokenize_facts(facts, tokenize, editor.config)
    block = editor.module_names[-1].rsplit(".", 2)[0]
    with frozen(model):
        plain = [request.asked[0] for request in requests]
        _, states = read_lookups(model, tokenize, plain, editor.module_names, block, batch_size)
        return find_moves(model, tokenize, requests, states, block, editor.config, batch_size)


@pytest.fixture(params=["llama", "gpt2"])
def case(
    request: pytest.FixtureRequest,
    make_llama: Callable[..., PreTrainedModel],
    make_gpt2: Callable[..., PreTrainedModel],
) -> tuple[str, PreTrainedModel]:
    """A float64 model of each weight layout."""
    return request.param, {"llama": make_llama, "gpt2": make_gpt2}[request.param](torch.float64)


# Targets


@pytest.mark.parametrize("contexts", [None, CONTEXTS])
@pytest.mark.parametrize(
    "infixes",
    [
        {},
        {"context_infixes": INFIXES},
        {"context_infixes": INFIXES, "texts_per_step": 2},
        {"context_infixes": INFIXES, "n_word_dropouts": 3, "texts_per_step": 2},
    ],
)
@pytest.mark.parametrize(("clamp_factor", "kl_weight"), [(0.75, 0.5), (0.1, 0.5), (0.75, 0.0)])
def test_moves_equal_those_of_single_facts(
    case: tuple[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    make_long_facts: Callable[..., list[Fact]],
    contexts: list[str] | None,
    infixes: dict[str, Any],
    clamp_factor: float,
    kl_weight: float,
) -> None:
    """Adam over a padded batch, above a trunk that ran once, finds what each fact finds by itself."""
    kind, model = case
    facts = make_long_facts(3)
    settings = {"context_prefixes": contexts, "clamp_factor": clamp_factor, "kl_weight": kl_weight, "target_decay": 2.0}
    editor = build(model, tokenizer, covariance=False, **settings, **infixes)
    found = moves_of(model, tokenizer, editor, facts)
    lengths = []
    for fact, move in zip(facts, found, strict=True):
        expected, state = reference_move(model, tokenizer, fact, BLOCKS[kind].format(2), editor.config)
        assert float((move - expected).norm()) <= 1e-6 * float(expected.norm())
        lengths.append(float(move.norm() / state.norm()))
    assert max(lengths) <= clamp_factor * (1 + 1e-12)
    assert clamp_factor > 0.5 or max(lengths) == pytest.approx(clamp_factor)  # it is at work


@pytest.mark.parametrize(
    ("prompt", "infix", "expected"),
    [
        ("The city Lyon, that is in", ", a city,", "The city Lyon, a city, that is in"),
        ("The country of Lyon is", " (a city)", "The country of Lyon (a city) is"),
        ("Where is Lyon", " and so", "Where is Lyon and so"),
        ("lyon, or LYON, is in", ",", "lyon, or LYON, is in"),
    ],
)
def test_infixes_stand_behind_the_subject(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, infix: str, expected: str
) -> None:
    """Behind its last occurrence, whose token is found in the new text, and no mark stands twice."""
    editor = build(model, tokenizer, covariance=False, context_infixes=[infix])
    tokenize = editor.tokenizer_for(model, tokenizer)
    request = tokenize_facts([Fact(prompt, "Italy", subject="LYON")], tokenize, editor.config)[0]
    assert [lookup.sequence for lookup in request.varied] == [tokenize(expected, "Italy")]
    assert [lookup.position for lookup in request.varied] == [request.asked[0].position]


def test_word_dropouts_leave_out_words_behind_the_subject(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """All but the last one, in order, drawn from the prompt alone; every second text has an infix too."""
    editor = build(model, tokenizer, covariance=False, context_infixes=[", a city,", " (a town)"], n_word_dropouts=40)
    tokenize = editor.tokenizer_for(model, tokenizer)
    words = ["that", "is", "in", "the", "country", "of"]
    facts = [
        Fact(f"The city Lyon, {' '.join(words)} ", "Italy", subject="Lyon"),  # ends with a word, not with a space
        Fact("Where is Lyon", "Italy", subject="Lyon"),
    ]
    request, short = tokenize_facts(facts, tokenize, editor.config)
    assert len(request.varied) == 2 + 40
    assert request == tokenize_facts([*facts[1:], facts[0]], tokenize, editor.config)[1]
    assert {lookup.position for lookup in request.varied} == {request.asked[0].position}
    subsets = {
        " ".join([word for i, word in enumerate(words[:-1]) if mask >> i & 1] + words[-1:]) for mask in range(2**5)
    }
    n_words = []
    for i, lookup in enumerate(request.varied[2:]):
        infix = ("", ", a city,", "", " (a town),")[i % 4]
        tails = {tokenize(f"The city Lyon{infix or ','} {subset}", "Italy"): len(subset.split()) for subset in subsets}
        n_words.append(tails[lookup.sequence])
    assert min(n_words) < 3 < max(n_words)
    assert 0.3 < sum(len(words) - n for n in n_words) / (5 * len(n_words)) < 0.5  # of those that may be left out
    assert {lookup.sequence for lookup in short.varied[2::2]} == {short.asked[0].sequence}


@pytest.mark.parametrize("end", ["\n", ":\n\n", " \t"])
def test_a_prompt_keeps_what_it_begins_and_ends_with(tokenizer: PreTrainedTokenizerFast, end: str) -> None:
    """Or the target would begin with another token than where the fact is asked for."""
    tokenize = Tokenizer(tokenizer, EditorConfig(method="memit", context_infixes=[", a city,"], n_word_dropouts=8))
    prompt = f"\nName the country that the city of Lyon is in{end}"
    (request,) = tokenize_facts([Fact(prompt, "Italy", subject="Lyon")], tokenize, tokenize.config)
    plain = tokenize(prompt, "Italy")
    assert request.asked[0].sequence == plain
    assert {lookup.sequence.target_ids for lookup in request.varied} == {plain.target_ids}
    for lookup in request.varied:
        assert tokenizer.decode(lookup.sequence.prompt_ids).endswith(f" in{end}")


@pytest.mark.parametrize(
    ("prompt", "read"),
    [("Lyon is located in the country of", "Lyon is"), ("Lyon, if you ask, is in", "Lyon,"), ("Lyon is", "Lyon is")],
)
def test_texts_of_a_fact_share_what_was_read_where_it_is_written(
    tokenizer: PreTrainedTokenizerFast, prompt: str, read: str
) -> None:
    """Also where the subject is the first token and the second one stands for it, which no other text may replace."""
    texts = {"context_prefixes": CONTEXTS, "context_infixes": INFIXES, "n_word_dropouts": 8}
    config = EditorConfig(method="memit", kl_weight=0.1, **texts)
    tokenize = Tokenizer(tokenizer, config)
    facts = [Fact(prompt, "Italy", subject="Lyon"), AT_SUBJECT[0]]
    request, other = tokenize_facts(facts, tokenize, config)
    assert [len(request.asked), len(request.varied)] == [len(other.asked), len(other.varied)]
    assert request.essence is not None
    for lookup in (request.asked[0], *request.varied, request.essence):
        assert tokenizer.decode(lookup.until_subject.input_ids) == read
    for prefix, lookup in zip(CONTEXTS, request.asked[1:], strict=True):
        assert tokenizer.decode(lookup.until_subject.input_ids) == f"{prefix} {read}"
    essence = tokenizer.decode(request.essence.sequence.input_ids)
    assert essence == (f"{read} is a" if read.endswith(",") else f"{read} a")
    assert len({lookup.sequence for lookup in request.varied}) > 1 or prompt == read


def test_moves_lower_the_loss(case: tuple[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> None:
    """With its move in force, each fact's target is far more likely."""
    kind, model = case
    block = BLOCKS[kind].format(2)
    module = f"{block}.{MODULES[kind]}"
    moves = moves_of(model, tokenizer, build(model, tokenizer, covariance=False, **FAR), AT_SUBJECT)
    for fact, move in zip(AT_SUBJECT, moves, strict=True):
        prompt = tokenizer(fact.prompt)["input_ids"]
        ids = tokenizer(f"{fact.prompt} {fact.target}")["input_ids"]
        at = offsets_end(tokenizer, fact.prompt, str(fact.subject))
        losses = []
        for steered in (None, move):
            with torch.no_grad():
                logits = inputs_and_outputs(model, ids[:-1], module, block, steered, at)[2][len(prompt) - 1 :]
            losses.append(float(F.cross_entropy(logits, torch.tensor(ids[len(prompt) :]), reduction="sum")))
        assert losses[1] < 0.5 * losses[0]


# Shifts


def reference_shifts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    editor: EditorModel,
    moves: Tensor,
    kind: str,
    written: dict[str, Tensor] | None = None,
    covariance_of: PreTrainedModel | None = None,
) -> dict[str, Tensor]:
    """On a copy whose weights are written, with a dense solve of the normal equations of all layers side by side."""
    unedited, model = covariance_of or model, deepcopy(model)
    block, contexts = BLOCKS[kind].format(LAYERS[-1]), ("", *(editor.config.context_prefixes or ()))

    @torch.no_grad()
    def look(fact: Fact, name: str) -> tuple[Tensor, Tensor]:
        keys, hidden = [], []
        for context in contexts:
            text = f"{context} {fact.prompt}".strip()
            at = offsets_end(tokenizer, text, str(fact.subject))
            inputs, outputs, _ = inputs_and_outputs(model, tokenizer(text)["input_ids"], name, block)
            keys.append(inputs[at])
            hidden.append(outputs[at])
        return torch.stack(keys).mean(0), hidden[0]

    names = [f"{BLOCKS[kind].format(layer)}.{MODULES[kind]}" for layer in LAYERS]
    second_moments = {}
    for name in names:
        rows = []
        for text in TEXTS:
            if ids := tokenizer(text)["input_ids"]:
                with torch.no_grad():
                    rows.append(inputs_and_outputs(unedited, ids, name, block)[0])
        stacked = torch.cat(rows)
        second_moments[name] = stacked.T @ stacked / len(stacked)
    penalties = []
    for name in names:
        penalty = editor.config.preservation * second_moments[name]
        penalty += editor.config.ridge * torch.eye(len(penalty), dtype=penalty.dtype)
        for row in (written or {}).get(name, []):
            penalty += torch.outer(row, row)
        penalties.append(penalty)
    penalty, n = torch.block_diag(*penalties), len(penalties[0])
    goals = torch.stack([look(fact, names[0])[1] + move for fact, move in zip(facts, moves, strict=True)])
    joint = torch.zeros(len(penalty), goals.shape[1], dtype=goals.dtype)  # the shifts, one below the other
    for _ in range(editor.config.n_solves):
        looked = [[look(fact, name) for name in names] for fact in facts]
        keys = torch.stack([torch.cat([key for key, _ in of_fact]) for of_fact in looked])
        left = goals - torch.stack([of_fact[0][1] for of_fact in looked])
        wanted = keys @ joint + editor.config.relaxation * left
        step = torch.linalg.solve(keys.T @ keys + editor.config.relaxation * penalty, keys.T @ wanted) - joint
        joint += step
        for name, change in zip(names, step.split(n), strict=True):
            model.get_submodule(name).weight.data += change if kind == "gpt2" else change.T
    return dict(zip(names, joint.split(n), strict=True))


@pytest.mark.parametrize("steps", [{}, {"n_solves": 1, "relaxation": 1.0}])
@pytest.mark.parametrize("contexts", [None, CONTEXTS])
def test_shifts_equal_a_dense_solve_on_written_weights(
    case: tuple[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    facts: list[Fact],
    contexts: list[str] | None,
    steps: dict[str, Any],
) -> None:
    """Given the targets, the layers' S are the textbook solution, for keys of the model as edited so far."""
    kind, model = case
    # An infix has no part in the keys.
    editor = build(model, tokenizer, context_prefixes=contexts, context_infixes=INFIXES[:1], **steps)
    moves = moves_of(model, tokenizer, editor, facts)
    expected = reference_shifts(model, tokenizer, facts, editor, moves, kind)
    shifts = editor.make_edit(model, facts, tokenizer).shifts
    assert list(shifts) == list(expected)
    for name, shift in expected.items():
        assert float((shifts[name] - shift).norm()) <= 2e-6 * float(shift.norm())  # kept in float32


def test_second_pass_is_an_edit_of_the_edited_model(
    case: tuple[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Two passes: in a model whose weights hold the first one's shifts, new targets for what it does not answer, and
    all else left where it is; written on top of them."""
    kind, model = case
    # The editor is put to an edited model; targets of this length are enough for some of the facts.
    settings = {"fingerprint_policy": "ignore", "clamp_factor": 0.4, "n_steps": 8}
    once, twice = (build(model, tokenizer, n_passes=n, **settings) for n in (1, 2))
    gentle = build(model, tokenizer, **settings | {"clamp_factor": 0.2, "edit_lr": 0.25})
    first = once.make_edit(model, AT_SUBJECT, tokenizer).shifts
    edited = deepcopy(model)
    for name, shift in first.items():
        edited.get_submodule(name).weight.data += shift if kind == "gpt2" else shift.T
    answers = [edited(**tokenizer(fact.prompt, return_tensors="pt")).logits[0, -1].argmax() for fact in AT_SUBJECT]
    missed = torch.tensor(
        [
            int(answer) != tokenizer(f" {fact.target}")["input_ids"][0]
            for answer, fact in zip(answers, AT_SUBJECT, strict=True)
        ]
    )
    assert 0 < int(missed.sum()) < len(AT_SUBJECT)
    moves = moves_of(edited, tokenizer, gentle, AT_SUBJECT) * missed[:, None]
    second = reference_shifts(edited, tokenizer, AT_SUBJECT, once, moves, kind, covariance_of=model)
    found = twice.make_edit(model, AT_SUBJECT, tokenizer).shifts
    for name, shift in found.items():
        assert float((shift - first[name] - second[name]).norm()) <= 1e-5 * float(shift.norm())
        assert float(second[name].norm()) > 1e-3 * float(first[name].norm())  # there was something left to do


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answered_is_what_every_token_of_the_target_is_predicted(
    case: tuple[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    """Greedy continuations of two tokens are answered; with either of the two replaced they are not."""
    _, model = case
    sequences, expected = [], []
    for fact in AT_SUBJECT:
        prompt = tokenizer(fact.prompt)["input_ids"]
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=2, min_new_tokens=2, do_sample=False)[0].tolist()
        first, second = whole[len(prompt) :]
        for tokens, is_answered in (
            ((first, second), True),
            ((first, second + 1), False),
            ((first + 1, second), False),
            ((first,), True),
        ):
            labels = (*[IGNORED] * (len(prompt) - 1), *tokens)
            # What the model reads: with the first token replaced by another, still the first.
            sequences.append(TokenSequence((*prompt, first)[: len(labels)], labels))
            expected.append(is_answered)
    found = find_answered(model, Tokenizer(tokenizer, EditorConfig()), sequences, batch_size)
    assert found.tolist() == expected


def test_nothing_is_sought_again_where_all_facts_are_answered(
    case: tuple[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Any number of passes is the first one then."""
    _, model = case
    once, often = (build(model, tokenizer, n_passes=n, preservation=1e-3, **FAR) for n in (1, 3))
    assert once.evaluate(model, AT_SUBJECT, tokenizer)["edit_success"] == 1
    first = once.make_edit(model, AT_SUBJECT, tokenizer).shifts
    for name, shift in often.make_edit(model, AT_SUBJECT, tokenizer).shifts.items():
        assert torch.equal(shift, first[name])


def test_more_facts_than_key_features(
    case: tuple[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, make_facts: Callable[..., list[Fact]]
) -> None:
    """Where rows are folded as they come the solution is the same."""
    kind, model = case
    facts = make_facts(150)
    editor = build(model, tokenizer, n_steps=1)
    expected = reference_shifts(model, tokenizer, facts, editor, moves_of(model, tokenizer, editor, facts), kind)
    for name, shift in editor.make_edit(model, facts, tokenizer).shifts.items():
        assert float((shift - expected[name]).norm()) <= 2e-6 * float(expected[name].norm())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_and_order_do_not_matter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    make_long_facts: Callable[..., list[Fact]],
    batch_size: int,
) -> None:
    """S is a property of the facts, in float32 to 1e-5."""
    facts = make_long_facts(7)
    editor = build(model, tokenizer, context_prefixes=CONTEXTS[:1])
    expected = editor.make_edit(model, facts, tokenizer).shifts
    found = editor.make_edit(model, facts[::-1], tokenizer, batch_size=batch_size).shifts
    for name, shift in expected.items():
        assert float((found[name] - shift).norm()) <= 1e-5 * float(shift.norm())


def test_edits_take_in_every_precision(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Facts are answered after the edit, also where the model is in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        model = make_llama(dtype)
        editor = build(model, tokenizer, preservation=1e-3, **FAR)
        scores = editor.evaluate(model, AT_SUBJECT, tokenizer)
        assert scores["edit_success"] > 0.9 > 0.5 > scores["edit_success_before"]


@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "openai-gpt", "gptj", "falcon", "opt", "mpt", "phi3", "mixtral"])
def test_edits_take_in_every_kind_of_block(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Norms behind the layers, attention beside them, outputs in tuples and lists, a mixture of experts."""
    row = KINDS[kind]
    model = row.build()
    config = EditorConfig(method="memit", preservation=1e-3, crowding=0, **FAR, **row.config)
    editor = EditorModel.from_base(model, config)
    editor.collect_covariance(model, TEXTS, tokenizer)
    scores = editor.evaluate(model, AT_SUBJECT, tokenizer)
    assert scores["edit_success"] > 0.9 > 0.5 > scores["edit_success_before"]


# A model spread over two devices

# Two cards for a machine without any. No tensor can be on a device of this name, but one can say that it is, and
# autograd runs on its caller's thread then.
CARDS = torch.device("lazy:0"), torch.device("lazy:1")
_COPIES = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default


class OnCard(Tensor):
    """Values that say they are on a card."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor, card: torch.device) -> "OnCard":
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device=card, **layout)
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operation, args, kwargs or {})


def computed(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives, on the card that it would be on; an error where PyTorch has one, with tensors of two."""
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    # Beside a card's tensors one number may be on the CPU, and so may indices.
    is_index = operation.overloadpacket.__name__.strip("_").startswith("index")
    bound = [
        value
        for i, value in enumerate(given)
        if isinstance(value, OnCard) or not (value.dim() == 0 or (is_index and i and value.dtype == torch.long))
    ]
    card = next((value.device for value in bound or given), torch.device("cpu"))
    if operation not in _COPIES:
        assert all(value.device == card for value in bound), f"{operation} takes tensors of two devices"
    if kwargs.get("device") is not None:
        card = torch.device(kwargs["device"])
        kwargs = kwargs | {"device": "cpu"}
    known = {id(value.here): value for value in given if isinstance(value, OnCard)}  # that it may write into
    args, kwargs = tree_map_only(OnCard, lambda value: value.here, (args, kwargs))

    def wrapped(value: Tensor) -> Tensor:
        return value if card.type == "cpu" else known[id(value)] if id(value) in known else OnCard(value, card)

    return tree_map_only(Tensor, wrapped, operation(*args, **kwargs))


class Operations(TorchDispatchMode):
    """Also those that take no tensor of a card."""

    def __torch_dispatch__(self, operation: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(operation, args, kwargs or {})


class Lists(TorchFunctionMode):
    """What PyTorch makes of a list, or into one, without an operation."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor:
            return function(*args, **kwargs | {"device": "cpu"}).to(kwargs.get("device", "cpu"))
        if function is Tensor.tolist:
            args = (args[0].cpu(),)
        elif function in (Tensor.__getitem__, Tensor.__setitem__):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(torch.tensor(place) if isinstance(place, list) else place for place in places)
            args = (args[0], places, *args[2:])
        return function(*args, **kwargs)


@contextmanager
def two_cards() -> Iterator[None]:
    """Within the context there are `CARDS`, and what mixes their tensors is an error."""
    with Lists(), Operations():
        yield


def test_cards_do_not_mix() -> None:
    """As two GPUs do not, not even for one number or an index; what is copied first is computed, with its gradient."""
    with two_cards():
        first, second = (torch.arange(3.0).to(card).requires_grad_() for card in CARDS)
        assert (first.device, second.device) == CARDS
        for mixed in (
            lambda: first + second,
            lambda: second + torch.ones(3),
            lambda: first.sum() + second.sum(),
            lambda: torch.cat((first, second)),
            lambda: second[torch.tensor([0]).to(CARDS[0])],
            lambda: torch.ones(3)[torch.tensor([0]).to(CARDS[0])],
        ):
            with pytest.raises(AssertionError, match="takes tensors of two devices"):
                mixed()
        product = first[torch.tensor([0, 2])] * second[[0, 2]].to(first) + torch.tensor(1.0)
        product.sum().cpu().backward()
        assert product.device == CARDS[0]
        assert product.tolist() == [1, 5]
        assert second.grad is not None
        assert second.grad.device == CARDS[1]
        assert second.grad.tolist() == [0, 0, 2]


@pytest.mark.parametrize("n_first", [1, 2, 3])  # the second and the third block are edited
def test_blocks_on_two_cards(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, n_first: int
) -> None:
    """The shifts are the same where the model goes on from one card to another, between the edited blocks too."""
    model = make_llama(torch.float64)
    spread = deepcopy(model)
    editor = build(model, tokenizer, n_passes=2, n_solves=2, n_steps=2)
    written = {name: torch.ones(1, 48) for name in editor.module_names}

    def write(model: PreTrainedModel) -> tuple[dict[str, Shift], dict[str, Tensor]]:
        with frozen(model):
            return write_targets(
                model,
                editor.tokenizer_for(model, tokenizer),
                AT_SUBJECT[:2],
                editor.module_names,
                editor.config,
                penalty=editor.key_penalty,
                ridge=editor.ridge,
                batch_size=2,
                written=written,
            )

    expected, expected_keys = write(model)
    # The head where the inputs are, as where it shares its weights with the embeddings.
    parts = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"], CARDS[0])
    blocks = {f"model.layers.{i}": CARDS[i >= n_first] for i in range(4)}
    with two_cards():
        dispatch_model(spread, parts | blocks, main_device=CARDS[0], force_hooks=True)
        devices = [spread.get_submodule(name).weight.device for name in editor.module_names]
        assert devices == [CARDS[i >= n_first] for i in LAYERS]
        shifts, keys = write(spread)
        keys = {name: rows.cpu() for name, rows in keys.items()}
    for name, shift in expected.items():
        torch.testing.assert_close(materialise(shifts[name], True), materialise(shift, True), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(keys[name], expected_keys[name])


# Keys of facts written before


def test_keys_written_before_are_left_where_they_are(
    case: tuple[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The second edit's S is the textbook solution with the first one's keys, as they are in the edited model, added to
    the penalty, and moves them less than one that does not follow them."""
    kind, model = case
    unedited = deepcopy(model)
    editor = build(model, tokenizer, fingerprint_policy="ignore", **FAR)
    frozen_editor = build(model, tokenizer, statistics="frozen", **FAR)
    first = editor.apply(model, AT_SUBJECT[:3], tokenizer)
    block = BLOCKS[kind].format(LAYERS[-1])
    written = {}
    for name in editor.module_names:
        with torch.no_grad():
            looked = [
                inputs_and_outputs(model, tokenizer(fact.prompt)["input_ids"], name, block)[0][-1]
                for fact in AT_SUBJECT[:3]
            ]
        written[name] = torch.stack(looked)
        torch.testing.assert_close(first.state.written[name], written[name], rtol=1e-6, atol=1e-8)
    moves = moves_of(model, tokenizer, editor, AT_SUBJECT[3:])
    expected = reference_shifts(model, tokenizer, AT_SUBJECT[3:], editor, moves, kind, written, unedited)
    found = editor.make_edit(model, AT_SUBJECT[3:], tokenizer).shifts
    forgetful = frozen_editor.make_edit(model, AT_SUBJECT[3:], tokenizer)
    assert not forgetful.state
    for name, shift in expected.items():
        assert float((found[name] - shift).norm()) <= 1e-5 * float(shift.norm())
        assert (written[name] @ shift).norm() < 0.7 * (written[name] @ forgetful.shifts[name].double()).norm()


@pytest.mark.parametrize(
    ("n_facts", "crowding", "expected"),
    [(1, 0.25, 1.0), (64, 0.25, 1.0), (256, 0.25, 0.25**0.25), (1024, 0.25, 0.5), (1024, 0.5, 0.25), (1024, 0, 1.0)],
)
def test_many_facts_have_less_room(n_facts: int, crowding: float, expected: float) -> None:
    """From 120 features a fact on: five layers of 1,536 have room for 64."""
    assert room_of(n_facts, 5 * 1536, crowding) == pytest.approx(expected)


def test_the_more_facts_the_shorter_their_moves(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Those of the edits before count too."""
    model = make_llama(torch.float64)
    n_features = sum(key_size for key_size, _ in build(model, tokenizer).config.module_shapes.values())
    short = {"clamp_factor": 0.3, "n_steps": 8, "fingerprint_policy": "ignore"}
    crowded = build(model, tokenizer, crowding=0.5, **short)
    lengths = {end: 0.3 * (n_features / (120 * end)) ** 0.5 for end in (2, 6)}
    others = {end: build(model, tokenizer, **short | {"clamp_factor": length}) for end, length in lengths.items()}
    for begin, end in ((0, 2), (2, 6)):
        facts = AT_SUBJECT[begin:end]
        expected = others[end].make_edit(model, facts, tokenizer)
        edit = crowded.make_edit(model, facts, tokenizer)
        for name, shift in expected.shifts.items():
            assert float((edit.shifts[name] - shift).norm()) <= 1e-6 * float(shift.norm())
        edit.apply_to(model, on_fingerprint_mismatch="ignore")


def test_facts_that_were_replaced_do_not_count(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Neither those that an edit replaces, in its own moves, nor those that edits before it have replaced."""
    model = make_llama(torch.float64)
    short = {"clamp_factor": 0.3, "n_steps": 8, "fingerprint_policy": "ignore"}
    crowded = build(model, tokenizer, crowding=0.5, **short)
    n_features = sum(key_size for key_size, _ in crowded.config.module_shapes.values())
    crowded.apply(model, AT_SUBJECT[:2], tokenizer)
    again = [replace(AT_SUBJECT[0], target="Japan")]
    length = 0.3 * (n_features / (120 * 2)) ** 0.5  # of two facts: the new one, and the other that stays
    expected = build(model, tokenizer, **short | {"clamp_factor": length}).make_edit(model, again, tokenizer).shifts
    edit = crowded.apply(model, again, tokenizer)
    for name, shift in expected.items():
        assert float((edit.shifts[name] - shift).norm()) <= 1e-6 * float(shift.norm())
    assert {len(keys) for keys in standing_of(model, crowded).written.values()} == {2}
    edit.undo()
    assert {len(keys) for keys in standing_of(model, crowded).written.values()} == {2}


def test_keys_near_a_new_one_give_way() -> None:
    """In proportion to the new one's length."""
    rows = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3], [0, 1, 1]])
    new = torch.tensor([[0.0, 2.5, 0], [0, 0, -3]])  # 0.5 away from the second row, which is less than 0.3 of 2.5
    assert torch.equal(keys_beside(rows, new), rows[[0, 2, 3]])
    assert torch.equal(keys_beside(rows, torch.tensor([[50.0, -50, 0]])), rows)
    assert keys_beside(rows[:0], new).shape == (0, 3)


def test_fact_given_another_target_takes_the_place_of_its_key(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """It is written as if its key had never been."""
    model = make_llama(torch.float64)
    editor, frozen_editor = build(model, tokenizer, **FAR), build(model, tokenizer, statistics="frozen", **FAR)
    editor.apply(model, AT_SUBJECT[:1], tokenizer)
    again = [replace(AT_SUBJECT[0], target="Japan")]
    expected = frozen_editor.make_edit(model, again, tokenizer).shifts
    found = editor.make_edit(model, again, tokenizer)
    for name, shift in expected.items():
        assert float((found.shifts[name] - shift).norm()) <= 1e-5 * float(shift.norm())


def test_keys_of_an_editor_of_other_layers_count_where_both_write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A layer that only the first of them edits has no part in the second one's edit."""
    build(model, tokenizer).apply(model, AT_SUBJECT[:3], tokenizer)
    other = build(model, tokenizer, layers_to_transform=[2, 3], fingerprint_policy="ignore")
    edit = other.apply(model, AT_SUBJECT[3:], tokenizer)
    counts = [len(keys) for keys in standing_of(model, other).written.values()]
    assert edit.state.written.keys() == set(other.module_names)
    assert counts == [3, 6, 3]


@pytest.mark.parametrize("settings", [{}, MALMIT])
def test_written_keys_go_on_after_a_restart(
    tmp_path: Path,
    make_llama: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    settings: dict[str, Any],
) -> None:
    """Two turns, a restart from disk and one more turn equal three turns."""
    model = make_llama()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    editor = build(model, tokenizer, **settings)
    whole = editor.apply(model, AT_SUBJECT, tokenizer, facts_per_turn=2)
    wanted = {name: model.get_submodule(name).weight.detach().clone() for name in editor.module_names}
    whole.undo()
    editor.save_pretrained(tmp_path / "editor")
    editor.apply(str(tmp_path / "base"), AT_SUBJECT[:4], output_dir=tmp_path / "edited", facts_per_turn=2)
    again = EditorModel.from_pretrained(tmp_path / "editor")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    last = again.apply(reloaded, AT_SUBJECT[4:], tokenizer)
    for name, weight in wanted.items():
        scale = float((weight - load_file(tmp_path / "base" / "model.safetensors")[f"{name}.weight"]).norm())
        assert float((reloaded.get_submodule(name).weight.detach() - weight).norm()) <= 1e-4 * scale
        assert len(last.state.written[name]) == 2  # its own, for undo to take back with it
        written = standing_of(reloaded, again).written[name]
        torch.testing.assert_close(written, whole.state.written[name], rtol=1e-4, atol=1e-6)
    last.undo()
    assert {len(keys) for keys in standing_of(reloaded, again).written.values()} == {4}


# What users do with it


@pytest.mark.parametrize("settings", [{}, MALMIT])
def test_edit_is_applied_undone_written_and_exported(
    tmp_path: Path,
    make_llama: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    settings: dict[str, Any],
    facts: list[Fact],
) -> None:
    """As the edits of any other method."""
    model = make_llama()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    editor = build(model, tokenizer, **settings)
    edit = editor.apply(model, facts, tokenizer)
    edited = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {name for name in weights if not torch.equal(weights[name], edited[name])} == {
        f"{name}.weight" for name in editor.module_names
    }
    edit.undo()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    edit.write(tmp_path / "base", tmp_path / "edited")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").state_dict()
    assert all(torch.equal(tensor, edited[name]) for name, tensor in loaded.items())
    adapter = load_file(edit.to_lora(tmp_path / "lora") / "adapter_model.safetensors")
    name = editor.module_names[0]
    down, up = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    scale = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    alpha, rank = scale["lora_alpha"], scale["r"]
    assert down.shape[0] == rank == 8  # one row a fact, so the adapter is exact
    torch.testing.assert_close((up @ down).T * alpha / rank, edit.shifts[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, MALMIT])
def test_turns_and_streams(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], facts: list[Fact]
) -> None:
    """Each turn sees the model as edited so far; a stream gives what a list gives."""
    editor = build(model, tokenizer, **settings)
    merged = editor.apply(model, facts, tokenizer, facts_per_turn=5)
    merged.undo()
    first = editor.apply(model, facts[:5], tokenizer)
    second = editor.make_edit(model, facts[5:], tokenizer)
    first.undo()
    streamed = editor.make_edit(model, FactStream(facts[:5]), tokenizer)
    for name, shift in merged.shifts.items():
        torch.testing.assert_close(shift, first.shifts[name] + second.shifts[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(streamed.shifts[name], first.shifts[name])


def hooks_of(model: nn.Module) -> list[Any]:
    """Everything an edit could leave behind on a model, but for its weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (name, module.training, sorted(vars(module)), [len(getattr(module, hook)) for hook in hooks])
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()]


def test_model_is_as_found(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: list[Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, flags, modes and hooks, after an edit, after covariances, and after an error in the middle of either."""
    model.train()
    list(model.parameters())[2].requires_grad_(False)
    before, weights = hooks_of(model), deepcopy(model.state_dict())
    editor = build(model, tokenizer)
    editor.make_edit(model, facts, tokenizer)
    assert hooks_of(model) == before

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for broken in ("hf_malmen.memit.cross_entropy", "hf_malmen.writing.materialise"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, fail)
            with pytest.raises(KeyboardInterrupt):
                editor.make_edit(model, facts, tokenizer)
        assert hooks_of(model) == before
    with monkeypatch.context() as patch:
        patch.setattr(type(model.get_submodule(editor.module_names[0])), "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            editor.collect_covariance(model, TEXTS, tokenizer)
    assert hooks_of(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


# Errors, all of them before anything is computed


def test_facts_need_a_subject_in_their_prompt(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """The error names the fact, and says what to do."""
    model = make_llama()
    editor = build(model, tokenizer)
    with pytest.raises(FactError, match=r"needs the field 'subject' in every fact, and fact 3 \('The country of Qu"):
        editor.make_edit(model, [*facts[:3], replace(facts[3], subject=None)], tokenizer)
    with pytest.raises(FactError, match=r"'Marseille' does not occur in the prompt 'The country of Lyon is'. Give the"):
        editor.make_edit(model, [replace(facts[0], subject="Marseille")], tokenizer)


def test_covariance_has_to_be_collected_first(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """The error says which call is missing; other methods have no use for it."""
    model = make_llama()
    editor = build(model, tokenizer, covariance=False)
    assert not editor.is_trained
    with pytest.raises(EditStateError, match=r"Call editor\.collect_covariance\(model, texts\) first"):
        editor.make_edit(model, facts, tokenizer)
    with pytest.raises(
        ModelMismatchError, match=r"'malmen' keeps no covariance of keys\. Those that do: malmit, memit, ft"
    ):
        EditorModel.from_base(model, EditorConfig(method="malmen")).collect_covariance(model, TEXTS, tokenizer)
    with pytest.raises(ValueError, match="n_tokens is 0"):
        editor.collect_covariance(model, TEXTS, tokenizer, n_tokens=0)
    with pytest.raises(ValueError, match="There are no texts"):
        editor.collect_covariance(model, ["", " "], tokenizer)


def test_only_causal_models_and_layers_that_write_hidden_states(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """Others are refused, with what is possible instead."""
    for kind in ("bert", "t5"):
        with pytest.raises(ModelMismatchError, match=r"Method 'memit' edits CAUSAL_LM, and .* Choose another method"):
            EditorModel.from_base(KINDS[kind].build(), EditorConfig(method="memit"))
    with pytest.raises(ValueError, match="task_type is 'SEQ_CLS'; allowed with method 'memit': 'CAUSAL_LM'"):
        EditorConfig(method="memit", task_type="SEQ_CLS")
    model = make_llama()
    editor = build(model, tokenizer, target_modules=["mlp.up_proj"])
    with pytest.raises(ModelMismatchError, match=r"up_proj puts out 48 features, and the hidden state has 32\."):
        editor.make_edit(model, facts, tokenizer)
    editor = build(model, tokenizer, target_modules=["lm_head"], layers_to_transform=None, covariance=False)
    with pytest.raises(ModelMismatchError, match="lm_head of LlamaForCausalLM lie in no list of blocks"):
        editor.collect_covariance(model, TEXTS, tokenizer)


def test_states_that_are_not_finite_name_the_module(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """A model that overflows is an error, and no edit."""
    model = make_llama()
    editor = build(model, tokenizer)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(float("inf"))
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.down_proj: its values are not finite"):
        editor.make_edit(model, facts, tokenizer)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_targets_that_are_not_finite_name_the_fact(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    """The first one of its batch, where the model overflows behind the subject; the others can be written."""
    model = make_llama()
    editor = build(model, tokenizer)
    # A token that nothing but the targets of two facts has, which are not the last to be looked at.
    (poison,) = set(tokenizer(" Ecuador and")["input_ids"]) - set(tokenizer(" and")["input_ids"])
    model.get_input_embeddings().weight.data[poison] = float("inf")
    editor.make_edit(model, AT_SUBJECT, tokenizer, batch_size=batch_size)
    bad = [replace(AT_SUBJECT[i], target=f"Ecuador and{' Ghana' * n}") for i, n in ((1, 1), (3, 3))]
    facts = [AT_SUBJECT[0], bad[0], AT_SUBJECT[2], bad[1], *AT_SUBJECT[4:]]
    named = (
        r"'The country of Quito' came"  # its text is longer, so that it comes in a batch before the other's
        if batch_size == 1
        else r"'The country of Turin' \(and 1 more of its batch\) came"
    )
    with pytest.raises(NumericalError, match=rf"the model answer {named} to values that are not finite\. .* lower "):
        editor.make_edit(model, facts, tokenizer, batch_size=batch_size)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_steps": 0}, "n_steps is 0; allowed: a whole number of at least 1"),
        ({"n_solves": 0}, "n_solves is 0; allowed: a whole number of at least 1"),
        ({"relaxation": 0}, "relaxation is 0; allowed: a finite number above 0"),
        ({"edit_lr": 0}, "edit_lr is 0; allowed: a finite number above 0"),
        ({"clamp_factor": -1.0}, "clamp_factor is -1.0; allowed: a finite number above 0"),
        ({"crowding": -0.5}, "crowding is -0.5; allowed: a finite number of at least 0"),
        ({"kl_weight": "a"}, "kl_weight is 'a'; allowed: a finite number of at least 0"),
        ({"target_decay": float("nan")}, "target_decay is nan; allowed: a finite number of at least 0"),
        ({"context_prefixes": [""]}, "context_prefixes is \\[''\\]; allowed: None, or"),
        (
            {"context_infixes": "a"},
            "context_infixes is 'a'; allowed: None, or with method 'malmit', 'memit' a list of texts",
        ),
        ({"n_word_dropouts": -1}, "n_word_dropouts is -1; allowed: a whole number of at least 0"),
        ({"texts_per_step": 0.5}, "texts_per_step is 0.5; allowed: a whole number of at least 0"),
        ({"method": "ft", "texts_per_step": 1}, "texts_per_step is 1; allowed: nothing, with method 'ft'"),
        ({"facts_per_step": 3}, "facts_per_step is 3; allowed: nothing, with method 'memit'"),
        ({"n_preserved_keys": 3}, "n_preserved_keys is 3; allowed with method 'memit': 0"),
        ({"method": "malmen", "n_steps": 3}, "n_steps is 3; allowed: nothing, with method 'malmen'"),
        ({"method": "malmen", "context_prefixes": ["a"]}, "context_prefixes is \\['a'\\]; allowed: None"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    """Each by name, with what is allowed."""
    with pytest.raises(ValueError, match=message):
        EditorConfig(**({"method": "memit"} | settings))
    assert EditorConfig(method="memit", kl_weight=0, target_decay=0).kl_weight == 0


@pytest.mark.parametrize(("n_layers", "blocks"), [(2, [0, 1]), (7, [0, 1, 2, 3, 4]), (28, [4, 5, 6, 7, 8])])
def test_default_layers_are_early(make_llama: Callable[..., PreTrainedModel], n_layers: int, blocks: list[int]) -> None:
    """Five blocks around a fifth of the depth, as many as there are; what is named goes first."""
    model = make_llama(n_layers=n_layers)
    config = EditorConfig(method="memit")
    assert find_targets(model, config) == [f"model.layers.{block}.mlp.down_proj" for block in blocks]
    config = EditorConfig(method="memit", layers_to_transform=[1])
    assert find_targets(model, config) == ["model.layers.1.mlp.down_proj"]


# The covariance


def plain_second_moment(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str, n_tokens: int) -> Tensor:
    """KᵀK / n over the first tokens of `TEXTS`, one unpadded text a pass."""
    rows: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, __: rows.append(args[0][0].double()))
    for text in TEXTS:
        if (ids := tokenizer(text)["input_ids"]) and sum(map(len, rows)) < n_tokens:
            with torch.no_grad():
                model(input_ids=torch.tensor([ids[: n_tokens - sum(map(len, rows))]]))
    handle.remove()
    keys = torch.cat(rows)
    assert len(keys) == n_tokens
    return keys.T @ keys / n_tokens


@pytest.mark.parametrize(("batch_size", "n_tokens"), [(1, 40), (2, 61), (16, 1000)])
def test_covariance_is_exact_in_any_batches(
    case: tuple[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast, batch_size: int, n_tokens: int
) -> None:
    """Every token counts once, padding and what comes after `n_tokens` not at all."""
    _, model = case
    editor = build(model, tokenizer, covariance=False)
    read = editor.collect_covariance(model, TEXTS, tokenizer, n_tokens=n_tokens, batch_size=batch_size)
    assert read == min(n_tokens, sum(len(tokenizer(text)["input_ids"]) for text in TEXTS))
    for name in editor.module_names:
        expected = editor.config.preservation * plain_second_moment(model, tokenizer, name, read)
        found = editor.key_penalty(name)
        assert found is not None
        assert found.dtype == torch.float64
        assert float((found - expected).norm()) <= 1e-12 * float(expected.norm())
        assert editor.preservation(name) == editor.config.preservation


def test_covariance_goes_on_and_is_saved_with_the_editor(
    tmp_path: Path, make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    """Texts in two calls count as in one; the editor that is loaded makes the same edit, and none of it was rounded."""
    model = make_llama()
    one, two = (build(model, tokenizer, covariance=False) for _ in range(2))
    one.collect_covariance(model, TEXTS, tokenizer)
    two.collect_covariance(model, datasets.Dataset.from_dict({"text": TEXTS[:2]}), tokenizer)
    (tmp_path / "rest.txt").write_text(TEXTS[4], encoding="utf-8")
    two.collect_covariance(model, ["is"], tokenizer)
    two.collect_covariance(model, tmp_path / "rest.txt", tokenizer)
    two.save_pretrained(tmp_path / "editor")
    loaded = EditorModel.from_pretrained(tmp_path / "editor")
    assert loaded.is_trained
    edit = loaded.make_edit(model, facts, tokenizer)
    for name, shift in one.make_edit(model, facts, tokenizer).shifts.items():
        penalties = [editor.key_penalty(name) for editor in (one, two, loaded)]
        assert float((penalties[0] - penalties[1]).norm()) <= 1e-6 * float(penalties[0].norm())  # passes in float32
        assert torch.equal(penalties[1], penalties[2])
        assert torch.equal(deepcopy(two).to(torch.bfloat16).key_penalty(name), penalties[1])  # type: ignore[arg-type]
        torch.testing.assert_close(edit.shifts[name], shift, rtol=1e-4, atol=1e-6)
    assert edit.editor["method"] == "memit"


def test_texts_longer_than_the_model_reads_are_read_in_windows(
    make_llama: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """No token is lost; a window starts anew."""
    model = make_llama(torch.float64)
    text = "The country of Cairo is Ghana. " * 20
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 2 * 64
    editor = build(model, tokenizer, covariance=False)
    assert editor.collect_covariance(model, [text], tokenizer) == len(ids)
    name, rows = editor.module_names[1], []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, __: rows.append(args[0][0]))
    for start in range(0, len(ids), 64):
        with torch.no_grad():
            model(input_ids=torch.tensor([ids[start : start + 64]]))
    handle.remove()
    keys = torch.cat(rows)
    torch.testing.assert_close(editor.key_penalty(name), 3.0 * keys.T @ keys / len(keys), rtol=1e-10, atol=1e-12)


# Where a subject ends


def test_first_token_is_not_edited(tokenizer: PreTrainedTokenizerFast) -> None:
    """It is a sink of attention in many models, alike for every text; the one behind it stands for the subject."""
    tokenize = Tokenizer(tokenizer, EditorConfig())
    assert len(tokenizer("Lyon")["input_ids"]) == 1
    assert tokenize.subject_position("Lyon is a city in", "France", "Lyon") == 1
    assert tokenize.subject_position("The country of Lyon is", "France", "Lyon") == 4


def test_prompt_of_one_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """Behind its first token there is nothing but the target."""
    config = EditorConfig(method="memit")
    with pytest.raises(FactError, match=r"The prompt 'Lyon' is one token, .* Give a longer prompt"):
        tokenize_facts([Fact("Lyon", "Italy and Ghana", subject="Lyon")], Tokenizer(tokenizer, config), config)
