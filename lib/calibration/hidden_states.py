"""What decoder blocks read between two passes: on the device, in host memory or on disk, a batch at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from lib.core.errors import require
from lib.models.language_model import LanguageModel, network_body
from lib.models.layers.anatomy import blocks_in
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

    def rows(self, block: int, batch: int, tokens: Int[Tensor, "row"]) -> Float[Tensor, "row feature"]:
        """Return some of its tokens, by their flat numbers, on the device."""
        if self.folder is None:
            kept = self._kept[block, batch].flatten(0, 1)
            return kept[tokens.to(kept.device)].to(self.device)
        return self.get(block, batch).flatten(0, 1)[tokens.to(self.device)]

    def drop(self, block: int, batch: int) -> None:
        """Forget it, if it is there."""
        self._kept.pop((block, batch), None)
        if (block, batch) in self._stored:
            self._stored.pop((block, batch))[0].file.unlink()


def check_states(kind: str) -> None:
    """Raise `InputError` unless hidden states may wait there."""
    require(kind in get_args(States), f"states must be one of {get_args(States)}", repr(kind), "disk takes the least memory")


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
    check_states(kind)
    if kind != "disk":
        yield HiddenStates(kind, device)
        return
    require(scratch is None or Path(scratch).is_dir(), "scratch must be a folder", str(scratch), "make it or leave it out")
    with TemporaryDirectory(prefix="states-", dir=scratch) as folder:
        yield HiddenStates(kind, device, Path(folder))


class ReachedError(Exception):
    """Raised by a hook to stop a forward pass at the module that was wanted."""


def first_inputs(
    model: LanguageModel, ids: Int[Tensor, "sample position"], states: HiddenStates, batch_size: int
) -> list[dict[str, Any]]:
    """Put what the first block reads, batch by batch, where hidden states wait.

    Returns:
        The other arguments of the first block by batch: the same for all blocks, and but for the mask for all batches.
    """
    options: list[dict[str, Any]] = []
    numbers = iter(range(len(ids)))

    def stop(_: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Keep what the first block is given, and end the pass there."""
        states.put(0, next(numbers), arguments[0])
        named = named | dict(zip(("attention_mask",), arguments[1:], strict=False))  # an encoder's has no name
        before = options[-1] if options else named
        mask, kept = named.get("attention_mask"), before.get("attention_mask")
        is_same = mask is None or kept is None or (mask.shape == kept.shape and torch.equal(mask, kept))
        options.append(before if is_same else {**before, "attention_mask": mask})
        raise ReachedError

    first = blocks_in(model.network)[0]
    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in ids.split(batch_size):
            with suppress(ReachedError):
                network_body(model)(input_ids=batch.to(model.device), use_cache=False)
    finally:
        handle.remove()
    return options
