"""The floor of any method here: what no implementation avoids.

A plain forward pass over each sequence, and a backward pass down to the first edited layer, in the same batches, with
nothing of this package in it but the batches.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hf_malmen.batches import IGNORED, Tokenizer, TokenSequence


class Floor:
    """Plain passes over token sequences.

    Args:
        model: the base model, whose parameters do not require gradients afterwards.
        tokenize: makes the batches.
        first: the first edited module.
        batch_size: sequences a pass.
    """

    def __init__(self, model: Any, tokenize: Tokenizer, first: str, batch_size: int) -> None:
        self.model, self.tokenize, self.batch_size = model, tokenize, batch_size
        self.weight = model.get_submodule(first).weight

    def passes(self, sequences: Sequence[TokenSequence], backward: bool = True) -> None:
        """Forward over each sequence and, with `backward`, backward down to the first edited layer."""
        self.model.requires_grad_(False)
        self.weight.requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            for _, batch in self.tokenize.batches(sequences, self.batch_size):
                labels = batch.labels
                kept = (labels != IGNORED).any(0).nonzero().squeeze(-1)
                batch = batch.to(self.weight.device)
                logits = self.model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    position_ids=(batch.attention_mask.cumsum(-1) - 1).clamp(min=0),
                    logits_to_keep=kept.to(self.weight.device),
                    use_cache=False,
                ).logits.float()
                targets = labels[:, kept].flatten().to(self.weight.device)
                loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
                if backward:
                    loss.backward()
        self.weight.grad = None
