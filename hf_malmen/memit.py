"""MEMIT (Meng et al., ICLR 2023, arXiv 2210.07229): targets by optimisation at the subject's last token, written into
several layers by least squares against the second moment of ordinary keys.

A fact is looked up where a causal model has just read its subject. There a move δ of the hidden state is sought, behind
the last edited block, that makes the model give the target (equation 16 of the paper). Then the edited layers
are solved for together, so that what they put out adds up to the way from the hidden state to h + δ.

This takes what a layer puts out for a part of the hidden state. Where a block normalises it first (Gemma, OLMo 2) the
next step makes up for the difference; blocks that normalise the sum (post-norm, as in OPT-350M) take edits less well.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .batches import IGNORED, Tokenizer, TokenSequence, find_subject
from .beginnings import Beginnings
from .configuration import EditorConfig
from .errors import ModelMismatchError, NumericalError
from .facts import Fact, require_fields
from .joint_least_squares import JointLeastSquares
from .least_squares import SOLVE_DTYPE, solve_device
from .losses import cross_entropy
from .shifts import Shift, add, materialise
from .targets import last_block, target_module
from .tracing import input_device, own_answer_logits, read_keys, run_until, shifted, steered, wide
from .trunk import started_behind

# What a model is asked about a subject beside the fact, and should go on answering alike: what kind of thing it is.
ESSENCE = "{} is a"
# How many of the words behind a subject a text of `n_word_dropouts` leaves out, on average.
_WORD_DROPOUT = 0.4
# Features of the keys, of all layers together, that a fact needs to itself for a move of full length. With fewer the
# layers tell subjects apart less well: what moves some moves others.
_ROOM = 120
# A key of an earlier edit within this distance of a new fact's, relative to the new one's length, is of the same
# subject in the same words: those of other subjects lie further off, in all but one of some hundred cases.
_SAME_KEY = 0.3


@dataclass(frozen=True)
class Lookup:
    """A text, and where in it a fact is looked up.

    Attributes:
        sequence: the text.
        position: of the subject's last token.
    """

    sequence: TokenSequence
    position: int

    @property
    def before_subject(self) -> tuple[int, ...]:
        """The tokens before the subject's last one, which nothing that happens there changes."""
        return self.sequence.input_ids[: self.position]

    @property
    def from_subject(self) -> TokenSequence:
        """The text from the subject's last token on."""
        return TokenSequence(self.sequence.input_ids[self.position :], self.sequence.labels[self.position :])

    @property
    def until_subject(self) -> TokenSequence:
        """The text up to the subject's last token, the one that is traced: what a causal model has read there."""
        ids = self.sequence.input_ids[: self.position + 1]
        return TokenSequence(ids, (*[IGNORED] * self.position, 0))


@dataclass(frozen=True)
class Request:
    """One fact, tokenised.

    Attributes:
        prompt: the fact's, as it was given, for error messages.
        asked: the prompt with its target, by itself and behind each of `context_prefixes`.
        varied: the prompt with its target, with each of `context_infixes` behind its subject, and `n_word_dropouts`
            times without some of the words there. What a causal model has read at the subject is the same, and how it
            is asked for is not. Where the subject shares its token with what follows, or that token is the first, for
            which the second stands, there are no infixes, and what was read by then stays.
        essence: "{subject} is a", which is asked for the token that follows.
    """

    prompt: str
    asked: list[Lookup]
    varied: list[Lookup]
    essence: Lookup


def tokenize_facts(facts: Sequence[Fact], tokenize: Tokenizer, config: EditorConfig) -> list[Request]:
    """Facts with their subjects found.

    Args:
        facts: in any order.
        tokenize: the base model's tokenizer.
        config: `context_prefixes`, `context_infixes` and `n_word_dropouts`.

    Raises:
        FactError: a fact without a subject, or whose prompt does not contain it.
    """
    require_fields(facts, ["subject"], "Method 'memit', which writes a fact where its subject has been read,")

    return [_request(fact, tokenize, config) for fact in facts]


def _request(fact: Fact, tokenize: Tokenizer, config: EditorConfig) -> Request:
    prompt, subject = fact.prompt, (fact.subject or "").strip()

    def lookup(text: str, end: int) -> Lookup:
        return Lookup(tokenize(text, fact.target), tokenize.subject_position(text, fact.target, subject, end))

    begin = find_subject(prompt, subject)
    end = behind = begin + len(subject)
    plain = lookup(prompt, end)
    # Behind the subject's token, which may hold more; or behind the one that stands for it, where it is the first.
    while end < len(prompt) and tokenize.subject_position(prompt, fact.target, subject, end + 1) == plain.position:
        end += 1
    asked = [plain, *(lookup(f"{prefix} {prompt}", len(prefix) + 1 + end) for prefix in config.context_prefixes or ())]
    infixes = config.context_infixes or []
    if end > behind:
        infixes = [""] * len(infixes)  # there is no place for one that leaves what was read as it is
    variants = _variants(prompt, prompt[end:], infixes, config.n_word_dropouts)
    varied = [lookup(prompt[:end] + other, end) for other in variants]
    read = prompt[begin:end]
    essence = lookup(ESSENCE.format(read.removesuffix(" is")), len(read))
    prompt_ids = essence.sequence.prompt_ids
    # Any label: what follows is compared as a distribution.
    only = TokenSequence(prompt_ids, (*[IGNORED] * (len(prompt_ids) - 1), 0))
    return Request(prompt, asked, varied, replace(essence, sequence=only))


def _variants(prompt: str, rest: str, infixes: Sequence[str], n_word_dropouts: int) -> list[str]:
    """What stands behind a subject in the other texts of its prompt, in place of `rest`.

    Words are drawn from the prompt alone, so that a fact's targets do not hang on the facts beside it.
    """
    variants = [infix + _after(infix, rest) for infix in infixes]
    draw = Random(prompt)
    words = rest.rstrip()
    for i in range(n_word_dropouts):
        # Before the first space is what the subject runs into ("'s", or nothing); the last word leads to the answer.
        first, *middle = words.split(" ")
        kept = [word for word in middle[:-1] if draw.random() >= _WORD_DROPOUT]
        shorter = " ".join([first, *kept, *middle[-1:]]) + rest[len(words) :]  # a line's end leads to it too
        infix = infixes[i // 2 % len(infixes)] if infixes and i % 2 else ""  # both at once carry over best
        variants.append(infix + _after(infix, shorter))
    return variants


def _after(infix: str, rest: str) -> str:
    """The rest of a prompt behind an infix: a mark that would stand twice in a row stands once."""
    return rest if not infix or infix[-1].isalnum() else rest.removeprefix(infix[-1])


@torch.enable_grad()
def find_moves(
    model: nn.Module,
    tokenize: Tokenizer,
    requests: Sequence[Request],
    states: Tensor,  # (n_facts, hidden_size)
    block: str,
    config: EditorConfig,
    batch_size: int,
    progress: Callable[[int], Any] = lambda _: None,
    share: float = 1.0,
    room: float = 1.0,
) -> Tensor:  # (n_facts, hidden_size)
    """The move δ of each fact's hidden state behind `block` (equation 16).

    By Adam, for all facts of a batch at once: δ minimises, over the texts j that ask for a fact,

        mean_j −log p(target | text_j, h + δ)
        + kl_weight · KL(p(· | "{subject} is a", h + δ) ‖ p(· | "{subject} is a")) + target_decay · ‖δ‖² / ‖h‖²

    and is kept within ‖δ‖ ≤ room · clamp_factor · ‖h‖. A step looks at `texts_per_step` of the texts, in turn.
    Each fact's δ is the same whatever facts it shares its batch with: the losses are summed, and Adam looks at every
    number by itself. Steps are taken in units of the root mean square of h, so that they have one size in any model.
    What no move changes runs once.

    Args:
        model: the base model, inside `frozen`.
        tokenize: its tokenizer.
        requests: the facts.
        states: h, without any context.
        block: name of the last edited block.
        config: `n_steps`, `edit_lr`, `clamp_factor`, `kl_weight`, `target_decay`, `texts_per_step`.
        batch_size: facts a pass. Changes the result by the rounding of these passes only.
        progress: is told how many facts are done, batch by batch.
        share: of `edit_lr` and `clamp_factor`: how long steps and moves are, where less is left to go.
        room: of `clamp_factor`, see `room_of`.

    Raises:
        NumericalError: a move is not finite, as the loss that it was sought by was not; names the first such fact of
            the batch.
    """
    moves = torch.zeros_like(states)
    prompts = [request.asked[0].sequence for request in requests]
    for chosen, _ in tokenize.batches(prompts, batch_size):
        batch = [requests[i] for i in chosen]
        found = _find_moves_of_batch(model, tokenize, batch, states[chosen], block, config, share, room)
        _require_finite(found, chosen, requests, config)
        moves[chosen] = found
        progress(len(chosen))
    return moves


def _require_finite(
    moves: Tensor,  # (n_chosen, hidden_size)
    chosen: Sequence[int],
    requests: Sequence[Request],
    config: EditorConfig,
) -> None:
    # After the last step and not at each, as a GPU waits each time it is asked: what Adam has once taken in stays.
    is_finite = torch.isfinite(moves).all(dim=1).tolist()
    spoilt = sorted(i for i, is_sound in zip(chosen, is_finite, strict=True) if not is_sound)
    if spoilt:
        others = f" (and {len(spoilt) - 1} more of its batch)" if len(spoilt) > 1 else ""
        raise NumericalError(
            f"The search for a state that makes the model answer {requests[spoilt[0]].prompt!r}{others} came to values "
            "that are not finite. Either the base model overflows in its precision: load it in bfloat16 or float32; or "
            f"the steps of the search are too long: lower EditorConfig.edit_lr, which is {config.edit_lr:g}."
        )


def _find_moves_of_batch(
    model: nn.Module,
    tokenize: Tokenizer,
    requests: Sequence[Request],
    states: Tensor,  # (n_facts, hidden_size)
    block: str,
    config: EditorConfig,
    share: float,
    room: float,
) -> Tensor:  # (n_facts, hidden_size)
    texts = list(zip(*([*request.asked, *request.varied] for request in requests), strict=True))
    essences = [request.essence for request in requests]
    n_chosen = min(config.texts_per_step or len(texts), len(texts))
    answers = [_steered_answers(model, tokenize, lookups, block) for lookups in texts]
    size = states.shape[1]
    unit = states.norm(dim=1, keepdim=True) / size**0.5  # the root mean square of each h
    moves = torch.zeros_like(states, requires_grad=True)  # in these units
    optimizer = torch.optim.Adam([moves], lr=share * config.edit_lr)
    before: Tensor | None = None
    if config.kl_weight:  # without it these passes, a third or more of all, have no part in the result
        describe = _steered_answers(model, tokenize, essences, block)
        with torch.no_grad():
            before = _log_probabilities(describe(moves)[0])
    for step in range(config.n_steps):
        optimizer.zero_grad()
        for chosen in range(step * n_chosen, (step + 1) * n_chosen):
            logits, targets = answers[chosen % len(texts)](unit * moves)
            (cross_entropy(logits, targets) / n_chosen).backward()
        loss = config.target_decay * moves.square().mean(dim=1).sum()
        if before is not None:
            after = _log_probabilities(describe(unit * moves)[0])
            change = F.kl_div(before, after, log_target=True, reduction="sum")  # after || before
            loss = loss + config.kl_weight * change.to(loss.device)  # logits may come out on another card
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            reach = share * room * config.clamp_factor * size**0.5
            moves *= (reach / moves.norm(dim=1, keepdim=True)).clamp(max=1)
    return (unit * moves).detach()


def room_of(n_facts: int, n_features: int, crowding: float) -> float:
    """How much of `clamp_factor` is left of moves where facts crowd the layers.

    The more keys there are, the more of what moves them lies along the keys of other subjects. Shorter moves disturb
    those less, and are enough for a fact; what they cost is rephrases. The power is a choice of balance, from what
    64, 256 and 1,024 facts did to one model.

    Args:
        n_facts: those of an edit, and those of the edits before it that are to stay.
        n_features: of the keys of all edited layers.
        crowding: the power.
    """
    return min(1.0, (n_features / (_ROOM * n_facts)) ** crowding)


def _steered_answers(
    model: nn.Module, tokenize: Tokenizer, lookups: Sequence[Lookup], block: str
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function of moves (n_lookups, hidden_size): logits and targets of all answer tokens, as the moves make them.

    What no move changes is computed once: the tokens before the subject's last one, where the model can go on behind
    them, and the blocks up to `block`.
    """
    beginnings = Beginnings.read(model, tokenize, [lookup.before_subject for lookup in lookups])
    sequences = [lookup.sequence if beginnings is None else lookup.from_subject for lookup in lookups]
    positions = torch.tensor([lookup.position if beginnings is None else 0 for lookup in lookups])
    batch = tokenize.pad(sequences).to(input_device(model))

    def behind() -> AbstractContextManager[None]:
        return nullcontext() if beginnings is None else beginnings.before(model)

    with torch.no_grad(), behind():
        reached = run_until(model, batch, target_module(model, block))

    def answers(moves: Tensor) -> tuple[Tensor, Tensor]:
        with (
            behind(),
            started_behind(model, block, reached),
            steered(target_module(model, block), torch.arange(len(lookups)), positions, moves),
        ):
            return own_answer_logits(model, batch)

    return answers


def _log_probabilities(logits: Tensor) -> Tensor:
    return wide(logits).log_softmax(-1)


def read_lookups(
    model: nn.Module,
    tokenize: Tokenizer,
    lookups: Sequence[Lookup],
    module_names: Sequence[str],
    block: str,
    batch_size: int,
) -> tuple[dict[str, Tensor], Tensor]:  # {module name: (n_lookups, key_size)}, (n_lookups, hidden_size)
    """Keys, and hidden states behind `block`, at the subjects' last tokens, in float32 or wider.

    All of them where `block` puts out its states, also of a model whose layers lie on several devices: layers are
    solved for together, and what they put out adds up there.
    """
    sequences = [lookup.until_subject for lookup in lookups]
    order: list[int] = []
    parts: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for chosen, batch in tokenize.batches(sequences, batch_size):
            keys, hidden = read_keys(
                model, batch.to(input_device(model)), module_names, "answer", target_module(model, block)
            )
            order += chosen
            parts.append(keys | {block: hidden})
    back = torch.tensor(order).argsort()
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    device = rows[block].device
    rows = {name: wide(found[back.to(found.device)].to(device)) for name, found in rows.items()}
    return rows, rows.pop(block)


def write_targets(
    model: nn.Module,
    tokenize: Tokenizer,
    facts: Sequence[Fact],
    module_names: Sequence[str],
    config: EditorConfig,
    *,
    penalty: Callable[[str], Tensor | None],
    ridge: Callable[[str], float],
    batch_size: int,
    written: Mapping[str, Tensor],
) -> tuple[dict[str, Shift], dict[str, Tensor]]:
    """The shifts that write `facts`.

    What the layers put out adds up in the hidden state h, so that they are solved for together, in steps: with h + δ
    the targets, h' what the model, as edited so far, has in their place, and U_l its keys there,

        S ← argmin ‖Σ_l U_l S'_l − (Σ_l U_l S_l + ω (h + δ − h'))‖² + ω Σ_l tr(S'_lᵀ (κ C_l + λI) S'_l)

    `n_solves` times from S = 0, with ω = `relaxation`: an edited layer changes the keys of those above it, so that to
    go the whole way at once misses. The keys of a fact are averaged over its prefixes. The paper (algorithm 1) solves
    for one layer after the other instead, each for an even share of what is left to go.

    Each further pass seeks targets anew of the facts that the model, as the passes before it have edited it, does not
    answer, keeps the others where they are, and adds its shifts: it mends what many facts, solved for together, have
    spoilt of each other. Less is left to go, so that steps and moves of pass p are 1/p as long. The model is edited by
    hooks: no weight is written.

    Where the keys of written facts are followed, an edit also asks that nothing changes at those of the edits before it
    (`keys_beside`), so that a model can be edited for long.

    Args:
        model: the base model, inside `frozen`.
        tokenize: its tokenizer.
        facts: with subjects.
        module_names: the layers to edit, in the order they run; each puts out something that is added to the hidden
            state.
        config: as in `find_moves` and `tokenize_facts`, `n_passes`, `n_solves`, `relaxation` and `statistics`.
        penalty: of a module: κ C, (key_size, key_size), see `JointLeastSquares`; None for 0.
        ridge: of a module: λ.
        batch_size: facts a pass of the language model. Changes the result by the rounding of these passes only.
        written: {module: (n, key_size)}, keys that the facts of earlier edits were written at.

    Returns:
        The shifts; and the keys that these facts were written at, or nothing where those are not followed.

    Raises:
        FactError: a fact without a subject, or whose prompt does not contain it.
        ModelMismatchError: the modules lie in no list of blocks, or put out something other than a hidden state.
        NumericalError: a state, a target or a solve is not finite.
    """
    requests = tokenize_facts(facts, tokenize, config)
    block = last_block(model, module_names)
    asked = [lookup for request in requests for lookup in request.asked]
    n_contexts = len(asked) // len(requests)
    shifts: dict[str, Shift] = {}

    def read(newest: Mapping[str, Shift]) -> tuple[dict[str, Tensor], Tensor]:
        with _in_force(model, shifts, newest):
            keys, hidden = read_lookups(model, tokenize, asked, module_names, block, batch_size)
        return {name: rows.unflatten(0, (-1, n_contexts)).mean(1) for name, rows in keys.items()}, hidden[::n_contexts]

    def seek(states: Tensor, sought: Sequence[int], share: float) -> Tensor:
        goals = states.clone()  # a fact that is not sought stays
        chosen = [requests[i] for i in sought]
        title = f"Finding targets, pass {number}"
        with (
            _in_force(model, shifts),
            logging.tqdm(total=len(sought), desc=title, unit=" facts", leave=False) as bar,
        ):
            goals[sought] += find_moves(
                model, tokenize, chosen, states[sought], block, config, batch_size, bar.update, share, room
            )
        return goals

    def solve(keys: Mapping[str, Tensor], states: Tensor, goals: Tensor) -> dict[str, Shift]:
        newest: dict[str, Shift] = {}
        for _ in logging.tqdm(range(config.n_solves), desc=f"Writing, pass {number}", unit=" solves", leave=False):
            if newest:
                keys, states = read(newest)
            wanted = config.relaxation * (goals - states)
            for name, shift in newest.items():
                wanted += keys[name] @ materialise(shift, True).to(keys[name])
            newest = solver.solve(keys, wanted, config.relaxation)
        return newest

    for number in range(1, config.n_passes + 1):
        keys, states = read({})
        if number == 1:
            _check_sizes(config, module_names, states.shape[1])
            penalties, n_staying = _penalties(module_names, keys, penalty, ridge, written)
            room = room_of(len(facts) + n_staying, sum(rows.shape[1] for rows in keys.values()), config.crowding)
            solver = JointLeastSquares(penalties)
            sought = list(range(len(requests)))
        else:
            with _in_force(model, shifts):
                prompts = [request.asked[0].sequence for request in requests]
                sought = (~find_answered(model, tokenize, prompts, batch_size)).nonzero().flatten().tolist()
        if sought:
            shifts = _added(shifts, solve(keys, states, seek(states, sought, share=1 / number)))
    return shifts, read({})[0] if config.follows_edits else {}


def _penalties(
    module_names: Sequence[str],
    keys: Mapping[str, Tensor],
    penalty: Callable[[str], Tensor | None],
    ridge: Callable[[str], float],
    written: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], int]:  # {module name: (key_size, key_size)}
    """What the shift of each layer is weighed against: κ C + λI, and the keys of earlier facts, which are to stay; and
    how many these are, at most."""
    penalties, n_staying = {}, 0
    for name in module_names:
        rows = keys[name].to(solve_device(keys[name].device), SOLVE_DTYPE)
        matrix = ridge(name) * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        ordinary = penalty(name)
        if ordinary is not None:
            matrix += ordinary.to(matrix)
        if name in written:  # here and not as rows, so that an edit has no more factors than facts
            staying = keys_beside(written[name].to(rows), rows)
            matrix.addmm_(staying.T, staying)
            n_staying = max(n_staying, len(staying))
        penalties[name] = matrix
    return penalties, n_staying


@torch.no_grad()
def find_answered(
    model: nn.Module, tokenize: Tokenizer, prompts: Sequence[TokenSequence], batch_size: int
) -> Tensor:  # (n_prompts,), bool
    """Which prompts the model answers with their targets: every token of it is the most likely one."""
    found = torch.zeros(len(prompts), dtype=torch.bool)
    for chosen, batch in tokenize.batches(prompts, batch_size):
        logits, targets = own_answer_logits(model, batch.to(input_device(model)))
        is_right = (logits.argmax(-1) == targets).cpu()
        counts = (batch.labels != IGNORED).sum(dim=1).tolist()
        found[chosen] = torch.stack([tokens.all() for tokens in is_right.split(counts)])
    return found


def keys_beside(
    rows: Tensor,  # (n, key_size)
    keys: Tensor,  # (n_new, key_size)
) -> Tensor:  # (at most n, key_size)
    """Keys of earlier facts without those whose place the key of a new fact takes.

    Asked to stay and to move at once, such a key would do half of each.
    """
    # By products, as the differences of all pairs would not fit: exact enough for a bound as wide as this.
    squares = rows.square().sum(1, keepdim=True) - 2 * rows @ keys.T + keys.square().sum(1)
    return rows[(squares > _SAME_KEY**2 * keys.square().sum(1)).all(1)]


def _in_force(model: nn.Module, *edits: Mapping[str, Shift]) -> AbstractContextManager[None]:
    """Within the context `model` is edited by the sum of `edits`."""
    shifts: Mapping[str, Shift] = {}
    for edit in edits:
        shifts = _added(shifts, edit)
    return shifted(model, {name: materialise(shift, True) for name, shift in shifts.items()})


def _added(first: Mapping[str, Shift], second: Mapping[str, Shift]) -> dict[str, Shift]:
    return {**first, **{name: add(first[name], shift) if name in first else shift for name, shift in second.items()}}


def _check_sizes(config: EditorConfig, module_names: Sequence[str], hidden_size: int) -> None:
    for name in module_names:
        value_size = config.shape_of(name)[1]
        if value_size != hidden_size:
            raise ModelMismatchError(
                f"{name} puts out {value_size} features, and the hidden state has {hidden_size}. Method 'memit' "
                "edits layers that write into the hidden state, such as the second feed-forward linear."
            )
