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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from hybridize.errors import UsageError
from hybridize.families import family

FORWARD_METHODS = ("align_targets", "align_loss")
"""What mixers are called by besides `forward`: their parameters have to be there."""


@dataclass(frozen=True)
class Sharding:
    """How models are spread over all processes of the run.

    Attributes:
        device_type: of the processes' devices.
        reshard_after_forward: weights may be freed after the forward pass and gathered again in the backward pass.
    """

    device_type: str
    reshard_after_forward: bool = True

    @torch.no_grad()
    def shard(self, *models: Any) -> None:
        """Spreads causal language models of equal depth in place, mixers and adapters included.

        Their parameters are replaced by DTensors on the device, one layer at a time. They must be equal in all
        processes. A parameter that several of the models hold, as a student and its teacher, stays theirs in common.
        """
        mesh = init_device_mesh(self.device_type, (distributed.get_world_size(),))
        all_layers, whole = [], set()
        for model in models:
            _drop_originals(model)
            adapter = family(model.config.model_type)
            all_layers.append([(adapter.attention(layer), layer) for layer in adapter.layers(model.model)])
            whole |= _parameters_to_keep_whole(model.model, all_layers[-1])
        for alike in zip(*all_layers, strict=True):
            in_common: dict[nn.Parameter, nn.Parameter] = {}  # holds on to what was whole for one layer's time
            for unit in chain.from_iterable(alike):
                _shard_unit(unit, mesh, whole, in_common)
        for model in models:
            fully_shard(model.model, mesh=mesh, ignored_params=whole)
            _settle(model.model)
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


def _shard_unit(
    unit: nn.Module, mesh: DeviceMesh, whole: set[nn.Parameter], in_common: dict[nn.Parameter, nn.Parameter]
) -> None:
    """in_common: by a parameter that was whole, what it became where it was met first; other holders get that too."""
    holders = [
        (module, name, parameter)
        for module in unit.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter not in whole and not is_sharded(parameter)
    ]
    fully_shard(unit, mesh=mesh, ignored_params=whole)
    for name in FORWARD_METHODS:
        if hasattr(unit, name):
            register_fsdp_forward_method(unit, name)
    for module, name, parameter in holders:
        sharded = in_common.setdefault(parameter, getattr(module, name))
        # FSDP looks at what a module holds before it first runs. Parts of uneven size it would copy to pad them.
        if sharded is not getattr(module, name) and parameter.size(0) % mesh.size() == 0:
            setattr(module, name, sharded)


def _drop_originals(model: nn.Module) -> None:
    """Removes what PEFT keeps of modules that are trained in full: it would be gathered with them and never read."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.original_module = nn.Identity()


def _parameters_to_keep_whole(inner: nn.Module, units: Sequence[tuple[nn.Module, nn.Module]]) -> set[nn.Parameter]:
    """units: attention and the layer around it, for each layer."""
    holders = Counter(parameter for attention, _ in units for parameter in set(attention.parameters()))
    in_layers = {parameter for _, layer in units for parameter in layer.parameters()}
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


def keep_gathered(model: Any, wanted: bool) -> None:
    """Lets a sharded model keep what it gathered in the forward pass for the backward pass, or gather it again."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_reshard_after_forward(not wanted, recurse=False)


def gathered_bytes(model: Any) -> int:
    """What a process holds more while everything is gathered that is sharded."""
    missing = ((parameter, parameter.numel() - own_part(parameter).numel()) for parameter in model.parameters())
    return sum(count * parameter.element_size() for parameter, count in missing)


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


def give_gradients(optimizer: torch.optim.Optimizer, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
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
