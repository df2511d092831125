"""The KV cache of GPUs, and of CPUs without the kernels in C: blocks of one pool, and a table of blocks per sequence.

A shared prefix is the same blocks, counted.
"""

from collections import OrderedDict

import torch

from mptserve.engine.cache import n_blocks_for, reusable_keys
from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.sequence import BLOCK, Sequence


class PagedCache:
    """Keys and values in blocks of one pool; sequences hold tables of block numbers, and a slot number each.

    kv: [n_layers, 2, n_blocks, H, 32, D] in the model's dtype or int8.  Block 0 is never handed out: padding points
    there.  scales: [n_layers, 2, n_blocks, H, 32] float32, what int8 is multiplied by; empty for other dtypes.
    kmax: [n_layers, H] int32, the bits of the largest squared norm (float32) of any key so far; see kernels.py.
    """

    def __init__(
        self, config: MPTConfig, n_blocks: int, dtype: torch.dtype, device: torch.device, n_slots: int = 32
    ) -> None:
        self.n_blocks = n_blocks
        shape = (config.n_layers, 2, n_blocks + 1, config.n_heads, BLOCK, config.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        scales = (*shape[:-1], 1) if dtype == torch.int8 else (*shape[:-1], 0)
        self.scales = torch.zeros(scales, device=device).flatten(-2)
        self.kmax = torch.zeros(config.n_layers, config.n_heads, dtype=torch.int32, device=device)
        self._slots = list(range(n_slots - 1, -1, -1))
        self._free = list(range(n_blocks, 0, -1))
        self._users = [0] * (n_blocks + 1)
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # registered blocks without users, oldest first

    @property
    def n_free_blocks(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def n_cached_blocks(self) -> int:
        return len(self._idle)

    def matched(self, seq: Sequence) -> int:
        n = 0
        for key in reusable_keys(seq):
            if key not in self._block_of:
                break
            n += 1
        return n

    def acquire(self, seq: Sequence) -> bool:
        n_match = self.matched(seq)
        shared = [self._block_of[key] for key in seq.block_keys[:n_match]]
        n_new = n_blocks_for(seq.n_tokens + 1) - n_match
        if not self._slots or n_new > self.n_free_blocks - sum(block in self._idle for block in shared):
            return False
        seq.slot = self._slots.pop()
        for block in shared:
            self._idle.pop(block, None)
            self._users[block] += 1
        seq.blocks = shared
        seq.n_computed = seq.n_reused = n_match * BLOCK
        return self.extend(seq, seq.n_tokens + 1)

    def extend(self, seq: Sequence, n_tokens: int) -> bool:
        n_more = n_blocks_for(n_tokens) - len(seq.blocks)
        if n_more > self.n_free_blocks:
            return False
        for _ in range(n_more):
            block = self._free.pop() if self._free else self._evict()
            self._users[block] = 1
            seq.blocks.append(block)
        return True

    def register(self, seq: Sequence) -> None:
        for i in range(min(seq.n_computed, seq.n_prompt) // BLOCK):
            key, block = seq.block_keys[i], seq.blocks[i]
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key], self._key_of[block] = block, key

    def release(self, seq: Sequence) -> None:
        for block in reversed(seq.blocks):  # so that the end of a prefix is evicted before its start
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        seq.blocks = []
        if seq.slot >= 0:
            self._slots.append(seq.slot)
            seq.slot = -1

    def zero(self, seq: Sequence) -> None:
        """Zero the blocks that only `seq` uses: NaN or infinity must not outlive it."""
        for block in seq.blocks:
            if self._users[block] == 1:
                self._forget(block)
                self.kv[:, :, block] = 0
                self.scales[:, :, block] = 0

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
