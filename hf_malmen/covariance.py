"""The second moment of ordinary keys, layer by layer, from any text: what an edit should leave where it is."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .batches import IGNORED, Tokenizer, TokenSequence
from .hypernetwork import DoubleBuffers
from .targets import last_block, target_module
from .tracing import input_device, read_keys

DEFAULT_N_TOKENS = 100_000
DEFAULT_TEXT_BATCH_SIZE = 8
# Texts longer than this are read in windows. Context enough for what a middle layer reads off it, and short enough that
# attention costs little.
MAX_LENGTH = 256
# Windows read ahead, so that those of a batch are of similar length.
_WINDOWS = 512


class KeyCovariance(DoubleBuffers):
    """Σ k kᵀ over all keys k seen, for `n_modules` layers of one shape, in float64.

    Keys have outliers, so their products are ill-conditioned (see `least_squares`); a sum in float64 is the same for
    any batches of the same keys.

    Args:
        key_size: features of a key.
        n_modules: how many layers.
    """

    count: Tensor  # ()
    products: Tensor  # (n_modules, key_size, key_size)

    def __init__(self, key_size: int, n_modules: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("products", torch.zeros(n_modules, key_size, key_size, dtype=torch.float64))

    @torch.no_grad()
    def update(
        self,
        keys: Sequence[Tensor],  # n_modules times (n, key_size)
    ) -> None:
        """Take in the keys of `n` more tokens in every layer."""
        for products, rows in zip(self.products, keys, strict=True):
            own = rows.to(products)
            products.addmm_(own.T, own)
        self.count += len(keys[0])

    def moment(self, index: int) -> Tensor:  # (key_size, key_size)
        """C = Σ k kᵀ / count of the layer at `index`; 0 while no key was seen."""
        return self.products[index] / self.count.clamp(min=1)


def token_windows(tokenize: Tokenizer, texts: Iterable[str], n_tokens: int) -> Iterator[TokenSequence]:
    """The first `n_tokens` tokens of the texts, each text on its own, in windows that the model can read."""
    length = min(tokenize.max_length or MAX_LENGTH, MAX_LENGTH)
    for text in texts:
        # Not verbose: it would warn of texts longer than the model reads.
        ids = list(tokenize.tokenizer(text, verbose=False)["input_ids"])
        for start in range(0, len(ids), length):
            part = ids[start : start + min(length, n_tokens)]
            if not part:
                return
            yield TokenSequence(tuple(part), (IGNORED,) * len(part))
            n_tokens -= len(part)


def ordinary_keys(
    model: nn.Module,
    tokenize: Tokenizer,
    texts: Iterable[str],
    module_names: Sequence[str],
    *,
    n_tokens: int = DEFAULT_N_TOKENS,
    batch_size: int = DEFAULT_TEXT_BATCH_SIZE,
) -> Iterator[dict[str, Tensor]]:
    """Keys of every module at every token of texts, batch by batch: {module name: (n, key_size)}.

    The last block with one of the modules is the last that runs.

    Args:
        model: the base model, inside `frozen`.
        tokenize: its tokenizer.
        texts: read until `n_tokens` are reached.
        module_names: modules in blocks of one `nn.ModuleList`.
        n_tokens: how many tokens at most.
        batch_size: windows a pass.

    Raises:
        NumericalError, ModelMismatchError: as in `tracing.read_keys`.
    """
    last = target_module(model, last_block(model, module_names))
    windows = token_windows(tokenize, texts, n_tokens)
    with logging.tqdm(total=n_tokens, desc="Reading keys", unit=" tokens", leave=False) as bar:
        while ahead := list(islice(windows, _WINDOWS)):
            for _, batch in tokenize.batches(ahead, batch_size):
                keys, _ = read_keys(model, batch.to(input_device(model)), module_names, "all", last)
                yield keys
                bar.update(int(batch.attention_mask.sum()))
