"""Matrices that are read from safetensors files when they are used, as many in memory as a budget allows; changes are kept."""

import sys
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lib.core.errors import InputError

HELD_BY_STORE = 2  # references that sys.getrefcount sees of a tensor which the store alone holds


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: a safetensors file, its name there, its shape, and which rows of the stored one it is."""

    file: Path
    key: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None  # all when None


class StreamedWeight(torch.nn.Parameter):
    """A weight that may be written to its file again: writes through `data` are counted as all others are."""

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The tensor outside of autograd; unlike torch's own `data` it shares the counter of writes."""
        return self.detach()


class WeightStore:
    """Matrices of a checkpoint by name, as many in memory as a budget allows.

    A tensor that other code still holds stays: dropping it would free nothing, and later writes to it would be lost.

    Attributes:
        budget: bytes that may be in memory. The tensor in use always is, whatever its size.
        resident_bytes: bytes in memory now.
        bytes_read: bytes read from files so far, in the dtype of the model.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        budget: int,
        scratch: Path | None = None,
    ) -> None:
        self._stored, self._dtype, self._device = dict(stored), dtype, device
        self._resident: OrderedDict[str, StreamedWeight] = OrderedDict()  # the least recently used first
        self._unchanged: dict[str, int] = {}  # torch's counter of writes at the time a tensor was read
        # held by the store, so that the folder goes when the model does
        self._scratch = tempfile.TemporaryDirectory(prefix="weights-", dir=scratch)
        self.budget, self.resident_bytes, self.bytes_read = budget, 0, 0

    def get(self, name: str) -> StreamedWeight:
        """Return a tensor, reading it when it is not in memory."""
        if name not in self._resident:
            size = self._dtype.itemsize * torch.Size(self._stored[name].shape).numel()
            self._make_room(size)
            # an inference tensor would not count its writes
            with torch.inference_mode(False):
                weight = StreamedWeight(read(self._stored[name], dtype=self._dtype, device=self._device), requires_grad=False)
            self._resident[name], self._unchanged[name] = weight, weight._version
            self.resident_bytes += size
            self.bytes_read += size
        self._resident.move_to_end(name)
        return self._resident[name]

    def _make_room(self, size: int) -> None:
        for name in list(self._resident):
            if self.resident_bytes + size <= self.budget:
                return
            if sys.getrefcount(self._resident[name]) <= HELD_BY_STORE:
                self._drop(name)

    def _drop(self, name: str) -> None:
        weight = self._resident.pop(name)
        self.resident_bytes -= weight.nbytes
        if weight._version != self._unchanged.pop(name):
            file = Path(self._scratch.name) / f"{name}.safetensors"
            save_file({name: weight.detach().cpu()}, file)
            self._stored[name] = StoredTensor(file, name, tuple(weight.shape))

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise InputError("a streamed model must not be copied, got copy.deepcopy: load it twice, or with models.load")


class StreamedLinear(torch.nn.Linear):
    """A linear layer that fetches its weight from a store at every use; its parameter only tells shape and dtype."""

    store: WeightStore
    key: str

    @property
    def weight(self) -> StreamedWeight:  # type: ignore[override]
        """The matrix, to be read or changed in place."""
        return self.store.get(self.key)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise InputError(f"{self.key} must be changed in place, got another tensor in its place: use weight.copy_(...)")
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        raise InputError(f"{self.key} must be changed in place, got load_state_dict: use weight.copy_(...)")


def read(stored: StoredTensor, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Read one tensor into memory of its own; the file is closed again, so that none of its pages count as memory in use."""
    with safe_open(stored.file, framework="pt") as file:
        found = file.get_tensor(stored.key) if stored.rows is None else file.get_slice(stored.key)[slice(*stored.rows)]
        return found.to(device=device, dtype=dtype, copy=True)


def mapped(stored: StoredTensor) -> Tensor:
    """Return one whole tensor in the dtype of its file, whose pages are read when they are looked at."""
    with safe_open(stored.file, framework="pt") as file:
        return file.get_tensor(stored.key)
