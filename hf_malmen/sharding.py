"""A frozen base model that all processes hold together: sharded by FSDP2 as accelerate's configuration says.

A block's weights are put together when it runs, on every process, so that all processes run the same passes: they act
as one, with one device's speed and the memory of all. The editor stays whole on each of them.
"""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from . import distributed


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold `model` together."""
    return isinstance(model, FSDPModule)


def place(model: nn.Module) -> None:
    """Move `model` to this process's device, or this process's part of it. Alone, it stays where it is.

    A model that is sharded is frozen for good: nothing of it requires a gradient.

    Raises:
        ValueError: FSDP of the first version, or loading on the first process only.
    """
    if not distributed.in_unison():
        if distributed.n_processes() > 1:
            nn.Module.to(model, PartialState().device)
        return
    if is_sharded(model):
        return
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
        raise ValueError(
            f"accelerate's configuration has fsdp_version {plugin.fsdp_version} and fsdp_cpu_ram_efficient_loading "
            f"{plugin.cpu_ram_efficient_loading}; expected 2 and false: every process loads the base model. See "
            "recipes/accelerate/fsdp.yaml."
        )
    model.requires_grad_(False)
    plugin.set_auto_wrap_policy(model)
    is_block = fsdp2_prepare_auto_wrap_policy(plugin, model)
    state = PartialState()
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(state.device.type, (state.num_processes,)),
        "reshard_after_forward": bool(plugin.reshard_after_forward),
        "offload_policy": plugin.cpu_offload or OffloadPolicy(),
    }
    for module in list(model.modules())[:0:-1]:  # inner ones first, the model itself last
        if is_block is not None and is_block(module):
            fully_shard(module, **settings)
    fully_shard(model, **settings)
    for name, buffer in model.named_buffers():  # parameters alone are moved
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer.to(state.device))


def whole(weight: Tensor) -> Tensor:
    """The values of a weight, from all processes where they hold it together; all call it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def settle(model: nn.Module) -> None:
    """Let go of weights that were put together for a pass, so that what is read and written is what is kept."""
    if is_sharded(model):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def overwrite(
    weight: Tensor,
    values: Tensor,  # of the same shape
) -> None:
    """Write `values` into a weight; of one that processes hold together, each writes its part."""
    if isinstance(weight, DTensor):
        part = distribute_tensor(values, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.to_local().copy_(part.to_local())
    else:
        weight.copy_(values)
