"""Entry script of Azure ML's online server: azmlinfsrv calls init() once and run(request) for every request to /score.

The host loads this file by its path, so the folder is put on sys.path first: the package beside this file is the one
that runs, never an installed copy.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from azureml_inference_server_http.api.aml_request import rawhttp
from flask import Request, Response, g

from mptserve.azure_server import app
from mptserve.log import set_up_logging
from mptserve.process_exit import exit_soon
from mptserve.service import Service
from mptserve.settings import read_settings

service: Service


def init() -> None:
    """Load the model from AZUREML_MODEL_DIR; an exception here stops the deployment and says what to change."""
    global service
    settings = read_settings()
    set_up_logging(settings.log_level)
    service = Service(settings, on_failure=exit_soon)
    app.keep_answers_private()
    app.add_routes(service)
    app.drain_on_sigterm(service)
    app.refuse_to_be_forked()


@rawhttp
def run(request: Request) -> Response:
    """Answer one request; `g.request_id` is the host's, and goes back in the x-request-id header."""
    return app.score(service, request, g.request_id)
