"""A process of the parallel driver: loads the scoring script by its path, then runs commands from standard input.

    python parallel_worker.py REPLY_FD SCRIPT [further arguments, as Azure's driver adds some]

Each command and each reply is a line of JSON. Replies go to a separate descriptor, so the script may print freely.
"""

import importlib.util
import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    reply = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")

    def say(**message: Any) -> None:
        reply.write(json.dumps(message) + "\n")
        reply.flush()

    try:
        script = load(sys.argv[2])
        script.init()
    except BaseException as exc:
        traceback.print_exc()
        say(error=f"init() failed: {type(exc).__name__}: {exc}")
        return
    say(ready=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "shutdown":
            getattr(script, "shutdown", lambda: None)()
            say(done=True)
            return
        try:
            say(rows=returned(script.run(command["files"])))
        except Exception as exc:
            traceback.print_exc()
            say(error=f"run() failed: {type(exc).__name__}: {exc}")


def load(path: str) -> Any:
    """Return the script as a module that is not in sys.modules, as Azure loads it."""
    spec = importlib.util.spec_from_file_location("scoring_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def returned(value: Any) -> list[str]:
    """Return a line of the output file per item: str() of list items, space-separated cells of a data frame's rows."""
    if hasattr(value, "to_csv"):
        text: str = value.to_csv(sep=" ", header=False, index=False)
        return text.splitlines()
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"run() must return a list or a pandas DataFrame, got {type(value).__name__}")
    return [str(item) for item in value]


if __name__ == "__main__":
    main()
