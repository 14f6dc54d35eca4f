"""Which layers an editor edits: names read off the module tree, and what must hold of each."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .configuration import EditorConfig
from .errors import ModelMismatchError
from .sharding import settle, shape_of, whole

logger = logging.get_logger(__name__)

# How many of the last blocks are edited when the user names none (paper, appendix), both sides of an encoder-decoder
# together.
DEFAULT_N_BLOCKS = 6
# How many are edited where a subject is still being read: as many as MEMIT edits in models of 28 to 48 blocks.
N_EARLY_BLOCKS = 5

# Values of a weight that are hashed at a time.
_HASHED_VALUES = 2**22
# Not `is_floating_point`: float8 weights are quantised too, with their scales beside them.
_EDITABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The names and classes of modules that move features between tokens.
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


def plain_model(model: nn.Module) -> nn.Module:
    """The base model itself, without what `torch.compile` and PEFT put around it. Adapters in it stay in force.

    Raises:
        ModelMismatchError: PEFT's prompt learning, which is outside of the base model.
        TypeError: what is given is no model.
    """
    if not isinstance(model, nn.Module):
        got = repr(model) if isinstance(model, str | PathLike) else type(model).__name__
        raise TypeError(
            f"Expected a live model, and got {got}. Load it first: AutoModelForCausalLM.from_pretrained(folder). Of a "
            "pipeline pass pipeline.model."
        )
    plain: Any = getattr(model, "_orig_mod", model)
    if hasattr(plain, "get_base_model"):  # PEFT's
        if getattr(getattr(plain, "active_peft_config", None), "is_prompt_learning", False):
            raise ModelMismatchError(
                f"{type(plain).__name__} puts learned tokens before every prompt, which an edit cannot take into "
                "account. Edit its base model: model.get_base_model()."
            )
        plain = plain.get_base_model()
    return getattr(plain, "_orig_mod", plain)


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module by its name in the base model, whatever `torch.compile` or PEFT wrapped it in.

    A module that stands in two places comes twice. The wrapped layer stands for its adapters, which are left out.
    """
    plain = _unwrapped(model)
    yield prefix, plain
    for name, part in plain._modules.items():  # not `named_children`, which skips repetitions
        if part is not None:
            yield from named_modules(part, f"{prefix}.{name}".lstrip("."))


def target_module(model: nn.Module, name: str) -> nn.Module:
    """The module `name` itself, without the adapters or the compilation around it.

    Raises:
        AttributeError: there is none.
    """
    return _unwrapped(model.get_submodule(name))


def find_targets(model: nn.Module, config: EditorConfig) -> list[str]:
    """Full names of the modules to edit, in the order the model runs them.

    Args:
        model: the base model.
        config: `target_modules` as full names, PEFT-style suffixes, a regular expression matched against the whole
            name, or None for the second feed-forward linear of the last six blocks (of an encoder-decoder: of the last
            three of each side; of a method that edits `"early"` blocks: of five around a fifth of the depth);
            `layers_to_transform` keeps those in some blocks, and with None picks from all.

    Raises:
        ModelMismatchError: nothing matches, or a match cannot be edited.
    """
    wanted_names, layers = config.target_modules, config.layers_to_transform
    if wanted_names is None:
        sides = _second_linears(model)
        if layers is None:
            is_early = config.default_blocks == "early"
            names = [name for side in sides for name in _default_blocks(model, side, is_early, len(sides))]
        else:
            names = [name for side in sides for name in side if name]
    else:
        names = _matching(model, wanted_names)
    if layers is not None:
        kept = {layers} if isinstance(layers, int) else set(layers)
        names = [name for name in names if _block_index(name) in kept]
        if not names:
            raise ModelMismatchError(f"No target module lies in the blocks layers_to_transform={layers!r}.")
    check_targets(model, names)
    return names


def check_targets(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse modules whose weight cannot take a shift.

    Raises:
        ModelMismatchError: missing, not a linear layer, quantised, merged with an adapter, without values, or tied to
            another module; or of a model that scales its weights while it runs.
    """
    if getattr(getattr(model, "config", None), "rescale_every", 0) > 0:  # RWKV's
        raise ModelMismatchError(
            f"{type(model).__name__} divides weights in place when it first runs, so that what is added to them would "
            f"not be what a checkpoint takes. Load it with rescale_every=0, in from_pretrained or config.json."
        )
    modules = dict(named_modules(model))
    holders: dict[int, list[str]] = {}
    for holder, holding in modules.items():
        for parameter_name, parameter in holding.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(f"{holder}.{parameter_name}".lstrip("."))
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
        check_parted(model, name)
        if module.weight.device.type == "meta" and _offloaded(module) is None:
            raise ModelMismatchError(
                f"The weight of {name} is on the meta device, without values. Load the model with from_pretrained; "
                "with device_map, accelerate's hooks know where an offloaded weight is."
            )
        weight = module.weight
        shared = [other for other in holders[id(weight)] if other != f"{name}.weight"]
        if shared:
            raise ModelMismatchError(
                f"{name} shares its weight with {', '.join(shared)}; an edit would change both. Choose another target."
            )


def check_parted(model: nn.Module, name: str) -> None:
    """Refuse to write into a weight that has an adapter merged into it.

    Raises:
        ModelMismatchError: the module `name` has one.
    """
    if getattr(model.get_submodule(name), "merged", False):
        raise ModelMismatchError(
            f"The weight of {name} has an adapter merged into it, which would be lost when the two are parted "
            "again. Part them first (model.unmerge_adapter()), or merge for good (model.merge_and_unload())."
        )


def blocks_of(model: nn.Module, module_names: Sequence[str]) -> tuple[str, list[int]] | None:
    """The one `nn.ModuleList` whose entries hold all of the modules: its name, and the entry of each module.

    None of an encoder-decoder, where what a block of the decoder puts out depends on the encoder too, nor where the
    modules lie elsewhere.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    for name, module in named_modules(model):
        if isinstance(module, nn.ModuleList) and all(target.startswith(f"{name}.") for target in module_names):
            return name, [int(target[len(name) + 1 :].split(".")[0]) for target in module_names]
    return None


def last_block(model: nn.Module, module_names: Sequence[str]) -> str:
    """Name of the last block that one of the modules lies in.

    Raises:
        ModelMismatchError: the modules lie in no blocks, or in those of an encoder-decoder.
    """
    found = blocks_of(model, module_names)
    if found is None:
        raise ModelMismatchError(
            f"{', '.join(module_names)} of {type(model).__name__} lie in no list of blocks that run one after the "
            "other, which this method needs. Choose layers in the blocks of a causal language model."
        )
    name, places = found
    return f"{name}.{max(places)}"


def is_fan_in_fan_out(module: nn.Module) -> bool:
    """Whether the weight is stored as (key_size, value_size). Asked of the module: a square shape cannot tell."""
    return isinstance(module, Conv1D)


def weight_of(model: nn.Module, name: str, *, to_write: bool = False) -> Tensor:
    """The weight of the target module `name`, where its values are.

    An offloaded weight is on the meta device but while its module runs, and accelerate's hook has its values. Those on
    the CPU are returned themselves. Those on disk are read; `to_write` keeps what is read in place of the file, which
    stays as it is, so that writes into it last.
    """
    settle(model)
    module = target_module(model, name)
    weight = module.weight
    assert isinstance(weight, Tensor)  # for the type checker: check_targets has seen it
    values = _offloaded(module)
    if weight.device.type != "meta" or values is None:
        return weight
    stored: Tensor = values["weight"]
    key, source = "weight", values
    if hasattr(source, "prefix"):
        key, source = f"{source.prefix}weight", source.dataset
    if to_write and hasattr(source, "state_dict") and key not in source.state_dict:
        # A copy: what is mapped from a file must not be written.
        stored = source.state_dict[key] = stored.clone()
    return stored


def module_shape(module: nn.Module) -> list[int]:
    """[key_size, value_size]."""
    weight = module.weight
    assert isinstance(weight, Tensor)  # for the type checker
    rows, columns = shape_of(weight)
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
        # A few MB at a time, in memory that is used again: new memory is what takes longest about a copy from a GPU.
        for values in whole(weight).detach().flatten().split(_HASHED_VALUES):
            digest.update(values.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _matching(model: nn.Module, wanted: Sequence[str] | str) -> list[str]:
    modules = dict(named_modules(model))
    names = list(modules)
    if isinstance(wanted, str):
        found = [name for name in names if re.fullmatch(wanted, name)]
        if not found:
            raise ModelMismatchError(f"target_modules={wanted!r}, a regular expression, matches no module name whole.")
        return found
    matches = {entry: [name for name in names if name == entry or name.endswith("." + entry)] for entry in wanted}
    for entry, found in matches.items():
        if not found:
            raise ModelMismatchError(
                f"{type(model).__name__} has no module named {entry!r} or ending in it. "
                f"Linear layers it has: {_some_linear_names(modules)}."
            )
    chosen = {name for found in matches.values() for name in found}
    return [name for name in names if name in chosen]


def _default_blocks(model: nn.Module, linears: Sequence[str | None], is_early: bool, n_sides: int) -> list[str]:
    """Those that are edited by default, of one side's `_second_linears`: in early blocks or in the last ones."""
    names = [name for name in linears if name]
    n_blocks = N_EARLY_BLOCKS if is_early else DEFAULT_N_BLOCKS // n_sides
    if len(names) < min(n_blocks, len(linears)):
        logger.warning(
            f"Only {len(names)} of {len(linears)} blocks of {type(model).__name__} have a feed-forward linear layer "
            f"that every token passes ({', '.join(names) or 'none'}), and by default no others are edited."
            + _suggestion(dict(named_modules(model)))
        )
    first = max(0, round(len(names) / 5) - n_blocks // 2) if is_early else max(0, len(names) - n_blocks)
    return names[first : first + n_blocks]


def _second_linears(model: nn.Module) -> list[list[str | None]]:
    """The second feed-forward linear of every block, or None where it has none; of each side of an encoder-decoder.

    The blocks are the entries of the `nn.ModuleList`, in no other one, where most have it; see `_second_linear`.

    Raises:
        ModelMismatchError: no block has one.
    """
    modules = dict(named_modules(model))
    sides = []
    for side in _sides(model, modules):
        inside = {name: module for name, module in modules.items() if f"{name}.".startswith(f"{side}.".lstrip("."))}
        lists = [name for name, module in inside.items() if isinstance(module, nn.ModuleList)]
        outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        outer = [name for name in outer if not _ATTENTION.search(name.rpartition(".")[2])]  # XLM has a list of them
        found: list[list[str | None]] = []
        for prefix in outer:
            blocks = [f"{prefix}.{index}" for index in inside[prefix]._modules]
            names = [_second_linear(inside[block]) for block in blocks]
            found.append([name and f"{block}.{name}" for block, name in zip(blocks, names, strict=True)])
        sides.append(max(found, key=lambda names: sum(map(bool, names)), default=[]))
    if not any(name for side in sides for name in side):
        # Packed weights have other shapes, so that no layer seems to narrow anything: say what they are.
        check_targets(model, [name for name, module in modules.items() if _quantised_form(model, module)][-1:])
        experts = [name for name, module in modules.items() if _is_fused(module) and not _ATTENTION.search(name)]
        raise ModelMismatchError(
            f"Found no feed-forward linear layer in the blocks of {type(model).__name__}"
            + (f": its feed-forward layers are experts, fused in {experts[-1]} and its like" if experts else "")
            + f".{_suggestion(modules)} Linear layers it has: {_some_linear_names(modules)}."
        )
    return sides


def _suggestion(modules: dict[str, nn.Module]) -> str:
    """What to do where feed-forward layers cannot be edited. The example is attention's last layer."""
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    found = [name for name in reversed(linears) if _ATTENTION.search(name)]
    example = max(found, key=lambda name: name.endswith("o_proj"), default=None)
    named = f", such as {['.'.join(example.split('.')[-2:])]}" if example else ""
    return f" Name the layers to edit with target_modules{named}."


def _sides(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Names of the parts whose blocks are edited: an encoder and a decoder, or what reads the text beside images.

    "", the whole model, where transformers knows no such part, or the part holds no blocks.
    """
    known: Any = model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        parts = [known.get_encoder(), known.get_decoder()]
    else:
        parts = [known.get_decoder()] if hasattr(model, "get_decoder") else []
    parts = [_unwrapped(part) for part in parts]
    holding = [part for part in parts if any(isinstance(module, nn.ModuleList) for module in part.modules())]
    return [next(name for name, module in modules.items() if module is part) for part in holding] or [""]


def _second_linear(block: nn.Module) -> str | None:
    """Name of the second feed-forward linear of `block`: what writes back the features that the first one reads.

    Looked for outside of attention and of lists of experts. Of several, such as those of a low-rank branch, the one
    that reads the most features; of equals, as in a square layer whose gate has the same shape, the last.
    """
    shapes = {name: module_shape(module) for name, module in _feed_forward_linears(block)}
    read = next((key_size for key_size, _ in shapes.values()), None)
    writing = [name for name, (_, value_size) in shapes.items() if value_size == read]
    return max(reversed(writing), key=lambda name: shapes[name][0], default=None)


def _feed_forward_linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linear layers of a block that work on each token alone, and on every token."""
    for child_name, wrapped in module._modules.items():
        if wrapped is None:
            continue
        child = _unwrapped(wrapped)
        is_container = isinstance(child, nn.ModuleList | nn.ModuleDict)
        # Not the dropout that some keep beside their experts. T5 keeps attention and feed-forward layer in a list.
        kinds = {type(entry) for entry in child.children() if next(entry.parameters(), None) is not None}
        if (is_container and len(kinds) == 1) or _ATTENTION.search(f"{child_name} {type(child).__name__}"):
            continue
        name = f"{prefix}.{child_name}".lstrip(".")
        if isinstance(child, nn.Linear | Conv1D):
            yield name, child
        else:
            yield from _feed_forward_linears(child, name)


def _quantised_form(model: nn.Module, module: nn.Module) -> str | None:
    """What a quantised linear layer keeps its weight in; None for any other module."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear | Conv1D) and isinstance(weight, Tensor):
        if weight.dtype not in _EDITABLE_DTYPES:
            return str(weight.dtype)
        # Some keep or claim a floating dtype, and tell by their type.
        return None if type(weight) in (nn.Parameter, Tensor, DTensor) else type(weight).__name__
    # Others replace nn.Linear by a module of their own.
    is_linear = isinstance(module, nn.Linear) or hasattr(module, "in_features")
    return type(module).__name__ if is_linear and getattr(model, "hf_quantizer", None) is not None else None


def _unwrapped(module: nn.Module) -> nn.Module:
    """What `torch.compile` or a PEFT layer wraps."""
    wrapped: Any = getattr(module, "_orig_mod", module)
    return wrapped.get_base_layer() if hasattr(wrapped, "get_base_layer") else wrapped


def _offloaded(module: nn.Module) -> Any:
    """The mapping from which accelerate's hook takes the values of an offloaded module, or None."""
    return getattr(getattr(module, "_hf_hook", None), "weights_map", None)


def _is_fused(module: nn.Module) -> bool:
    """Whether the module holds the weights of several experts as one."""
    is_convolution = isinstance(module, nn.modules.conv._ConvNd)
    return not is_convolution and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def _block_index(name: str) -> int | None:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else None


def _some_linear_names(modules: dict[str, nn.Module]) -> str:
    names = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    return ", ".join(names[-8:]) or "none"
