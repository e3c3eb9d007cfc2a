"""What decoder blocks read between two passes: on the device, in host memory or on disk, a batch at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from lib.core.errors import require
from lib.models.weight_store import StoredTensor, read

States = Literal["device", "cpu", "disk"]


class HiddenStates:
    """What blocks read, by block and number of the batch: on the device, in host memory or on disk.

    Attributes:
        kind: where they are.
        device: where they come back to.
        folder: of the files, one a batch; used on disk only.
    """

    def __init__(self, kind: States, device: torch.device, folder: Path | None = None) -> None:
        self.kind, self.device, self.folder = kind, device, folder
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._stored: dict[tuple[int, int], tuple[StoredTensor, torch.dtype]] = {}

    def put(self, block: int, batch: int, hidden: Float[Tensor, "sample position feature"]) -> None:
        """Keep what a block reads of a batch."""
        if self.folder is None:
            self._kept[block, batch] = hidden if self.kind == "device" else hidden.cpu()
            return
        file = self.folder / f"{block}-{batch}.safetensors"
        save_file({"hidden": hidden.cpu().contiguous()}, file)
        self._stored[block, batch] = StoredTensor(file, "hidden", tuple(hidden.shape)), hidden.dtype

    def get(self, block: int, batch: int) -> Float[Tensor, "sample position feature"]:
        """Return it, on the device."""
        if self.folder is None:
            return self._kept[block, batch].to(self.device)
        stored, dtype = self._stored[block, batch]
        return read(stored, dtype=dtype, device=self.device)

    def move(self, block: int, batch: int, outputs: Float[Tensor, "sample position feature"]) -> None:
        """Keep what a block made of a batch, which the next one reads, and forget what it read."""
        self.drop(block, batch)
        self.put(block + 1, batch, outputs)

    def drop(self, block: int, batch: int) -> None:
        """Forget it."""
        if self.folder is None:
            del self._kept[block, batch]
        else:
            self._stored.pop((block, batch))[0].file.unlink()


@contextmanager
def waiting(kind: States, device: torch.device, scratch: Path | str | None = None) -> Iterator[HiddenStates]:
    """Lend a place for hidden states, and clear it.

    Args:
        kind: where they wait.
        device: where they come back to.
        scratch: where to make a folder for states on disk; that of the system when None. It is removed at the end, also after an
            error.

    Raises:
        InputError: another place, or a scratch folder that is not there.
    """
    require(kind in get_args(States), f"states must be one of {get_args(States)}", repr(kind), "disk takes the least memory")
    if kind != "disk":
        yield HiddenStates(kind, device)
        return
    require(scratch is None or Path(scratch).is_dir(), "scratch must be a folder", str(scratch), "make it or leave it out")
    with TemporaryDirectory(prefix="states-", dir=scratch) as folder:
        yield HiddenStates(kind, device, Path(folder))
