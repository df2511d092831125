"""What the scheduler needs of a KV cache, whatever the device: cpu/slot_cache.py and paged_cache.py.

Both count in blocks of 32 tokens. They reuse only whole blocks that came from a prompt (never generated tokens, whose
keys come from the decode path and may differ in the last bit), and drop the least recently used prefixes when room is
needed. ALiBi has no position in the keys, so a prefix is exact wherever it is reused.
"""

from typing import Protocol

from mptserve.engine.sequence import BLOCK, Sequence


class Cache(Protocol):
    """Room for keys and values, given to sequences."""

    n_blocks: int

    @property
    def n_free_blocks(self) -> int:
        """Blocks that a new sequence could have, cached prefixes given up."""
        ...

    @property
    def n_cached_blocks(self) -> int:
        """Blocks of prefixes that nobody is using."""
        ...

    def matched(self, seq: Sequence) -> int:
        """Return how many blocks `acquire` would reuse now."""
        ...

    def acquire(self, seq: Sequence) -> bool:
        """Give `seq` room for its tokens so far and one more, reusing cached blocks; return False if it must wait."""
        ...

    def extend(self, seq: Sequence, n_tokens: int) -> bool:
        """Give `seq` room for n_tokens; return False if there is none now."""
        ...

    def register(self, seq: Sequence) -> None:
        """Make the prompt blocks that were computed so far findable."""
        ...

    def release(self, seq: Sequence) -> None:
        """Take the room back; registered blocks stay as long as nobody needs it."""
        ...

    def zero(self, seq: Sequence) -> None:
        """Zero and forget what only `seq` wrote: keys that are not numbers must not reach another sequence."""
        ...


def n_blocks_for(n_tokens: int) -> int:
    return -(-n_tokens // BLOCK)


def reusable_keys(seq: Sequence) -> list[bytes]:
    """Return the keys of blocks that may be reused: at least one prompt token is always computed, for its logits."""
    return seq.block_keys[: (seq.n_prompt - 1) // BLOCK]
