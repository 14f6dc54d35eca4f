"""The beginnings of sequences, read once: a causal model goes on behind them from the keys and values of attention."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .batches import IGNORED, Tokenizer, TokenSequence
from .tracing import input_device, kept_logits, model_inputs

_NEEDED = {"attention_mask", "position_ids", "use_cache"}
# What releases of transformers call the argument.
_CACHE_NAMES = ("cache", "past_key_values")


class Beginnings:
    """What a causal model keeps of the first tokens of some sequences, which no later token changes.

    Args:
        layers: keys and values of attention in every layer, (n_sequences, n_heads, length, head_size).
        mask: (n_sequences, length), padded on the left.
        cache_name: the argument of the model that takes them.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], mask: Tensor, cache_name: str) -> None:
        self.layers = layers
        self.mask = mask
        self.cache_name = cache_name

    @classmethod
    @torch.no_grad()
    def read(cls, model: nn.Module, tokenize: Tokenizer, beginnings: Sequence[tuple[int, ...]]) -> "Beginnings | None":
        """Run the model over the beginnings of sequences, given as token ids; some of them may be empty.

        Returns:
            None if there is nothing to read, or if the model keeps anything but the keys and values of all tokens, as
            with a sliding window or a state: it has to read whole sequences.
        """
        accepted = inspect.signature(model.forward).parameters
        cache_name = next((name for name in _CACHE_NAMES if name in accepted), None)
        if not any(beginnings) or cache_name is None or not accepted.keys() >= _NEEDED:
            return None
        cache = DynamicCache(config=getattr(model, "config", None))
        if not _is_plain(cache):
            return None
        sequences = [TokenSequence(ids, (IGNORED,) * len(ids)) for ids in beginnings]
        batch = tokenize.pad(sequences, side="left").to(input_device(model))
        inputs = model_inputs(model, batch) | {cache_name: cache, "use_cache": True}
        if "logits_to_keep" in accepted:
            # As an index: 1 keeps a slice, whose rows lie apart, and such rows are multiplied with a frozen weight in
            # a batched product, for which PyTorch copies the weight once a sequence.
            last = batch.input_ids.shape[1] - 1
            inputs["logits_to_keep"] = kept_logits(model, torch.tensor([last], device=batch.input_ids.device))
        model(**inputs)
        layers = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
        if not _is_plain(cache) or any(keys is None or values is None for keys, values in layers):
            return None
        return cls(layers, batch.attention_mask, cache_name)  # type: ignore[arg-type] # none of them is None

    @contextmanager
    def before(self, model: nn.Module) -> Iterator[None]:
        """Within the context, passes of `model` over a batch go on behind the beginnings, sequence by sequence."""

        def go_on(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            mask = torch.cat((self.mask, kwargs["attention_mask"]), dim=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, self.mask.shape[1] :]
            # A cache of its own each time: the model adds to it.
            behind = {self.cache_name: DynamicCache(self.layers), "use_cache": True}
            return args, kwargs | behind | {"attention_mask": mask, "position_ids": positions}

        with model.register_forward_pre_hook(go_on, with_kwargs=True):
            yield


def _is_plain(cache: DynamicCache) -> bool:
    return all(type(layer) is DynamicLayer for layer in cache.layers)
