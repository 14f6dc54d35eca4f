"""MEMIT's targets (Meng et al., ICLR 2023, arXiv 2210.07229), found by optimisation at the subject's last token.

A fact is looked up where a causal model has just read its subject. There a move δ of the hidden state is sought, behind
the last edited block, that makes the model give the target (equation 16 of the paper). `writing` puts it into weights.

This takes what a layer puts out for a part of the hidden state. Where a block normalises it first (Gemma, OLMo 2) the
next step makes up for the difference; blocks that normalise the sum (post-norm, as in OPT-350M) take edits less well.
"""

from collections.abc import Callable, Sequence
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
from .errors import NumericalError
from .facts import Fact, require_fields
from .losses import cross_entropy
from .targets import target_module
from .tracing import input_device, own_answer_logits, run_until, steered, wide
from .trunk import started_behind

logger = logging.get_logger(__name__)

# What a model is asked about a subject beside the fact, and should go on answering alike: what kind of thing it is.
ESSENCE = "{} is a"
# How many of the words behind a subject a text of `n_word_dropouts` leaves out, on average.
_WORD_DROPOUT = 0.4

# Fields of `EditorConfig` that the moves found for a fact depend on.
MOVE_FIELDS = (
    "n_steps",
    "edit_lr",
    "clamp_factor",
    "kl_weight",
    "target_decay",
    "context_prefixes",
    "context_infixes",
    "n_word_dropouts",
    "texts_per_step",
    "prompt_template",
    "use_chat_template",
)


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
        essence: "{subject} is a", which is asked for the token that follows; None where that does not count.
    """

    prompt: str
    asked: list[Lookup]
    varied: list[Lookup]
    essence: Lookup | None


def tokenize_facts(facts: Sequence[Fact], tokenize: Tokenizer, config: EditorConfig) -> list[Request]:
    """Facts with their subjects found.

    Args:
        facts: in any order.
        tokenize: the base model's tokenizer.
        config: `context_prefixes`, `context_infixes` and `n_word_dropouts`.

    Raises:
        FactError: a fact without a subject, where the method needs one; or whose prompt does not contain it.
    """
    if config.needs_subjects:
        require_fields(
            facts, ["subject"], f"Method {config.method!r}, which writes a fact where its subject has been read,"
        )
    elif any(not fact.subject for fact in facts):
        logger.warning_once(
            "Some facts have no subject, and are written where their prompts end, from where few rephrases follow and "
            "other answers change. Give them a subject, as their prompts spell it, or train an editor of method "
            "'malmen', which needs none."
        )
    return [_request(fact, tokenize, config) for fact in facts]


def _request(fact: Fact, tokenize: Tokenizer, config: EditorConfig) -> Request:
    prompt = fact.prompt
    subject = (fact.subject or "").strip() or prompt.strip()

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
    if not config.kl_weight:
        return Request(prompt, asked, varied, None)
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
    essences = [request.essence for request in requests if request.essence is not None]
    n_chosen = min(config.texts_per_step or len(texts), len(texts))
    answers = [_steered_answers(model, tokenize, lookups, block) for lookups in texts]
    size = states.shape[1]
    unit = states.norm(dim=1, keepdim=True) / size**0.5  # the root mean square of each h
    moves = torch.zeros_like(states, requires_grad=True)  # in these units
    optimizer = torch.optim.Adam([moves], lr=share * config.edit_lr)
    before: Tensor | None = None
    if essences:  # without it these passes, a third or more of all, have no part in the result
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
