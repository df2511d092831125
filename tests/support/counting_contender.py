"""A benchmark contender without imports: it counts up from the last token of each prompt."""

from pathlib import Path
from typing import Any


def by_counting(folder: Path, dtype: str, greedy: bool) -> Any:
    """dtype: "noisy" prints while it loads and generates; "short" omits a token; "broken" fails to load."""
    if dtype == "broken":
        raise ValueError("cannot load")
    if dtype == "noisy":
        print("loading", (folder / "config.json").exists(), greedy)

    def generate(prompts: list[list[int]], n_new: int, _: bool, on_token: Any) -> list[list[int]]:
        if dtype == "noisy":
            print("{}")
        outputs: list[list[int]] = [[] for _ in prompts]
        for i in range(1, n_new + (dtype != "short")):
            for row, prompt in enumerate(prompts):
                outputs[row].append(prompt[-1] + i)
                on_token(row)
        return outputs

    return generate
