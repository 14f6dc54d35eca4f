"""Which layers an editor edits: names read off the module tree, and what must hold of each."""

import hashlib
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .configuration import EditorConfig
from .errors import ModelMismatchError

# How many of the last blocks are edited when the user names none (paper, appendix).
DEFAULT_N_BLOCKS = 6

# Not `is_floating_point`: float8 weights are quantised too, with their scales beside them.
_EDITABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def find_targets(model: nn.Module, config: EditorConfig) -> list[str]:
    """Full names of the modules to edit, in the order the model runs them.

    Args:
        model: the base model.
        config: `target_modules` as full names, PEFT-style suffixes, a regular expression matched against the whole
            name, or None for the second feed-forward linear of the last six blocks; `layers_to_transform` keeps
            those in some blocks.

    Raises:
        ModelMismatchError: nothing matches, or a match cannot be edited.
    """
    wanted_names = config.target_modules
    names = _default_targets(model) if wanted_names is None else _matching(model, wanted_names)
    if config.layers_to_transform is not None:
        wanted = config.layers_to_transform
        kept = {wanted} if isinstance(wanted, int) else set(wanted)
        names = [name for name in names if _block_index(name) in kept]
        if not names:
            raise ModelMismatchError(f"No target module lies in the blocks layers_to_transform={wanted!r}.")
    check_targets(model, names)
    return names


def check_targets(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse modules whose weight cannot take a shift.

    Raises:
        ModelMismatchError: missing, not a linear layer, quantised, or tied to another module.
    """
    # Duplicates kept: one module under two names is as shared as one weight in two modules.
    modules = dict(model.named_modules(remove_duplicate=False))
    holders: dict[int, list[str]] = {}
    for module_name, module in modules.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(f"{module_name}.{parameter_name}".lstrip("."))
    for name in names:
        module = modules.get(name)
        if module is None:
            raise ModelMismatchError(
                f"{type(model).__name__} has no module {name!r}. Linear layers it has: {_some_linear_names(modules)}."
            )
        quantised = _quantised_form(model, module)
        if quantised is not None:
            raise ModelMismatchError(
                f"{name} holds its weight in {quantised}, quantised, and cannot be edited in place. Make the edit with "
                "the unquantised model, and load it into this one as an adapter: edit.to_lora(folder), then "
                "model.load_adapter(folder)."
            )
        if not isinstance(module, nn.Linear | Conv1D):
            raise ModelMismatchError(
                f"{name} is a {type(module).__name__}; only nn.Linear and transformers' Conv1D can be edited. "
                f"Linear layers of this model: {_some_linear_names(modules)}."
            )
        weight = module.weight
        shared = [other for other in holders[id(weight)] if other != f"{name}.weight"]
        if shared:
            raise ModelMismatchError(
                f"{name} shares its weight with {', '.join(shared)}; an edit would change both. Choose another target."
            )


def is_fan_in_fan_out(module: nn.Module) -> bool:
    """Whether the weight is stored as (key_size, value_size). Asked of the module: a square shape cannot tell."""
    return isinstance(module, Conv1D)


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """The weight of the target module `name`."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)  # for the type checker: check_targets has seen it
    return weight


def module_shape(module: nn.Module) -> list[int]:
    """[key_size, value_size]."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # for the type checker
    rows, columns = weight.shape
    return [rows, columns] if is_fan_in_fan_out(module) else [columns, rows]


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of target weights and their names.

    Weights are rounded to bfloat16 first, so that the same checkpoint gives the same fingerprint whether it was
    loaded in bfloat16 or float32.

    Args:
        weights: (module name, weight) in a fixed order.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(name.encode())
        rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _matching(model: nn.Module, wanted: Sequence[str] | str) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    if isinstance(wanted, str):
        found = [name for name in names if re.fullmatch(wanted, name)]
        if not found:
            raise ModelMismatchError(f"target_modules={wanted!r}, a regular expression, matches no module name whole.")
        return found
    matches = {entry: [name for name in names if name == entry or name.endswith("." + entry)] for entry in wanted}
    for entry, found in matches.items():
        if not found:
            modules = dict(model.named_modules())
            raise ModelMismatchError(
                f"{type(model).__name__} has no module named {entry!r} or ending in it. "
                f"Linear layers it has: {_some_linear_names(modules)}."
            )
    chosen = {name for found in matches.values() for name in found}
    return [name for name in names if name in chosen]


def _default_targets(model: nn.Module) -> list[str]:
    """The second feed-forward linear of the last blocks: in each, the last linear that narrows the widest features.

    A block is an entry of the longest `nn.ModuleList`. A feed-forward layer widens the hidden state and narrows it
    again, and its second linear is the one with fewer outputs than inputs.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    prefix, blocks = max(lists, key=lambda entry: len(entry[1]), default=("", nn.ModuleList()))
    names = []
    for index in range(max(0, len(blocks) - DEFAULT_N_BLOCKS), len(blocks)):
        narrowing = [
            (name, module)
            for name, module in blocks[index].named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module_shape(module)[0] > module_shape(module)[1]
        ]
        if narrowing:
            widest = max(module_shape(module)[0] for _, module in narrowing)
            name = [name for name, module in narrowing if module_shape(module)[0] == widest][-1]
            names.append(f"{prefix}.{index}.{name}")
    if not names:
        # Packed weights have other shapes, so that no layer seems to narrow anything: say what they are.
        check_targets(model, [name for name, module in model.named_modules() if _quantised_form(model, module)][-1:])
        raise ModelMismatchError(
            f"Found no feed-forward layer in the blocks of {type(model).__name__}. Name the layers to edit with "
            "target_modules, such as ['mlp.down_proj']."
        )
    return names


def _quantised_form(model: nn.Module, module: nn.Module) -> str | None:
    """What a quantised linear layer keeps its weight in; None for any other module."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear | Conv1D) and isinstance(weight, Tensor):
        if weight.dtype not in _EDITABLE_DTYPES:
            return str(weight.dtype)
        # Some keep or claim a floating dtype, and tell by their type.
        return None if type(weight) in (nn.Parameter, Tensor) else type(weight).__name__
    # Others replace nn.Linear by a module of their own.
    is_linear = isinstance(module, nn.Linear) or hasattr(module, "in_features")
    return type(module).__name__ if is_linear and getattr(model, "hf_quantizer", None) is not None else None


def _block_index(name: str) -> int | None:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else None


def _some_linear_names(modules: dict[str, nn.Module]) -> str:
    names = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    return ", ".join(names[-8:]) or "none"
