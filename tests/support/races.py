"""Triton launches in the interpreter: runs their programs in other orders, and records what each reads and writes.

On a GPU the programs of a launch run at once and in any order. The interpreter runs them one after the other in the
order of the grid, so it does not show that a program reads what another one writes.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

Program = tuple[int, int, int]


def _shuffled(seed: int) -> Callable[[list[Program]], list[Program]]:
    return lambda programs: random.Random(seed).sample(programs, len(programs))


ORDERS: dict[str, Callable[[list[Program]], list[Program]]] = {
    "natural": lambda programs: programs,
    "reversed": lambda programs: programs[::-1],
    "first of the last axis last": lambda programs: sorted(programs, key=lambda p: p[2] == 0),
    **{f"shuffled {seed}": _shuffled(seed) for seed in range(3)},
}
"""Orders of a launch's programs, given in grid order. The last axis of decode_attention is its splits."""


@contextmanager
def ordered(order: str) -> Iterator[None]:
    """Run the programs of launches in the named order."""
    builder = interpreter.interpreter_builder
    set_index = builder.set_grid_idx
    known: dict[Program, list[Program]] = {}

    def set_other_index(x: int, y: int, z: int) -> None:
        grid = builder.grid_dim
        if grid not in known:
            known[grid] = ORDERS[order](list(product(*map(range, grid))))
        set_index(*known[grid][(x * grid[1] + y) * grid[2] + z])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", set_other_index)
        yield


class Watched:
    """The memory accesses of launches, by kernel and argument.

    read, written: the arguments that each kernel read and wrote.  raced: (kernel, argument) where one program read what
    another one of the same launch wrote, whatever the order.  written_twice: where several programs wrote one element,
    other than by atomics.
    """

    def __init__(self) -> None:
        self.read: dict[str, set[str]] = defaultdict(set)
        self.written: dict[str, set[str]] = defaultdict(set)
        self.raced: set[tuple[str, str]] = set()
        self.written_twice: set[tuple[str, str]] = set()
        self._accesses: dict[str, list[tuple[np.ndarray, int]]] = defaultdict(list)

    def note(self, kind: str, pointers: Any, mask: Any) -> None:
        """kind: "read", "written" or "atomic"."""
        (_, ny, nz), (x, y, z) = interpreter.interpreter_builder.grid_dim, interpreter.interpreter_builder.grid_idx
        addresses, live = np.broadcast_arrays(pointers.data, mask.data)
        self._accesses[kind].append((addresses[live], (x * ny + y) * nz + z))

    def end(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        """Evaluate the accesses of the launch that has just ended."""
        read, atomic, written = (_joined(self._accesses[kind]) for kind in ("read", "atomic", "written"))
        self._accesses.clear()
        changed = np.concatenate((atomic, written), axis=1)
        addresses, at = np.unique(changed[0], return_inverse=True)
        first, last = np.full(len(addresses), np.iinfo(np.int64).max), np.full(len(addresses), -1)
        np.minimum.at(first, at, changed[1])
        np.maximum.at(last, at, changed[1])
        reads = read[:, np.isin(read[0], addresses)]
        writer = np.searchsorted(addresses, reads[0])
        raced = reads[0][(first[writer] != reads[1]) | (last[writer] != reads[1])]
        pairs = np.unique(written, axis=1)[0]  # one of each (element, program)
        twice = pairs[:-1][pairs[1:] == pairs[:-1]]
        for name, tensor in tensors.items():
            tensor_addresses = _addresses(tensor)
            if np.isin(tensor_addresses, read[0]).any():
                self.read[kernel].add(name)
            if np.isin(tensor_addresses, changed[0]).any():
                self.written[kernel].add(name)
            if np.isin(tensor_addresses, raced).any():
                self.raced.add((kernel, name))
            if np.isin(tensor_addresses, twice).any():
                self.written_twice.add((kernel, name))


def _joined(accesses: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """Return [2, n] int64: addresses of elements, and the programs."""
    parts = [np.stack((a.astype(np.int64), np.full(len(a), program))) for a, program in accesses]
    return np.concatenate([np.empty((2, 0), np.int64), *parts], axis=1)


def _addresses(tensor: torch.Tensor) -> np.ndarray:
    at = torch.zeros(tensor.shape, dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        at += (torch.arange(size) * stride).view(-1, *[1] * (tensor.dim() - axis - 1))
    addresses: np.ndarray = (at * tensor.element_size() + tensor.data_ptr()).flatten().numpy()
    return addresses


@contextmanager
def watched() -> Iterator[Watched]:
    """Record every element that launches read and write."""
    builder, record = interpreter.interpreter_builder, Watched()
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    run = interpreter.GridExecutor.__call__

    def noted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        record.note("read", pointers, mask)
        return load(pointers, mask, *rest)

    def noted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record.note("written", pointers, mask)
        return store(pointers, value, mask, *rest)

    def noted_atomic(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record.note("atomic", pointers, mask)
        return atomic(operation, pointers, value, mask, *rest)

    def noted_run(self: Any, *args: Any, **kwargs: Any) -> None:
        run(self, *args, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        record.end(self.fn.__name__, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", noted_load)
        patch.setattr(builder, "create_masked_store", noted_store)
        patch.setattr(builder, "create_atomic_rmw", noted_atomic)
        patch.setattr(interpreter.GridExecutor, "__call__", noted_run)
        yield record
