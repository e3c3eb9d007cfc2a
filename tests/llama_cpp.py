"""llama.cpp itself, by the C interface of the library in the wheel `xllamacpp`: what it computes from a GGUF file.

Its parameter structures are passed as blocks of bytes larger than they are: callee and caller agree on their beginnings alone, of
which the first three numbers are the lengths of context and batches.
"""

import ctypes
import importlib.util
from ctypes import POINTER, Structure, c_char_p, c_float, c_int8, c_int32, c_uint8, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONGEST = 256
Log = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class Parameters(Structure):
    _fields_ = (("lengths", c_uint32 * 3), ("others", c_uint8 * 1012))


class Batch(Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "llama_log_set": (None, Log, c_void_p),
    "llama_backend_init": (None,),
    "llama_model_default_params": (Parameters,),
    "llama_context_default_params": (Parameters,),
    "llama_model_load_from_file": (c_void_p, c_char_p, Parameters),
    "llama_init_from_model": (c_void_p, c_void_p, Parameters),
    "llama_batch_init": (Batch, c_int32, c_int32, c_int32),
    "llama_batch_free": (None, Batch),
    "llama_decode": (c_int32, c_void_p, Batch),
    "llama_get_logits_ith": (POINTER(c_float), c_void_p, c_int32),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_free": (None, c_void_p),
    "llama_model_free": (None, c_void_p),
}
SILENT = Log(lambda *_: None)


def files() -> list[Path]:
    """Return the library of the wheel; nothing where it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    return list(Path(spec.origin).parent.glob("xllamacpp*.so")) if spec is not None and spec.origin is not None else []


@cache
def library() -> ctypes.CDLL:
    """Load the library; it says nothing."""
    found = ctypes.CDLL(str(files()[0]))
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.llama_log_set(SILENT, None)
    found.llama_backend_init()
    return found


def logits(path: Path, ids: list[int]) -> Tensor:
    """Return the logits of every position of one text, attention as the file says."""
    here = library()
    model = here.llama_model_load_from_file(str(path).encode(), here.llama_model_default_params())
    assert model, f"llama.cpp must load {path.name}"
    options = here.llama_context_default_params()
    options.lengths[:] = (LONGEST,) * 3
    context, batch = here.llama_init_from_model(model, options), here.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for index, token in enumerate(ids):
        batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
    assert here.llama_decode(context, batch) == 0
    width = here.llama_vocab_n_tokens(here.llama_model_get_vocab(model))
    rows = torch.tensor([here.llama_get_logits_ith(context, index)[:width] for index in range(len(ids))])
    here.llama_batch_free(batch)
    here.llama_free(context)
    here.llama_model_free(model)
    return rows
