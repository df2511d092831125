"""The KV cache of the CPU: one contiguous range of virtual memory for each sequence, which attention reads in place.

A page costs nothing until a token is written to it. A shared prefix is copied, which is hundreds of times cheaper than
computing it.
"""

from mptserve.engine.cache import n_blocks_for, reusable_keys
from mptserve.engine.checkpoint.config import MPTConfig
from mptserve.engine.memory import DONTNEED, advise, virtual_zeros
from mptserve.engine.sequence import BLOCK, Sequence

_SPARE_BLOCKS = 4
"""Blocks beyond its prompt that a new sequence may inherit from its slot's last one: fresh pages cost page faults."""


class SlotCache:
    """Contiguous keys and values per sequence, float32, on the CPU.

    kv: [n_layers, 2, n_slots, H, max_tokens, D]; the 2 is keys, values.  float32 because attention computes in
    it, and bfloat16 would have to be converted for every read.
    k_norms: [n_layers, n_slots, max_tokens / 32, H], the largest norm of a slot's keys up to the end of each block
    (windows.py); kept only where max_tokens is long enough to need it.
    """

    def __init__(self, config: MPTConfig, n_blocks: int, n_slots: int, max_seq_len: int) -> None:
        self.n_blocks, self.n_slots = n_blocks, n_slots
        self.max_tokens = n_blocks_for(max_seq_len) * BLOCK
        shape = (config.n_layers, 2, n_slots, config.n_heads, self.max_tokens, config.head_dim)
        self.kv, self._memory = virtual_zeros(shape)
        n_norms = (config.n_layers, n_slots, self.max_tokens // BLOCK, config.n_heads)
        self.k_norms, self._norms_memory = virtual_zeros(n_norms)
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

    def zero(self, seq: Sequence) -> None:
        """Zero what `seq` wrote: NaN or infinity left behind would reach a later row through masked positions."""
        self._forget(seq.slot)
        self.kv[:, :, seq.slot, :, : self._resident[seq.slot] * BLOCK] = 0

    def _match(self, seq: Sequence) -> tuple[int, int]:
        """Return (slot, blocks) of the longest registered prefix of the prompt; (-1, 0) without one."""
        keys = reusable_keys(seq)
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
        """Drop what `slot` remembers beyond its first `after` blocks; blocks that another slot has stay findable."""
        dropped = self._keys[slot][after:]
        del self._keys[slot][after:]
        for n, key in enumerate(dropped, after):
            if self._slot_of.get(key) == slot:
                del self._slot_of[key]
                for other, keys in enumerate(self._keys):
                    if keys[n : n + 1] == [key]:
                        self._slot_of[key] = other

    def _give_back(self, slot: int) -> None:
        """Return the slot's pages to the system."""
        for layer in range(self.kv.shape[0]):
            for half in range(2):
                advise(self.kv[layer, half, slot], self._slot_bytes, DONTNEED)
        self._resident[slot] = 0
