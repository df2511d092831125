"""Downloads a checkpoint from the Hugging Face Hub by its name, into the hub's cache.

Only for commands on a user's machine; servers need a folder. It downloads weights, configuration and tokenizer, never
code. The hub's environment variables apply: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import re
from pathlib import Path

from mptserve.errors import ModelNotFound

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ABOUT = ["*.json", "LICENSE*", "NOTICE*"]
_WEIGHTS = ["*.safetensors"], ["*.bin"]
"""In order of preference. Most repositories have both formats, and one is enough."""


def is_hub_name(model: str) -> bool:
    """Whether `model` is a name on the hub: it has the form OWNER/NAME and is not an existing path."""
    return _NAME.fullmatch(model) is not None and not Path(model).exists()


def fetch(name: str, revision: str | None = None) -> Path:
    """Return the cache folder of the checkpoint `name`; download missing files, with progress bars.

    revision: a branch, tag or commit; None: the main branch. Raises ModelNotFound with the reason.
    """
    from huggingface_hub import snapshot_download  # the import takes half a second

    for weights in _WEIGHTS:
        try:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*_ABOUT, *weights]))
        except (OSError, ValueError) as exc:  # the hub's errors are subclasses: not found, no access, not reachable
            reason = " ".join(str(exc).split()) or type(exc).__name__
            gone = (
                " (MosaicML's own models are no longer on the hub: use a mirror)"
                if name.startswith("mosaicml/")
                else ""
            )
            raise ModelNotFound(
                f"{name!r} is not a local folder, and its download from the hub failed{gone}: {reason}"
            ) from exc
        if any(folder.glob(weights[0])):
            return folder
    raise ModelNotFound(f"{name!r} on the hub has no *.safetensors and no *.bin")
