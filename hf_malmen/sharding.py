"""A frozen base model that all processes hold together by FSDP2 or DeepSpeed ZeRO-3, as accelerate is configured.

A block's weights are put together when it runs, on every process, so that all processes run the same passes: they act
as one, with one device's speed and the memory of all. The editor stays whole on each of them.
"""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging

from . import distributed

logger = logging.get_logger(__name__)

_ENGINE = "_zero3_engine"  # DeepSpeed's, kept beside the model whose hooks it serves


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold `model` together."""
    return isinstance(model, FSDPModule) or hasattr(model, _ENGINE)


def place(model: nn.Module, device: torch.device | None = None) -> None:
    """Move `model` to this process's device, or this process's part of it there.

    A model that accelerate has placed already, on several devices or off them, stays where it is. One that is sharded
    is frozen for good: nothing of it requires a gradient.

    Args:
        model: the base model.
        device: of a process that holds all of the model. None: one of several processes goes by accelerate; a process
            alone takes the accelerator, if there is one with room for the weights, unless `ACCELERATE_USE_CPU` is set.

    Raises:
        ValueError: FSDP of the first version, or loading on the first process only; DeepSpeed of another stage than 3,
            or with offloading to disk.
    """
    if not distributed.in_unison():
        if device is None and distributed.n_processes() > 1:
            device = PartialState().device
        if hasattr(model, "_hf_hook"):
            return
        if device is None:
            _to_accelerator(model)
        else:
            nn.Module.to(model, device)
        return
    if is_sharded(model):
        return
    model.requires_grad_(False)
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        _partition(model)
    else:
        _shard(model)
    for name, buffer in model.named_buffers():  # parameters alone are moved
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer.to(PartialState().device))


def _to_accelerator(model: nn.Module) -> None:
    device = torch.accelerator.current_accelerator(check_available=True)
    # Apple's has no float64, in which shifts are solved for and added.
    if device is None or device.type == "mps" or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return
    try:
        nn.Module.to(model, device)
    except torch.OutOfMemoryError:
        nn.Module.to(model, "cpu")  # what has been moved already
        logger.warning(
            f"The base model does not fit the memory of {device}, so that it stays on the CPU, where all takes far "
            'longer. In Python, a model loaded with device_map="auto" uses both; several devices can hold it together '
            "(recipes/accelerate/fsdp.yaml)."
        )


def _shard(model: nn.Module) -> None:
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
        raise ValueError(
            f"accelerate's configuration has fsdp_version {plugin.fsdp_version} and fsdp_cpu_ram_efficient_loading "
            f"{plugin.cpu_ram_efficient_loading}; expected 2 and false: every process loads the base model. See "
            "recipes/accelerate/fsdp.yaml."
        )
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


def _partition(model: nn.Module) -> None:
    import deepspeed  # an extra

    plugin = DeepSpeedPlugin()
    asked = plugin.deepspeed_config["zero_optimization"]
    offload = asked.get("offload_param") or {}
    if asked["stage"] != 3 or offload.get("device") == "nvme":
        raise ValueError(
            f"accelerate's configuration has zero_stage {asked['stage']} and offload_param_device "
            f"{offload.get('device', 'none')}; expected 3, and none or cpu. See "
            "recipes/accelerate/deepspeed_zero3.yaml."
        )
    zero: dict[str, Any] = {"stage": 3}
    # Passes stop half-way and start in the middle: nothing is fetched ahead, or kept for the module that runs next.
    zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
    if offload.get("device") == "cpu":
        zero["offload_param"] = {"device": "cpu"}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    # Weight by weight: left to `initialize`, the whole model would go to the device first.
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    object.__setattr__(model, _ENGINE, engine)  # not as a part of the model, which the engine has as a part


def forget_sharding(state: Any) -> None:
    """Let accelerate take what is trained for whole on each process.

    Args:
        state: of an accelerator.
    """
    shared = PartialState()
    if shared.distributed_type == DistributedType.DEEPSPEED:
        kind = shared.device.type
        shared.distributed_type = DistributedType["MULTI_GPU" if kind == "cuda" else f"MULTI_{kind.upper()}"]
    state.distributed_type = shared.distributed_type
    state.fsdp_plugin = state.deepspeed_plugins = None


def whole(weight: Tensor) -> Tensor:
    """The values of a weight, from all processes where they hold it together; all call it."""
    if _is_partitioned(weight):
        with _gathered(weight):
            return weight.detach().clone()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def shape_of(weight: Tensor) -> torch.Size:
    """The shape of a weight, on all processes together."""
    shape: torch.Size = weight.ds_shape if _is_partitioned(weight) else weight.shape  # type: ignore[attr-defined]
    return shape


def settle(model: nn.Module) -> None:
    """Let go of weights that were put together for a pass, so that what is read and written is what is kept."""
    if hasattr(model, _ENGINE):
        getattr(model, _ENGINE).optimizer.partition_all_parameters()
    elif is_sharded(model):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def copy_of(weight: Tensor) -> Tensor:
    """What `overwrite` takes to put a weight back as it is: under FSDP, this process's part of it."""
    return whole(weight) if _is_partitioned(weight) else weight.detach().clone()


@torch.no_grad()
def overwrite(
    weight: Tensor,
    values: Tensor,  # of the same shape
) -> None:
    """Write `values` into a weight; of one that processes hold together, each writes its part, and all call it."""
    if _is_partitioned(weight):
        with _gathered(weight, modifier_rank=0):
            weight.copy_(values)
    elif isinstance(weight, DTensor) and not isinstance(values, DTensor):
        part = distribute_tensor(values, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.to_local().copy_(part.to_local())
    else:
        weight.copy_(values)


def _is_partitioned(weight: Tensor) -> bool:
    return hasattr(weight, "ds_id")


def _gathered(weight: Tensor, **options: Any) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], **options)
