"""Spread a network's blocks over the GPUs of one machine, for models that are larger than one of them.

accelerate's hooks move the input of each module to where its weights are. What is added here: maps that cannot work are refused
before anything moves, and what body and head return goes back to where input goes, so that nothing else needs to know of several
devices.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import find_tied_parameters, get_balanced_memory, send_to_device
from transformers import PreTrainedModel

from lib.core.errors import require
from lib.models.layers.anatomy import blocks_in

Device = int | str


def over_devices_(
    network: PreTrainedModel, device_map: str | Mapping[str, Device], max_memory: Mapping[Device, int | str] | None = None
) -> None:
    """Move a network from the memory of the CPU to the devices of a map.

    Args:
        network: in evaluation mode.
        device_map: `"auto"`, or the device of each module by name; see `models.load`.
        max_memory: see `models.load`.

    Raises:
        InputError: see `check`.
    """
    chosen = automatic(network, max_memory) if isinstance(device_map, str) else dict(device_map)
    check(network, chosen)
    dispatch(network, chosen)


def check(network: PreTrainedModel, device_map: Mapping[str, Device]) -> None:
    """Refuse a map on which the network could not be computed or its weights not be changed.

    Raises:
        InputError: unknown or missing modules, a divided block, a device that this machine does not have, or weights that would
            not lie where they are used.
    """
    for module, device in device_map.items():
        _check_device(device, where=f"the device of {module or 'all modules'}")
    kinds = {device == "cpu" for device in device_map.values()}
    rule = "weights must lie on the device that computes with them, all on GPUs or all on the CPU"
    remedy = "use more GPUs or a smaller dtype, raise max_memory, or stream the weights"
    require(len(kinds) == 1, rule, f"a map with both, {_list(device_map, 'cpu')} on the CPU", remedy)
    _check_names(network, device_map)
    for names in find_tied_parameters(network):
        places = {_place(device_map, each) for each in names}
        rule = f"{' and '.join(names)} are one matrix and must have one device"
        require(len(places) == 1, rule, ", ".join(sorted(map(str, places))), "give both modules the same device")


def dispatch(network: PreTrainedModel, device_map: Mapping[str, Device]) -> None:
    """Move the modules of a network to their devices, and let data follow.

    Args:
        network: on the CPU.
        device_map: device by name of module, all weights covered.
    """
    # Not a torch.device: accelerate compares it with the word "cpu", and would set aside all weights there.
    home = _place(device_map, f"{_name_of(network, network.get_input_embeddings())}.weight")
    skipped = cast(Any, network)._skip_keys_device_placement  # each block keeps its own part of a cache
    is_divided = len(device_map) > 1
    dispatch_model(network, dict(device_map), main_device=home, skip_keys=skipped, force_hooks=is_divided)
    if is_divided:
        _bring_home(network, torch.device(home), skipped)


def _bring_home(network: PreTrainedModel, home: torch.device, skipped: Any) -> None:
    """Return what body and head compute to the device of the input; accelerate does so for the whole network only."""
    for module in (network.get_decoder(), network.get_output_embeddings()):
        cast(torch.nn.Module, module).register_forward_hook(partial(_send, home, skipped))


def _send(home: torch.device, skipped: Any, _: torch.nn.Module, __: Any, output: Any) -> Any:
    return send_to_device(output, home, skip_keys=skipped)


def check_request(device_map: str | Mapping[str, Device] | None, max_memory: Mapping[Device, int | str] | None = None) -> None:
    """Refuse what can be refused before gigabytes are read.

    Args:
        device_map: as in `models.load`; None where nothing is spread.
        max_memory: as there.

    Raises:
        InputError: neither `"auto"` nor a map, an empty map, a device that this machine does not have, or `max_memory` without
            `"auto"`.
    """
    if device_map is None:
        require(max_memory is None, "max_memory must go with device_map auto", "no device_map", "add it")
        return
    if isinstance(device_map, str):
        require(device_map == "auto", "device_map must be auto, or devices by module", repr(device_map), "use one of these")
        for device in max_memory or ():
            _check_device(device, where="each device of max_memory")
        return
    require(max_memory is None, "max_memory must go with device_map auto", "a map of devices", "leave one of them out")
    require(bool(device_map), "a device map must name modules", "an empty one", "use auto, or {'': 0} for all on the first GPU")
    for module, device in device_map.items():
        _check_device(device, where=f"the device of {module or 'all modules'}")


def _gpus() -> int:
    return torch.cuda.device_count()


def _check_device(device: Device, *, where: str) -> None:
    count = _gpus()
    known = ["cpu", *range(count), *(f"cuda:{number}" for number in range(count))]
    there = f"cpu or a GPU of this machine (it has {count})"
    remedy = "weights on disk cannot be pruned: stream them" if device == "disk" else "name another device"
    require(device in known, f"{where} must be {there}", repr(device), remedy)


def automatic(network: PreTrainedModel, max_memory: Mapping[Device, int | str] | None = None) -> dict[str, Device]:
    """Fill the GPUs evenly, block by block.

    Returns:
        Device by name of module; all on the CPU where this process sees no GPU and no memory is named.
    """
    if max_memory is None and not _gpus():
        return {"": "cpu"}
    whole = list(cast(Any, network)._no_split_modules)
    room = cast(Any, None if max_memory is None else dict(max_memory))
    shares = get_balanced_memory(network, room, no_split_module_classes=whole)
    return dict(cast(Any, infer_auto_device_map(network, shares, no_split_module_classes=whole)))


def _check_names(network: PreTrainedModel, device_map: Mapping[str, Device]) -> None:
    """Check that a map names modules, none of them inside a block, and all weights."""
    known = dict(network.named_modules())
    blocks = [_name_of(network, block) for block in blocks_in(network)]
    for name in device_map:
        require(name in known, "a device map must name modules of the network", repr(name), f"they are such as {blocks[0]}")
        outer = next((block for block in blocks if name.startswith(f"{block}.")), "")
        require(not outer, "a device map must keep decoder blocks whole", repr(name), f"give {outer} a device")
    lost = [name for name in network.state_dict() if _place(device_map, name) is None]
    require(not lost, "a device map must give every weight a device", f"none for {lost[:1]}", "name its module, too")


def _place(device_map: Mapping[str, Device], weight: str) -> Any:
    """Return the device of a weight, that of the smallest named module around it; None where there is none."""
    around = [name for name in device_map if name == "" or weight.startswith(f"{name}.")]
    return device_map[max(around, key=len)] if around else None


def _name_of(network: PreTrainedModel, wanted: object) -> str:
    return next(name for name, module in network.named_modules() if module is wanted)


def _list(device_map: Mapping[str, Device], device: Device) -> str:
    return ", ".join([name for name, place in device_map.items() if place == device][:3])
