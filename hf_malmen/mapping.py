"""Module names -> the tensors of a checkpoint that hold their weights, and what a shift adds to each.

`transformers` renames and fuses weights while it loads (`conversion_mapping.py`), so a module's name can differ from
its key in the file, and one weight can lie there in pieces, or be a piece of a larger one. What it does when it saves
is the inverse; asking for that, with an empty model of the checkpoint's configuration, gives all three.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, ModelMismatchError
from .shards import TensorEntry, check_editable, parse_json
from .shifts import Shift, blocks, check_shape, materialise

_MAX_LAYERS = 1000  # several times as many as any published model has
# Settings that say how many layers there are: n_layer, depth, num_layers_per_stack; not vocab_size_per_layer_input.
_LAYER_COUNT = re.compile(r"(?!.*size).*((layer|block|depth)s?$|(layers|blocks)_per_)")


@dataclass(frozen=True)
class TensorShift:
    """What an edit adds to one tensor of a checkpoint.

    Attributes:
        module: the module whose weight, or a piece of it, the tensor is.
        shift: the shift of that module.
        fan_in_fan_out: whether the module stores its weight as (key_size, value_size).
        places: where the values lie otherwise than in the module: which of the module's flattened weight each value of
            the tensor is, in the shape of the tensor; -1 for those of other modules.
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
            # A sum with -0.0 leaves every bit of what belongs to other modules.
            yield 0, len(self.places), oriented.flatten()[self.places].masked_fill(self.places < 0, -0.0)


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
        ModelMismatchError: a module has no tensor of its shape in the checkpoint, or shares one with another module of
            the edit; or there are no shifts.
        CheckpointError: a tensor is quantised, or the configuration describes no model.
    """
    if not shifts:
        raise ModelMismatchError("The edit has no shifts, so there is nothing to write.")
    flipped = set(fan_in_fan_out)
    model = _converted_model(folder)
    found: dict[str, TensorShift] = {}
    for name, shift in shifts.items():
        pieces: dict[str, Tensor | None] = {f"{name}.weight": None}
        if model is not None:
            saved = _saved_as(model, name, shift, name in flipped)
            if tensors.keys() >= saved.keys() or f"{name}.weight" not in tensors:
                pieces = saved  # else saved under the names that modules have now: save_original_format=False
        for wanted, places in pieces.items():
            key = find_key(wanted, tensors)
            check_editable(key, tensors[key], tensors)
            if key in found:
                raise ModelMismatchError(
                    f"{name} and {found[key].module} are both stored as {key}, which takes one shift. Edit one of "
                    "them, or serve the edit as an adapter: edit.to_lora(...)."
                )
            if places is None:
                check_shape(shift, name in flipped, tensors[key].shape, key)
            elif tuple(places.shape) != tensors[key].shape:
                raise ModelMismatchError(
                    f"{key} holds a weight of shape {tensors[key].shape}, and config.json describes one of "
                    f"{tuple(places.shape)}. The edit, or the configuration, was made for another model."
                )
            found[key] = TensorShift(name, shift, name in flipped, places)
    return found


def direct_shifts(
    shifts: Mapping[str, Shift], fan_in_fan_out: Iterable[str], tensors: Mapping[str, TensorEntry]
) -> dict[str, TensorShift] | None:
    """What `map_shifts` gives if the checkpoint stores each weight under its module's own name; None if it cannot.

    A guess that costs nothing: whether these tensors are the modules' weights, their fingerprint tells.
    """
    flipped = set(fan_in_fan_out)
    found = {f"{name}.weight": TensorShift(name, shift, name in flipped) for name, shift in shifts.items()}
    for key, change in found.items():
        shape = change.shift.shape if change.fan_in_fan_out else change.shift.shape[::-1]
        if key not in tensors or tensors[key].shape != shape:
            return None
        check_editable(key, tensors[key], tensors)
    return found or None


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
    content = _with_floats(_trusted(parse_json(path.read_bytes(), path), path))
    import transformers  # seconds, and a lone file needs none of it
    from transformers.conversion_mapping import get_model_conversion_mapping

    architectures = content.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    try:
        model_class = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
        if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
            return None  # code of its own, which is never run
        config_class: Any = model_class.config_class
        with torch.device("meta"):
            model = model_class(config_class.from_dict(content, attn_implementation="eager"))
        return model if get_model_conversion_mapping(model, add_legacy=False) else None
    except Exception as error:  # whatever a configuration that makes no sense leads to, in code of 400 architectures
        raise CheckpointError(
            f"{path} does not describe a {architecture} that transformers {transformers.__version__} can build "
            f"({type(error).__name__}: {error}). Download it again, or install the transformers that it is for."
        ) from None


def _trusted(value: Any, path: Path, key: str = "") -> Any:
    """A configuration without what would make transformers fetch code, or build without end."""
    if isinstance(value, dict):
        # An implementation can name a kernel on the Hub, which would be downloaded and run.
        return {name: _trusted(item, path, name) for name, item in value.items() if "implementation" not in name}
    if isinstance(value, int) and value > _MAX_LAYERS and _LAYER_COUNT.match(key):
        raise CheckpointError(f"{path} says that {key} is {value}; expected at most {_MAX_LAYERS}. It is damaged.")
    return value


def _with_floats(value: Any) -> Any:
    """A configuration with the numbers that JSON lacks, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {name: _with_floats(item) for name, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def _saved_as(model: Any, name: str, shift: Shift, fan_in_fan_out: bool) -> dict[str, Tensor | None]:
    """{key in the checkpoint: which values of the weight it holds, or None for all of them as they stand}."""
    from transformers.core_model_loading import revert_weight_conversion

    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    # The edit of a head model fits the bare model, and the other way round.
    known = [other for other in (name, name.removeprefix(prefix), prefix + name) if other in modules]
    if not known or not isinstance(getattr(modules[known[0]], "weight", None), Tensor):
        return {f"{name}.weight": None}
    check_shape(shift, fan_in_fan_out, tuple(modules[known[0]].weight.shape), name)
    key, parent = f"{known[0]}.weight", known[0].rpartition(".")[0]
    # What is fused with it lies beside it.
    shapes = {
        ".".join(filter(None, (parent, child, "weight"))): module.weight.shape
        for child, module in modules[parent].named_children()
        if isinstance(getattr(module, "weight", None), Tensor)
    }
    # A weight that is only renamed comes back as the tensor that went in.
    empty = {other: torch.empty(shape, device="meta") for other, shape in shapes.items()}
    for wanted, tensor in revert_weight_conversion(model, empty).items():
        if tensor is empty[key]:
            return {wanted: None}
    # Every conversion moves values without changing them, so that numbers can stand for places.
    n = math.prod(shapes[key])
    numbers = {other: torch.full((1,), -1).expand(shape) for other, shape in shapes.items()}
    numbers[key] = torch.arange(n).reshape(shapes[key])
    stored = revert_weight_conversion(model, numbers)
    saved: dict[str, Tensor | None] = {wanted: places for wanted, places in stored.items() if (places >= 0).any()}
    held = torch.cat([places[places >= 0] for places in stored.values()])
    if not torch.equal(held.sort().values, torch.arange(n)):
        raise ModelMismatchError(
            f"transformers stores {name} of a {type(model).__name__} in a way that is not supported. "
            "Serve the edit as an adapter: edit.to_lora(...)."
        )
    return saved
