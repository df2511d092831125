"""Which blocks of the cache each row reads, on the GPU."""

from collections.abc import Iterable

import torch

from mptserve.engine.gpu.transfer import upload
from mptserve.engine.sequence import Sequence


class BlockTable:
    """table: [slots, blocks] int32, the block numbers of the sequence in each slot, in order; updated as they grow."""

    def __init__(self, n_slots: int, n_blocks: int, device: torch.device) -> None:
        self.table = torch.zeros(n_slots, n_blocks, dtype=torch.int32, device=device)
        # What a slot's line holds: whose blocks, since which preemption, and how many.
        self._written: list[tuple[Sequence | None, int, int]] = [(None, 0, 0)] * n_slots

    def update(self, sequences: Iterable[Sequence]) -> None:
        """Write the blocks that the sequences got since they were last seen."""
        slots: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for seq in sequences:
            owner, preempted, n = self._written[seq.slot]
            known = n if owner is seq and preempted == seq.n_preempted else 0
            new = seq.blocks[known:]
            slots += [seq.slot] * len(new)
            columns += range(known, known + len(new))
            blocks += new
            self._written[seq.slot] = (seq, seq.n_preempted, len(seq.blocks))
        if blocks:
            places = upload(torch.tensor([slots, columns, blocks]), self.table.device)
            self.table[places[0], places[1]] = places[2].to(torch.int32)
