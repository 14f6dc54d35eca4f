"""One training step's edit, by the ways that methods have, and how its gradient reaches the editor (section 4.3).

As in `makers`, but with everything kept that the gradient needs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.utils import logging

from . import distributed
from .batches import Tokenizer
from .configuration import EditorConfig
from .features import FeatureCache, Key, sequence_key
from .least_squares import Solution
from .memit import MOVE_FIELDS, Request, find_moves
from .networks import EditorNetworks
from .shifts import materialise
from .tracing import Factors, Trace, input_device
from .writing import Writer, room_of


class EditStep(Protocol):
    """An edit that the meta loss is about to judge.

    Attributes:
        leaves: {module name: what the meta loss is differentiated with respect to}.
        after: {module name: what is added to its weight in the edited model}, made of the leaves.
    """

    leaves: dict[str, Tensor]
    after: dict[str, Tensor | Factors]

    def shift(self, name: str) -> Tensor:  # (key_size, value_size)
        """S of a module, without the edits before it."""

    def backward(self, gradients: Mapping[str, Tensor]) -> None:
        """Add the gradients of the editor's parameters, given those of `leaves`, which several processes share."""


class StepOfRows:
    """Rows are traced, changed by the hyper-network, and solved for layer by layer.

    Args:
        editor: whose statistics take in the rows, and whose preserved keys do after `backward`.
        model: the base model, inside `frozen`.
        traces: of the facts; of several processes, each has its own.
        before: {module name: what is added to its weight before the edit}, if anything is.
        editor_batch_size: tokens a pass of the hyper-network.
        as_shifts: whether S itself is wanted, and not the factors that are faster for few facts.
    """

    def __init__(
        self,
        editor: EditorNetworks,
        model: nn.Module,
        traces: Sequence[Mapping[str, Trace]],
        before: Mapping[str, Tensor],
        editor_batch_size: int,
        *,
        as_shifts: bool,
    ) -> None:
        self._editor = editor
        self._traces = traces
        self._editor_batch_size = editor_batch_size
        editor.update_statistics(traces)
        self._passes = editor.row_passes(traces, editor_batch_size)
        self._solutions = editor.solve(traces, editor_batch_size, passes=self._passes)
        self.leaves, self.after = _leaves(self._solutions, model, before, as_shifts)

    def shift(self, name: str) -> Tensor:  # (key_size, value_size)
        """S of a module, without the edits before it."""
        return self._solutions[name].shift

    def backward(self, gradients: Mapping[str, Tensor]) -> None:
        """By the adjoint of the solves and a replay of the hyper-network. The step's keys are preserved then."""
        self._editor.backward(self._traces, self._solutions, gradients, self._editor_batch_size, self._passes)
        self._editor.preserve(self._traces)


class StepOfMoves:
    """Moves of hidden states are sought, changed by the network, and written by all layers together.

    The gradient takes the keys of the edited model, at which the last of the solves is made, for constants, and is that
    of where these solves lead (`Writer.goal_gradient`). So it is exact with one solve that goes all the way, and else
    but for how goals move the keys of later layers, and for what is left to go.

    Args:
        editor: the editor.
        model: the base model, inside `frozen`.
        tokenize: its tokenizer.
        requests: the facts; the same on every process, each of which seeks the moves of its part.
        features: where moves that were found are kept: they are of the unedited model, and the editor has no part in
            them.
        n_facts: of a full step. One of fewer facts, as the last of an epoch, seeks moves of the same length, so that
            all are sought once.
        batch_size: facts a pass of the language model.
    """

    def __init__(
        self,
        editor: EditorNetworks,
        model: nn.Module,
        tokenize: Tokenizer,
        requests: Sequence[Request],
        features: FeatureCache,
        n_facts: int,
        batch_size: int,
    ) -> None:
        self._editor = editor
        self._writer = writer = Writer(
            model,
            tokenize,
            requests,
            editor.module_names,
            editor.config,
            penalty=editor.key_penalty,
            ridge=editor.ridge,
            batch_size=batch_size,
            written={},
        )
        self._states = writer.states

        def find(missing: Sequence[int]) -> Tensor:
            sought = [requests[i] for i in missing]
            states = self._states[list(missing)]
            with logging.tqdm(total=len(missing), desc="Finding targets", unit=" facts", leave=False) as bar:
                return find_moves(
                    model, tokenize, sought, states, writer.block, editor.config, batch_size, bar.update, room=room
                )

        room = room_of(max(n_facts, len(requests)), writer.n_features, editor.config.crowding)
        with distributed.together():
            own = distributed.stretch(range(len(requests)), [1] * len(requests))
            keys = [move_key(requests[i], room, editor.config) for i in own]
            moves = _kept_moves(features, keys, own, self._states, find)
        self._moves = torch.cat(distributed.gather_rows(moves))
        with torch.no_grad():
            goals = self._states + editor.refine(self._states, self._moves)
            shifts, self._keys = writer.solve(writer.keys, self._states, goals, {})
        device, dtype = input_device(model), self._states.dtype
        self.leaves = {
            name: materialise(shift, True).to(device, dtype).requires_grad_(True) for name, shift in shifts.items()
        }
        self.after: dict[str, Tensor | Factors] = dict(self.leaves)

    def shift(self, name: str) -> Tensor:  # (key_size, value_size)
        """S of a module."""
        return self.leaves[name].detach()

    def backward(self, gradients: Mapping[str, Tensor]) -> None:
        """By the adjoint of the solves and a replay of the network."""
        pooled = {name: distributed.add_up(gradient) for name, gradient in gradients.items()}
        with distributed.gradients_added_up(self._editor.parameters()):
            if distributed.is_main():  # all processes have all facts: they count once
                with torch.enable_grad():
                    moves = self._editor.refine(self._states, self._moves)
                    (moves * self._writer.goal_gradient(self._keys, pooled).to(moves)).sum().backward()


def move_key(request: Request, room: float, config: EditorConfig) -> Key:
    """Where the move of a fact is kept: by all that it depends on but the model.

    Args:
        request: the fact.
        room: of `find_moves`.
        config: the search's settings. A list of texts is no part of a key, so that they are taken as they print.
    """
    kind, sequence = sequence_key("move", request.asked[0].sequence)
    settings = repr([getattr(config, name) for name in MOVE_FIELDS])
    return kind, (sequence, request.asked[0].position, room, settings)


def _kept_moves(
    features: FeatureCache,
    keys: Sequence[Key],
    places: Sequence[int],
    states: Tensor,  # (n_facts, hidden_size)
    find: Callable[[Sequence[int]], Tensor],
) -> Tensor:  # (n_places, hidden_size)
    """Moves of some of the facts, of which those that are not kept are sought.

    Args:
        features: where they are kept.
        keys: one a place.
        places: of the facts among `states`.
        states: of all facts.
        find: of places, their moves.
    """
    kept = {key: features.get(key, states.device) for key in keys}
    missing = {key: place for key, place in zip(keys, places, strict=True) if kept[key] is None}
    if missing:
        for key, move in zip(missing, find(list(missing.values())), strict=True):
            kept[key] = (move.clone(),)  # of its own, or it would keep all of them
            features.put(key, (move.clone(),))
        features.flush()  # dear as they are
    rows = [found[0] for key in keys if (found := kept[key]) is not None]
    return torch.stack(rows) if rows else states[:0]


def _leaves(
    solutions: Mapping[str, Solution], model: nn.Module, before: Mapping[str, Tensor], as_shifts: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor | Factors]]:
    """What the meta loss is differentiated with respect to, and the shifts of the edited model that follow from it.

    The value differences D, where the passes read the factors of S = PᵀD, which for few facts is much the faster;
    else S. Nor is the gradient of S wanted then: P ∂L/∂S = ∂L/∂D is what the adjoint of the solve would ask of it.
    A sequence adds shifts up, and a penalty is of S: both take S itself.

    Args:
        solutions: the step's.
        model: the base model.
        before: what is added to the weights before the edit, if anything is.
        as_shifts: whether S itself is wanted in any case.
    """
    device = input_device(model)
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    leaves: dict[str, Tensor] = {}
    after: dict[str, Tensor | Factors] = {}
    for name, solution in solutions.items():
        factors = None if as_shifts else solution.factors
        if factors is not None:
            left, right = (factor.to(device, dtype) for factor in factors)
            leaves[name] = right.detach().requires_grad_(True)
            after[name] = Factors(left, leaves[name])
        else:
            # The loss has the same gradient with respect to the sum of all shifts as to the newest.
            shift = solution.shift.to(device, dtype)
            leaves[name] = (before[name] + shift if before else shift.detach()).requires_grad_(True)
            after[name] = leaves[name]
    return leaves, after
