"""Keys and values of every token in flight, in blocks, with reuse of prompt prefixes.

Two stores with the same five methods, because the two kinds of memory differ:

- `SlotCache` (CPU) gives every sequence one contiguous range, so that attention reads it in place, without gathering.
  The ranges are virtual memory: a page costs nothing until a token is written to it. A shared prefix is copied, which
  is hundreds of times cheaper than computing it.
- `PagedCache` (GPU) hands out blocks of one pool; a shared prefix is the same blocks, counted.

Both count in blocks of 32 tokens, reuse only whole blocks that came from a prompt (never generated tokens, whose keys
come from the decode path and may differ in the last bit), and drop the least recently used prefixes when room is
needed. ALiBi has no position in the keys, so a prefix is exact wherever it is reused.

    acquire(seq)      room for its tokens so far and one more, reusing what is there; False: not now
    extend(seq, n)    room for n tokens; False: not now
    register(seq)     make the prompt blocks computed so far findable
    release(seq)      give the room back, keeping registered blocks as long as nobody needs it
    matched(seq)      blocks that acquire would reuse now
"""

import mmap
import sys
from collections import OrderedDict

import torch
from torch import Tensor

from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.memory import DONTNEED, NOHUGEPAGE, advise
from mptserve.engine.sequence import BLOCK, Sequence
from mptserve.errors import DoesNotFit

_MAP_NORESERVE = 0x4000  # from Linux's <mman.h>


_SPARE_BLOCKS = 4
"""Blocks beyond its prompt that a new sequence may inherit from its slot's last one: fresh pages cost page faults."""


def n_blocks_for(n_tokens: int) -> int:
    return -(-n_tokens // BLOCK)


def reusable(seq: Sequence) -> list[bytes]:
    """Return the keys of blocks that may be reused: at least one prompt token is always computed, for its logits."""
    return seq.block_keys[: (seq.n_prompt - 1) // BLOCK]


class SlotCache:
    """Contiguous keys and values per sequence, float32, on the CPU.

    kv: [n_layers, 2, n_slots, H, max_tokens, D]; the 2 is keys, values.  float32 because PyTorch's CPU attention reads
    it more than twice as fast as bfloat16, although it is twice the bytes.
    k_norms: [n_layers, n_slots, max_tokens / 32, H], the largest norm of a slot's keys up to the end of each block
    (windows.py); kept only where max_tokens is long enough to need it.
    """

    def __init__(self, config: MPTConfig, n_blocks: int, n_slots: int, max_seq_len: int) -> None:
        self.n_blocks, self.n_slots = n_blocks, n_slots
        self.max_tokens = n_blocks_for(max_seq_len) * BLOCK
        shape = (config.n_layers, 2, n_slots, config.n_heads, self.max_tokens, config.head_dim)
        self.kv, self._memory = _virtual_zeros(shape)
        n_norms = (config.n_layers, n_slots, self.max_tokens // BLOCK, config.n_heads)
        self.k_norms, self._norms_memory = _virtual_zeros(n_norms)
        self._slot_bytes = self.kv[0, 0, 0].numel() * 4
        self._resident = [0] * n_slots  # blocks of real memory that a slot holds
        self._keys: list[list[bytes]] = [[] for _ in range(n_slots)]  # registered blocks of a slot, in order
        self._owner: list[Sequence | None] = [None] * n_slots
        self._last_used = [0] * n_slots
        self._clock = 0
        self._slot_of: dict[bytes, int] = {}

    @property
    def n_free_blocks(self) -> int:
        """Blocks that a new sequence could have, cached prefixes given up."""
        held = sum(r for r, owner in zip(self._resident, self._owner, strict=True) if owner is not None)
        return self.n_blocks - held

    @property
    def n_cached_blocks(self) -> int:
        """Blocks of prefixes that nobody is using."""
        return sum(len(k) for k, owner in zip(self._keys, self._owner, strict=True) if owner is None)

    def matched(self, seq: Sequence) -> int:
        return self._match(seq)[1]

    def acquire(self, seq: Sequence) -> bool:
        source, n_match = self._match(seq)
        idle = [i for i, owner in enumerate(self._owner) if owner is None]
        need = n_blocks_for(seq.n_tokens + 1)
        if not idle or need > self.n_free_blocks:
            return False
        others = [i for i in idle if i != source]
        tight = not others or need > self.n_free_blocks - self._resident[source]
        if source in idle and (tight or len(self._keys[source]) == n_match):
            slot = source  # go on in place: nothing else is remembered there, or there is no room for a copy
            self._forget(slot, after=n_match)
        else:
            slot = min(others, key=lambda i: (bool(self._keys[i]), self._last_used[i] if self._keys[i] else i))
            self._forget(slot)
            if self._resident[slot] > need + _SPARE_BLOCKS:
                self._give_back(slot)
        self._owner[slot], seq.slot = seq, slot
        grown = self._grow(slot, need, keep=source)
        assert grown, "acquire counted blocks that are not there"
        if n_match and slot != source:
            n = n_match * BLOCK
            self.kv[:, :, slot, :, :n].copy_(self.kv[:, :, source, :, :n])
            self.k_norms[:, slot, :n_match].copy_(self.k_norms[:, source, :n_match])
            self._remember(slot, seq.block_keys[:n_match])
            self._touch(source)
        seq.n_computed = seq.n_reused = n_match * BLOCK
        return True

    def extend(self, seq: Sequence, n_tokens: int) -> bool:
        return self._grow(seq.slot, n_blocks_for(n_tokens))

    def register(self, seq: Sequence) -> None:
        n_full = min(seq.n_computed, seq.n_prompt) // BLOCK
        self._remember(seq.slot, seq.block_keys[len(self._keys[seq.slot]) : n_full])

    def release(self, seq: Sequence) -> None:
        if seq.slot >= 0:
            self._owner[seq.slot] = None
            self._touch(seq.slot)
            seq.slot = -1

    def wipe(self, seq: Sequence) -> None:
        """Zero what `seq` wrote: NaN or infinity left behind would reach a later row through masked positions."""
        self._forget(seq.slot)
        self.kv[:, :, seq.slot, :, : self._resident[seq.slot] * BLOCK] = 0

    def _match(self, seq: Sequence) -> tuple[int, int]:
        """Return (slot, blocks) of the longest registered prefix of the prompt; (-1, 0) without one."""
        keys = reusable(seq)
        for n in range(len(keys), 0, -1):
            slot = self._slot_of.get(keys[n - 1], -1)
            if slot >= 0:
                return slot, n
        return -1, 0

    def _grow(self, slot: int, n_blocks: int, keep: int = -1) -> bool:
        """Let `slot` hold n_blocks of real memory, forgetting idle prefixes (but not slot `keep`'s) as needed."""
        more = n_blocks - self._resident[slot]
        if more <= 0:
            return True
        free = self.n_blocks - sum(self._resident)
        idle = [i for i, o in enumerate(self._owner) if o is None and self._resident[i] and i != keep]
        for victim in sorted(idle, key=self._last_used.__getitem__):
            if free >= more:
                break
            free += self._resident[victim]
            self._forget(victim)
            self._give_back(victim)
        if free < more:
            return False
        self._resident[slot] = n_blocks
        return True

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._last_used[slot] = self._clock

    def _remember(self, slot: int, keys: list[bytes]) -> None:
        for key in keys:
            self._keys[slot].append(key)
            self._slot_of[key] = slot

    def _forget(self, slot: int, after: int = 0) -> None:
        """Drop what `slot` remembers beyond its first `after` blocks."""
        for key in self._keys[slot][after:]:
            if self._slot_of.get(key) == slot:
                del self._slot_of[key]
        del self._keys[slot][after:]

    def _give_back(self, slot: int) -> None:
        """Return the slot's pages to the system."""
        for layer in range(self.kv.shape[0]):
            for half in range(2):
                advise(self.kv[layer, half, slot], self._slot_bytes, DONTNEED)
        self._resident[slot] = 0


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
        for key in reusable(seq):
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

    def wipe(self, seq: Sequence) -> None:
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


def _virtual_zeros(shape: tuple[int, ...]) -> tuple[Tensor, mmap.mmap]:
    """Return a float32 tensor of zeros that takes real memory only page by page as it is written, and its mapping."""
    n_bytes = torch.Size(shape).numel() * 4
    lazily = _MAP_NORESERVE if sys.platform == "linux" else 0
    try:
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | lazily)
    except OSError as exc:
        raise DoesNotFit(
            f"cannot reserve {n_bytes / 1e9:.1f} GB of address space for the KV cache ({exc}); "
            "lower MPT_MAX_ROWS or MPT_MAX_SEQ_LEN"
        ) from exc
    tensor = torch.frombuffer(memory, dtype=torch.float32).view(shape)
    # Huge pages would make a short sequence occupy 2 MB per head, and our count of blocks a lie.
    advise(tensor, n_bytes, NOHUGEPAGE)
    return tensor, memory
