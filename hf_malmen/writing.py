"""Moves of hidden states -> shifts of several layers, solved for together (MEMIT, arXiv 2210.07229, algorithm 1).

What the edited layers put out adds up in the hidden state behind the last of them. So they are solved for together, for
that sum to go the way from the hidden states of facts, where their subjects have been read, to h + δ.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .batches import IGNORED, Tokenizer, TokenSequence
from .configuration import EditorConfig
from .errors import ModelMismatchError
from .facts import Fact
from .joint_least_squares import JointLeastSquares
from .least_squares import SOLVE_DTYPE, solve_device
from .memit import Lookup, Request, find_moves, tokenize_facts
from .shifts import Shift, add, materialise
from .targets import last_block, target_module
from .tracing import input_device, own_answer_logits, read_keys, shifted, wide

# Features of the keys, of all layers together, that a fact needs to itself for a move of full length. With fewer the
# layers tell subjects apart less well: what moves some moves others.
_ROOM = 120
# A key of an earlier edit within this distance of a new fact's, relative to the new one's length, is of the same
# subject in the same words: those of other subjects lie further off, in all but one of some hundred cases.
_SAME_KEY = 0.3

# A move of each fact's hidden state, made of the state and of the move that was found for it: (n, hidden_size) each.
Refine = Callable[[Tensor, Tensor], Tensor]


class Writer:
    """Facts, and how the layers of one model are shifted for their hidden states to move.

    Args:
        model: the base model, inside `frozen`.
        tokenize: its tokenizer.
        requests: the facts.
        module_names: the layers to edit, in the order they run; each puts out something that is added to the hidden
            state.
        config: `n_solves` and `relaxation`.
        penalty: of a module: κ C, (key_size, key_size), see `JointLeastSquares`; None for 0.
        ridge: of a module: λ.
        batch_size: facts a pass of the language model.
        written: {module: (n, key_size)}, keys that the facts of earlier edits were written at.

    Attributes:
        block: name of the block behind which states are read, the last that is edited.
        n_crowded: how many facts share the layers: these, and those of earlier edits that are to stay.

    Raises:
        ModelMismatchError: the modules lie in no list of blocks, or put out something other than a hidden state.
        NumericalError: a state is not finite, or what an edit is weighed against cannot be solved with.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenize: Tokenizer,
        requests: Sequence[Request],
        module_names: Sequence[str],
        config: EditorConfig,
        *,
        penalty: Callable[[str], Tensor | None],
        ridge: Callable[[str], float],
        batch_size: int,
        written: Mapping[str, Tensor],
    ) -> None:
        self.model = model
        self.tokenize = tokenize
        self.module_names = module_names
        self.config = config
        self.batch_size = batch_size
        self.block = last_block(model, module_names)
        self._asked = [lookup for request in requests for lookup in request.asked]
        self._n_contexts = len(self._asked) // len(requests)
        self.keys, self.states = self.read()
        _check_sizes(config, module_names, self.states.shape[1])
        penalties, n_staying = _penalties(module_names, self.keys, penalty, ridge, written)
        self.n_crowded = len(requests) + n_staying
        self._solver = JointLeastSquares(penalties)

    @property
    def n_features(self) -> int:
        """Of the keys of all edited layers."""
        return sum(rows.shape[1] for rows in self.keys.values())

    def read(self, *shifts: Mapping[str, Shift]) -> tuple[dict[str, Tensor], Tensor]:
        """Keys and hidden states of the facts in the model edited by the sum of `shifts`.

        A fact's keys are averaged over its prefixes.

        Returns:
            {module name: (n_facts, key_size)}, (n_facts, hidden_size).
        """
        with in_force(self.model, *shifts):
            keys, hidden = read_lookups(
                self.model, self.tokenize, self._asked, self.module_names, self.block, self.batch_size
            )
        keys = {name: rows.unflatten(0, (-1, self._n_contexts)).mean(1) for name, rows in keys.items()}
        return keys, hidden[:: self._n_contexts]

    def solve(
        self,
        keys: Mapping[str, Tensor],
        states: Tensor,  # (n_facts, hidden_size)
        goals: Tensor,  # (n_facts, hidden_size)
        before: Mapping[str, Shift],
        title: str = "Writing",
    ) -> tuple[dict[str, Shift], Mapping[str, Tensor]]:
        """What takes hidden states to `goals`, in `n_solves` steps.

        With h' what the model, as edited so far, has in the place of the goals, and U_l its keys there,

            S ← argmin ‖Σ_l U_l S'_l − (Σ_l U_l S_l + ω (goals − h'))‖² + ω Σ_l tr(S'_lᵀ (κ C_l + λI) S'_l)

        from S = 0, with ω = `relaxation`: an edited layer changes the keys of those above it, so that to go the whole
        way at once misses. The paper solves for one layer after the other instead, each for an even share of what is
        left to go.

        Args:
            keys, states: as `read` gives them for `before`.
            goals: where the states should be.
            before: shifts in force.
            title: of the progress bar.

        Returns:
            The shifts, and the keys that the last step was made at.
        """
        newest: dict[str, Shift] = {}
        for _ in logging.tqdm(range(self.config.n_solves), desc=title, unit=" solves", leave=False):
            if newest:
                keys, states = self.read(before, newest)
            wanted = self.config.relaxation * (goals - states)
            for name, shift in newest.items():
                wanted += keys[name] @ materialise(shift, True).to(keys[name])
            newest = self._solver.solve(keys, wanted, self.config.relaxation)
        return newest, keys

    def goal_gradient(
        self,
        keys: Mapping[str, Tensor],
        shift_gradients: Mapping[str, Tensor],  # {module name: ∂L/∂S, (key_size, value_size)}
    ) -> Tensor:  # (n_facts, hidden_size)
        """∂L/∂goals of where the steps of `solve` lead, at keys that stay as they are from then on:

        S = argmin ‖Σ_l U_l S_l − (goals − h)‖² + Σ_l tr(S_lᵀ (κ C_l + λI) S_l), with h as if S were 0
        """
        return self._solver.difference_gradient(keys, shift_gradients)


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
    refine: Refine = lambda states, moves: moves,
) -> tuple[dict[str, Shift], dict[str, Tensor]]:
    """The shifts that write `facts`: moves are sought, refined, and written, in `n_passes`.

    Each further pass seeks targets anew of the facts that the model, as the passes before it have edited it, does not
    answer, keeps the others where they are, and adds its shifts: it mends what many facts, solved for together, have
    spoilt of each other. Less is left to go, so that steps and moves of pass p are 1/p as long. The model is edited by
    hooks: no weight is written.

    Where the keys of written facts are followed, an edit also asks that nothing changes at those of the edits before it
    (`keys_beside`), so that a model can be edited for long.

    Args:
        model, tokenize, module_names, penalty, ridge, written: as for `Writer`.
        facts: with subjects.
        config: as in `find_moves`, `tokenize_facts` and `Writer`, `n_passes`, `crowding` and `statistics`.
        batch_size: facts a pass of the language model. Changes the result by the rounding of these passes only.
        refine: what becomes of the moves found, before they are written.

    Returns:
        The shifts; and the keys that these facts were written at, or nothing where those are not followed.

    Raises:
        FactError: a fact without a subject, or whose prompt does not contain it.
        ModelMismatchError: the modules lie in no list of blocks, or put out something other than a hidden state.
        NumericalError: a state, a target or a solve is not finite.
    """
    requests = tokenize_facts(facts, tokenize, config)
    writer = Writer(
        model,
        tokenize,
        requests,
        module_names,
        config,
        penalty=penalty,
        ridge=ridge,
        batch_size=batch_size,
        written=written,
    )
    room = room_of(writer.n_crowded, writer.n_features, config.crowding)
    shifts: dict[str, Shift] = {}
    keys, states = writer.keys, writer.states
    sought = list(range(len(requests)))
    for number in range(1, config.n_passes + 1):
        if number > 1:
            keys, states = writer.read(shifts)
            with in_force(model, shifts):
                prompts = [request.asked[0].sequence for request in requests]
                sought = (~find_answered(model, tokenize, prompts, batch_size)).nonzero().flatten().tolist()
            if not sought:
                break
        goals = states.clone()  # a fact that is not sought stays
        title = f"Finding targets, pass {number}"
        chosen = [requests[i] for i in sought]
        with in_force(model, shifts), logging.tqdm(total=len(sought), desc=title, unit=" facts", leave=False) as bar:
            moves = find_moves(
                model,
                tokenize,
                chosen,
                states[sought],
                writer.block,
                config,
                batch_size,
                bar.update,
                share=1 / number,
                room=room,
            )
        goals[sought] += refine(states[sought], moves)
        newest, _ = writer.solve(keys, states, goals, shifts, f"Writing, pass {number}")
        shifts = _added(shifts, newest)
    return shifts, writer.read(shifts)[0] if config.follows_edits else {}


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


def in_force(model: nn.Module, *edits: Mapping[str, Shift]) -> AbstractContextManager[None]:
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
                f"{name} puts out {value_size} features, and the hidden state has {hidden_size}. Method "
                f"{config.method!r} edits layers that write into it, such as the second feed-forward linear."
            )
