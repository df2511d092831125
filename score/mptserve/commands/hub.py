"""A checkpoint by its name on the Hugging Face Hub: the folder of files that its cache keeps, fetched where they miss.

For commands on one's own machine; a server is given a folder. Only weights, configuration and tokenizer are fetched,
never code. The hub's own variables hold: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import re
from pathlib import Path

from mptserve.errors import ModelNotFound

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ABOUT = ["*.json", "LICENSE*", "NOTICE*"]
_WEIGHTS = ["*.safetensors"], ["*.bin"]
"""In the order of preference: most mirrors have both, and one is enough."""


def is_hub_name(model: str) -> bool:
    """Whether `model` can only be a name on the hub: OWNER/NAME, and no path that is there."""
    return _NAME.fullmatch(model) is not None and not Path(model).exists()


def fetch(name: str, revision: str | None = None) -> Path:
    """Return the folder with the checkpoint `name`, downloading what the cache lacks, with progress bars.

    revision: a branch, tag or commit; the main branch when left out. Raises ModelNotFound, saying why.
    """
    from huggingface_hub import snapshot_download  # takes half a second

    for weights in _WEIGHTS:
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_ABOUT, *weights]))
        except (OSError, ValueError) as exc:  # the hub's errors are among them: not there, not for you, not reached
            reason = " ".join(str(exc).split()) or type(exc).__name__
            gone = " (MosaicML's own models left the hub: name a mirror)" if name.startswith("mosaicml/") else ""
            raise ModelNotFound(
                f"{name!r} is no folder here, and the hub gave no checkpoint of that name{gone}: {reason}"
            ) from exc
        if any(folder.glob(weights[0])):
            return folder
    raise ModelNotFound(f"{name!r} on the hub has no *.safetensors and no *.bin")
