"""Weights, gradients and optimiser state in parts, one a process (FSDP2), where one copy a process is too much.

The launcher asks for it (`accelerate launch --use_fsdp --fsdp_version 2`); a recipe does not know of it, and what is
saved is the same, whole tensors by name, so that a run goes on sharded or not, on any number of processes.

The units that are gathered and freed together are the attention or mixer of a layer and the rest of the layer: align
calls mixers by themselves. Some parameters stay whole in every process: those outside of the decoder layers, because
the loss reads both heads whole and at once, so that parts of them would save nothing at the peak, while whole ones
exist once for student and teacher; and those that several units share. Gradients of whole ones are averaged as ever.

The optimiser never sees a DTensor: it changes this process's part in place, which is elementwise mathematics.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from hybridize.errors import UsageError
from hybridize.families import family

FORWARD_METHODS = ("align_targets", "align_loss")
"""What mixers are called by besides `forward`: their parameters have to be there."""


@dataclass(frozen=True)
class Sharding:
    """How a model is spread over all processes of the run.

    Attributes:
        device_type: of the processes' devices.
        reshard_after_forward: gather the weights of a unit again in the backward pass instead of keeping them.
    """

    device_type: str
    reshard_after_forward: bool = True

    @torch.no_grad()
    def shard(self, model: Any) -> None:
        """Spreads a causal language model, mixers and adapters included, in place.

        Its parameters are replaced by DTensors on the device, one unit at a time. They must be equal in all processes.
        """
        inner = model.model
        adapter = family(model.config.model_type)
        layers = list(adapter.layers(inner))
        units = [unit for layer in layers for unit in (adapter.attention(layer), layer)]
        whole = _parameters_to_keep_whole(inner, [adapter.attention(layer) for layer in layers], layers)
        mesh = init_device_mesh(self.device_type, (distributed.get_world_size(),))
        for unit in units:
            fully_shard(unit, mesh=mesh, reshard_after_forward=self.reshard_after_forward, ignored_params=whole)
            for name in FORWARD_METHODS:
                if hasattr(unit, name):
                    register_fsdp_forward_method(unit, name)
        fully_shard(inner, mesh=mesh, ignored_params=whole)
        _settle(inner)
        # The ops return views here and there, and nothing is ever added to one in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)


def requested_sharding(accelerator: Any) -> Sharding | None:
    """What accelerate was configured to do.

    Raises:
        UsageError: it asks for something that does not go with distillation.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or accelerator.num_processes == 1:
        return None
    # accelerate keeps the plugin only where it would use it itself, which is on GPUs.
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UsageError("only the second version of FSDP is supported.", hint="Launch with --fsdp_version 2.")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UsageError("weights are not offloaded to the CPU.", hint="Launch without --fsdp_offload_params.")
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise UsageError("the processes shard in one dimension.", hint="Launch without a parallelism configuration.")
    # transformers would give weights to the first process alone, and leave it to accelerate to hand them on.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return Sharding(accelerator.device.type, bool(plugin.reshard_after_forward))


def _parameters_to_keep_whole(
    inner: nn.Module, attentions: list[nn.Module], layers: list[nn.Module]
) -> set[nn.Parameter]:
    holders = Counter(parameter for attention in attentions for parameter in set(attention.parameters()))
    in_layers = {parameter for layer in layers for parameter in layer.parameters()}
    outside = {parameter for parameter in inner.parameters() if parameter not in in_layers}
    scalars = {parameter for parameter in in_layers if parameter.dim() == 0}  # FSDP has none
    return outside | scalars | {parameter for parameter, count in holders.items() if count > 1}


def _settle(root: Any) -> None:
    """Lets FSDP learn that this is the root.

    It takes the first module that runs for it, which may be a single mixer in align. Here everything that will ever be
    trained asks for gradients, too; FSDP looks once.
    """
    root.settle = lambda argument: argument
    register_fsdp_forward_method(root, "settle")
    root.settle(0)
    del root.settle


# Parts and wholes.


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a process holds a part of it only."""
    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory; all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()  # every process has read it


def sharded_like(part: Tensor, parameter: Tensor) -> Tensor:
    """The tensor of which this process holds a part, sharded as a parameter is; the part if that is not sharded."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, shape=parameter.shape, stride=parameter.stride())


@torch.no_grad()
def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors, on the CPU where they were sharded; all processes have to ask.

    Args:
        keep: whether this process wants them; else it only gives its parts.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor  # one at a time on the device
        if keep:
            found[name] = whole.detach()
    return found


@torch.no_grad()
def own_parameters(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What this process's optimiser changes of each: its part as a parameter of its own, or the parameter itself."""
    return {
        name: nn.Parameter(own_part(parameter).detach(), requires_grad=True) if is_sharded(parameter) else parameter
        for name, parameter in parameters.items()
    }


def connect(optimizer: torch.optim.Optimizer, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Lets an optimiser of own parts find the gradients of the parameters that these are parts of.

    Args:
        pairs: (own part, parameter).
    """
    sharded = [(own, parameter) for own, parameter in pairs if own is not parameter]
    if not sharded:
        return

    def before(*_: Any) -> None:
        for own, parameter in sharded:
            own.grad = None if parameter.grad is None else own_part(parameter.grad)

    def after(*_: Any) -> None:
        for own, parameter in sharded:
            own.grad = parameter.grad = None

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
