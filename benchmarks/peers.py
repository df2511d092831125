"""Other ways to run MPT, for the benchmarks to measure beside the engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Generate = Callable[[list[list[int]], int, bool], None]
"""(prompts, all of one length; new tokens of each, no fewer; with a KV cache): waits until all are there."""


def by_transformers(folder: Path, dtype: str, device: str = "cpu") -> Generate:
    """Return `transformers` on the checkpoint in `folder`, sampling with temperature 0.5 and top_p 0.5."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    loaded: Any = transformers.MptForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = loaded.to(device).eval()

    def generate(prompts: list[list[int]], n_new: int, use_cache: bool) -> None:
        with torch.inference_mode():
            ids = torch.tensor(prompts, device=device)
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=n_new,
                max_new_tokens=n_new,
                do_sample=True,
                temperature=0.5,
                top_p=0.5,
                use_cache=use_cache,
                pad_token_id=0,
            )

    return generate
