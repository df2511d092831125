"""Every rule by its name, and which rules each kind of file is checked by."""

from collections.abc import Callable, Iterator
from functools import partial

from mptserve.check.batch_rules import check_batch
from mptserve.check.document import Document
from mptserve.check.endpoint_rules import check_batch_endpoint, check_name, check_online_endpoint
from mptserve.check.files import check_code, check_environment, check_model
from mptserve.check.online_rules import (
    check_data_collector,
    check_host,
    check_insights,
    check_instances,
    check_probes,
    check_times,
)
from mptserve.check.problem import Problem
from mptserve.check.sizes import check_sku
from mptserve.check.variables import check_variables

RULES = {
    "yaml": "the file is YAML with one object",
    "duplicate-key": "no key comes twice in one object; the last would win",
    "kind": "the file says by `$schema` what it describes",
    "azure-sdk": "azure-ai-ml, Microsoft's own loader, takes the file",
    "file-missing": "files and folders that the YAML names are there",
    "endpoint-name": "an endpoint's name is one that Azure takes",
    "deployment-name": "a deployment's name is one that Azure takes",
    "identity": "a user-assigned identity is named",
    "traffic": "a share of traffic is 0 to 100 %",
    "traffic-sum": "the shares add up to 100 %, or to none",
    "mirror": "one deployment gets a copy of 50 % at most",
    "mirror-live": "a deployment that gets a copy answers no callers",
    "batch-auth": "a batch endpoint takes Entra tokens",
    "request-timeout": "request_timeout_ms is set, up to 180000",
    "queue-wait": "max_queue_wait_ms, which does nothing, is not there",
    "deadline": "our deadline comes before Azure's timeout, so that callers get the text so far",
    "graceful-timeout": "a worker that stops lets its requests finish",
    "concurrency": "max_concurrent_requests_per_instance is set, so that requests meet in the engine",
    "host-threads": "threads enough that the probe never waits behind generations",
    "host-workers": "one worker, so that the model is loaded once",
    "host-preload": "gunicorn does not fork after the model was loaded",
    "scoring-timeout": "SCORING_TIMEOUT_MS, which does nothing, is not there",
    "worker-timeout": "WORKER_TIMEOUT is not shorter than a request may take",
    "app-insights-text": "Application Insights does not get answers, nor hold back streams",
    "instance-count": "1 to 50 instances",
    "scale-settings": "a managed deployment is scaled by Azure Monitor",
    "probe-value": "numbers of a probe are in Azure's range",
    "probe-timeout": "a probe does not wait longer than its period",
    "probe-budget": "probes wait as long as the model may take to load",
    "data-collector": "collections are ones that something fills",
    "code": "code is uploaded, or the image has a server",
    "code-host-file": "nothing in the code folder is mistaken for the host's settings",
    "script": "the scoring script is Python with the functions that Azure calls",
    "model": "a model is named, as a registered one or a folder",
    "model-checkpoint": "the model's folder holds one MPT checkpoint that the engine computes",
    "environment": "an environment is named",
    "environment-image": "an environment has an image, and something to serve with",
    "conda": "the conda file is one, and does not install this package",
    "conda-pins": "the conda file pins what it installs",
    "conda-host": "the conda file installs Azure's server, or its batch driver",
    "env-text": "environment variables are text",
    "env-reserved": "Azure's own variables are left to it",
    "setting-unknown": "every MPT_ variable is a setting",
    "setting-value": "every setting has a value that it takes",
    "model-family": "the `model_family` tag names a size that is known",
    "sku-unknown": "instance_type is on Azure's list",
    "sku-device": "MPT_DEVICE is there",
    "sku-dtype": "the card computes the dtype",
    "sku-memory": "weights and a context's keys and values fit",
    "sku-too-old": "PyTorch has code for the card",
    "sku-idle-gpus": "no GPU idles",
    "batch-code": "a batch deployment has a scoring script",
    "batch-compute": "a batch deployment names its cluster",
    "batch-variables": "variables stand where they are read",
    "batch-environment": "the environment is not a curated one",
    "batch-count": "counts are in Azure's range",
    "batch-concurrency": "not more copies of the model on an instance than it can have GPUs",
    "batch-timeout": "a mini-batch has minutes, not 30 s",
    "batch-logging-level": "the logging level exists",
    "batch-output": "an output file is named only where one is written",
}

Rule = Callable[[Document], Iterator[Problem]]

BY_KIND: dict[str, tuple[Rule, ...]] = {
    "online endpoint": (check_online_endpoint,),
    "online deployment": (
        partial(check_name, key="name", rule="deployment-name"),
        partial(check_name, key="endpoint_name", rule="endpoint-name"),
        partial(check_code, functions=("init", "run")),
        check_model,
        check_environment,
        check_variables,
        check_sku,
        check_times,
        check_host,
        check_insights,
        check_instances,
        check_probes,
        check_data_collector,
    ),
    "batch endpoint": (check_batch_endpoint,),
    "batch deployment": (
        partial(check_name, key="name", rule="deployment-name"),
        partial(check_name, key="endpoint_name", rule="endpoint-name"),
        partial(check_code, functions=("init", "run")),
        check_model,
        partial(check_environment, batch=True),
        check_variables,
        lambda document: check_variables(document, "settings"),
        check_batch,
    ),
    "model": (partial(check_model, inside=""),),
    "environment": (partial(check_environment, inside=""),),
}
