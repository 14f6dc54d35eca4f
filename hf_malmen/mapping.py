"""Module names -> the tensors of a checkpoint that hold their weights, and what a shift adds to each.

`transformers` renames and fuses weights while it loads (`conversion_mapping.py`), so a module's name can differ from its
key in the file, and one weight can lie there in pieces. What it does when it saves is the inverse; asking for that, with
an empty model of the checkpoint's configuration, gives both.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, ModelMismatchError
from .shards import TensorEntry, check_editable, parse_json
from .shifts import Shift, blocks, check_shape, materialise


@dataclass(frozen=True)
class TensorShift:
    """What an edit adds to one tensor of a checkpoint.

    Attributes:
        module: the module whose weight, or a piece of it, the tensor is.
        shift: the shift of that module.
        fan_in_fan_out: whether the module stores its weight as (key_size, value_size).
        places: for a piece: which values of the module's flattened weight it holds, in the shape of the tensor.
    """

    module: str
    shift: Shift
    fan_in_fan_out: bool
    places: Tensor | None = None

    def blocks(self) -> Iterator[tuple[int, int, Tensor]]:
        """The tensor's rows of the shift, in order: first row, row after the last, values."""
        if self.places is None:
            yield from blocks(self.shift, self.fan_in_fan_out)
        else:
            whole = materialise(self.shift, self.fan_in_fan_out)
            oriented = whole if self.fan_in_fan_out else whole.T.contiguous()
            yield 0, len(self.places), oriented.flatten()[self.places]


def map_shifts(
    folder: Path, shifts: Mapping[str, Shift], fan_in_fan_out: Iterable[str], tensors: Mapping[str, TensorEntry]
) -> dict[str, TensorShift]:
    """What an edit adds to which tensors of a checkpoint.

    Args:
        folder: the checkpoint's, for its `config.json`.
        shifts: {module name: its shift}.
        fan_in_fan_out: modules stored as (key_size, value_size).
        tensors: every tensor of the checkpoint.

    Returns:
        {key: what to add}.

    Raises:
        ModelMismatchError: a module has no tensor of its shape in the checkpoint, or shares one with what is not edited.
        CheckpointError: a tensor is quantised.
    """
    flipped = set(fan_in_fan_out)
    model = _converted_model(folder)
    found: dict[str, TensorShift] = {}
    for name, shift in shifts.items():
        shape = shift.shape if name in flipped else shift.shape[::-1]
        pieces = {f"{name}.weight": None} if model is None else _saved_as(model, f"{name}.weight", shape)
        for wanted, places in pieces.items():
            key = find_key(wanted, tensors)
            check_editable(key, tensors[key], tensors)
            if key in found:
                raise ModelMismatchError(f"{name} and {found[key].module} are both stored as {key}; edit one of them.")
            if places is None:
                check_shape(shift, name in flipped, tensors[key].shape, key)
            elif tuple(places.shape) != tensors[key].shape:
                raise ModelMismatchError(
                    f"{key} holds a matrix of shape {tensors[key].shape}, of which {name} is only a part, of shape "
                    f"{tuple(places.shape)}. Export the edit as an adapter instead: edit.to_lora(...)."
                )
            found[key] = TensorShift(name, shift, name in flipped, places)
    return found


def find_key(wanted: str, tensors: Iterable[str]) -> str:
    """The checkpoint's key for a weight.

    A checkpoint of the bare model leaves out the head model's prefix (`transformer.h.0` is `h.0` in it), and one of a
    larger model adds one; both are recognised when the rest of the name is unique.

    Raises:
        ModelMismatchError: no key, or several, for that weight.
    """
    keys = list(tensors)
    if wanted in keys:
        return wanted
    found = [key for key in keys if wanted.endswith(f".{key}") or key.endswith(f".{wanted}")]
    if len(found) == 1:
        return found[0]
    raise ModelMismatchError(
        f"The checkpoint has {'no' if not found else 'more than one'} tensor for {wanted}"
        f"{': ' + ', '.join(found) if found else ''}. The edit was made for another model."
    )


def _converted_model(folder: Path) -> Any:
    """The checkpoint's model without weights, if its weights are converted while they are loaded; else None."""
    path = folder / "config.json"
    if not path.is_file():
        return None  # a lone file: its keys are all there is to go by
    content = parse_json(path.read_bytes(), path)
    import transformers  # seconds, and most checkpoints of plain folders come this way only to find nothing
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    architectures = content.get("architectures") or []
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    model_class = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    model_types = [entry.get("model_type") for entry in (content, *content.values()) if isinstance(entry, Mapping)]
    names = [name for name in (*model_types, architecture) if isinstance(name, str)]
    if model_class is None or not any(get_checkpoint_conversion_mapping(name) for name in names):
        return None
    try:
        with torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(folder)
            return model_class(config)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path} does not describe a model that transformers can build: {error}") from None


def _saved_as(model: nn.Module, key: str, shape: tuple[int, int]) -> dict[str, Tensor | None]:
    """{key in the checkpoint: which values of the weight it holds, or None for all of them as they stand}."""
    from transformers.core_model_loading import revert_weight_conversion

    # Every conversion of a single weight moves values without changing them, so that numbers stand for their places.
    saved = revert_weight_conversion(model, {key: torch.arange(math.prod(shape), dtype=torch.int64).reshape(shape)})
    unchanged = len(saved) == 1 and all(
        tuple(places.shape) == shape and torch.equal(places.flatten(), torch.arange(math.prod(shape)))
        for places in saved.values()
    )
    return {name: None if unchanged else places for name, places in saved.items()}
