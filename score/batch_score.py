"""Entry script of Azure ML's batch jobs: the parallel driver calls init() once per process, then run(mini_batch).

A mini-batch is a list of files. The results are files below AZUREML_BI_OUTPUT_PATH. run() returns one line for every
file that succeeded: the driver counts them, and with `append_row` writes them down.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mptserve.batch import azure_driver
from mptserve.batch.job import BatchJob

job: BatchJob


def init() -> None:
    """Load the model from AZUREML_MODEL_DIR onto a GPU of this process's own; an exception stops the job."""
    global job
    job = azure_driver.start(sys.argv[1:])


def run(mini_batch: list[str]) -> list[str]:
    """Score files; a file that fails is missing in the list, which is how the driver's error threshold sees it."""
    return azure_driver.succeeded(job.run(mini_batch))


def shutdown() -> None:
    """Write the summary of the whole job so far."""
    job.close()
