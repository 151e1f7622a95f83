"""Tables of rows in ``.npy`` files: mapped, shared by a node's processes, grown without a copy.

A mapped table costs a process address space, not memory: its pages are the system's file cache,
one copy for all who map it. A *grown* table is the same pages with room for more rows behind them.
Pages that are written to become the process's own, the others stay shared, and the file never
changes. So a table of gigabytes can take some new or corrected rows for the price of those rows.
"""

import ctypes
import mmap
import os
import sys
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Table = NDArray[Any]

_MAP_FIXED: Final = 0x10
"""The same number on Linux and macOS; Python's ``mmap`` does not name it."""
_FAILED: Final = ctypes.c_void_p(-1).value
_CAN_GROW: Final = sys.platform in ("linux", "darwin")


def map_table(path: Path) -> Table:
    """A ``.npy`` file as a read-only array; nothing is read until it is asked for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no ``.npy`` file, or it ends too early.
    """
    table = np.asarray(_open(path))  # not np.memmap, whose every view costs microseconds
    table.setflags(write=False)
    return table


def grow_table(path: Path, num_rows: int) -> Table:
    """The same file with ``num_rows`` more rows of zeros behind it; a private, writable array.

    Where the system cannot do that (Windows), a copy.
    """
    mapped = _open(path)
    shape = (len(mapped) + num_rows, *mapped.shape[1:])
    if not _CAN_GROW or not isinstance(mapped, np.memmap):
        table = np.zeros(shape, mapped.dtype)
        table[: len(mapped)] = mapped
        return table
    start = mapped.offset
    count = int(np.prod(shape, dtype=np.int64))
    memory = _private_memory(
        path, file_bytes=start + mapped.nbytes, num_bytes=start + count * mapped.itemsize
    )
    values: Table = np.frombuffer(memory, mapped.dtype, count, offset=start)
    return values.reshape(shape)


def _open(path: Path) -> Table:
    if path.stat().st_size > 128:  # np.save's shortest header; an empty file cannot be mapped
        mapped: Table = np.load(path, mmap_mode="r")
        return mapped
    loaded: Table = np.load(path)
    return loaded


def _private_memory(path: Path, *, file_bytes: int, num_bytes: int) -> memoryview:
    """Address space that begins with the pages of a file; given back when nothing uses it.

    Reserved as anonymous memory first, over whose beginning the file is mapped, copy on write.
    """
    libc = _libc()
    access = mmap.PROT_READ | mmap.PROT_WRITE
    reserve = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    address = libc.mmap(None, num_bytes, access, reserve, -1, 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), f"no address space for {num_bytes} bytes of {path}")
    memory = (ctypes.c_char * num_bytes).from_address(address)
    weakref.finalize(memory, libc.munmap, address, num_bytes)
    file = os.open(path, os.O_RDONLY)
    try:
        placed = libc.mmap(address, file_bytes, access, mmap.MAP_PRIVATE | _MAP_FIXED, file, 0)
    finally:
        os.close(file)
    if placed == _FAILED:
        raise OSError(ctypes.get_errno(), f"{path} cannot be mapped")
    return memoryview(memory).cast("B")


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64),
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc
