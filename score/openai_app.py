"""Entry script of the OpenAI server: OpenAI's API, /score and the playground, in a container or on any machine.

    python score/openai_app.py --port 8451

Settings come from the environment. The server listens at once and loads the model meanwhile; until it is loaded,
everything but the playground and `/health/live` is answered 503.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mptserve.openai_server.app import create_app, main

__all__ = ["create_app", "main"]

if __name__ == "__main__":
    sys.exit(main())
