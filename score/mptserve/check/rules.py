"""Every rule by its name, and the rules for each kind of file."""

from collections.abc import Callable, Iterator
from functools import partial

from mptserve.check.batch_rules import check_batch
from mptserve.check.counts import check_counts, check_versions
from mptserve.check.document import Document
from mptserve.check.endpoint_rules import check_batch_endpoint, check_name, check_online_endpoint
from mptserve.check.files import (
    check_checkpoint,
    check_code,
    check_environment,
    check_model_file,
    check_our_environment,
    check_reference,
    is_our_environment,
)
from mptserve.check.online_rules import (
    check_data_collector,
    check_egress,
    check_host,
    check_insights,
    check_instances,
    check_limits,
    check_probe_values,
    check_probes,
    check_times,
)
from mptserve.check.problem import Problem
from mptserve.check.program import is_ours
from mptserve.check.sizes import check_idle_gpus, check_instance_type, check_sku
from mptserve.check.variables import check_settings, check_variables

RULES = {
    "yaml": "the file is YAML with one object",
    "duplicate-key": "no key occurs twice in one object; the last one would count",
    "kind": "`$schema` says what the file describes",
    "placeholder": "no value is left to be filled in, such as <ENDPOINT_NAME>",
    "azure-sdk": "azure-ai-ml, Microsoft's loader, accepts the file",
    "file-missing": "files and folders that the YAML refers to exist",
    "asset-version": "registered models and environments are named with a version or label",
    "whole-number": "counts have no fraction",
    "endpoint-name": "Azure accepts the name of the endpoint",
    "deployment-name": "Azure accepts the name of the deployment",
    "identity": "`user_assigned` has the resource id of an identity",
    "traffic": "each share of the traffic is 0 to 100 %",
    "traffic-sum": "the traffic adds up to 100 %, or to 0 %",
    "mirror": "at most one deployment receives mirrored traffic, at most 50 %",
    "mirror-live": "a deployment with mirrored traffic has no live traffic",
    "batch-auth": "a batch endpoint authenticates with Entra tokens",
    "request-timeout": "request_timeout_ms is set, to 180000 or less",
    "queue-wait": "max_queue_wait_ms is not set: it has no effect",
    "deadline": "MPT_DEADLINE_MS is below Azure's timeout, so that callers get the text so far",
    "graceful-timeout": "a worker that stops has time to finish its requests",
    "concurrency": "max_concurrent_requests_per_instance is set, so that the engine can batch requests",
    "queue-limit": "MPT_QUEUE_LIMIT is not below the requests that Azure sends",
    "gunicorn-args": "gunicorn's own parser accepts GUNICORN_CMD_ARGS",
    "host-threads": "there are enough threads that a probe never waits for generations",
    "host-workers": "there is one worker, so that the model is loaded once",
    "host-preload": "gunicorn does not load the model before it forks",
    "scoring-timeout": "SCORING_TIMEOUT_MS is not set: it has no effect",
    "worker-timeout": "WORKER_TIMEOUT is not below request_timeout_ms",
    "egress": "with egress disabled, no variable names something to fetch",
    "app-insights-text": "Application Insights receives no answers and does not buffer streams",
    "instance-count": "there are 1 to 50 instances",
    "scale-settings": "Azure Monitor scales a managed deployment, not `scale_settings`",
    "probe-value": "the numbers of a probe are in Azure's range",
    "probe-timeout": "the timeout of a probe is not longer than its period",
    "probe-budget": "probes allow enough time to load the model",
    "data-collector": "only collections that Azure fills are enabled",
    "code": "code is uploaded, or the image has a server",
    "code-host-file": "no file in the code folder is read as settings of azmlinfsrv",
    "script": "the scoring script is valid Python and defines the functions that Azure calls",
    "script-kind": "an online deployment runs score.py, a batch deployment batch_score.py",
    "model": "the model is set, as a registered one or a folder",
    "model-type": "a model of type mlflow_model has a file MLmodel",
    "model-checkpoint": "the model's folder has one MPT checkpoint that the engine supports",
    "environment": "the environment is set",
    "environment-image": "an environment has an image, and a conda file or a server",
    "conda": "the conda file is valid and does not install this package",
    "conda-python": "the conda file has a Python that this package supports",
    "conda-packages": "the conda file has what the server imports",
    "conda-compiler": "the conda file has a C compiler for the kernels",
    "conda-pins": "the conda file pins its packages",
    "conda-host": "the conda file installs Azure's server, or its batch driver",
    "env-text": "environment variables are strings",
    "env-reserved": "variables that Azure sets are not overridden",
    "model-mount": "AZUREML_MODEL_DIR is where model_mount_path puts the model",
    "setting-unknown": "every MPT_ variable is a setting",
    "setting-value": "every setting has a valid value",
    "setting-server": "every setting is one that the deployed server reads",
    "model-family": "the tag `model_family` is a known model size",
    "sku-unknown": "instance_type is on Azure's list",
    "sku-device": "the machine has what MPT_DEVICE names, and its GPU is used",
    "sku-dtype": "the GPU or CPU supports the dtype",
    "sku-memory": "the weights and a minimal KV cache fit into memory",
    "sku-kv-cache": "MPT_KV_CACHE_GB fits beside the weights",
    "sku-too-old": "PyTorch's packages support the GPU",
    "sku-idle-gpus": "no GPU is idle",
    "torch-build": "PyTorch's build can use the GPU",
    "batch-code": "a batch deployment has a scoring script",
    "batch-compute": "a batch deployment has a cluster",
    "batch-variables": "variables are where Azure reads them",
    "batch-environment": "the environment is not a curated one",
    "batch-count": "counts are in Azure's range",
    "batch-concurrency": "an instance runs no more processes than it can have GPUs",
    "batch-timeout": "the timeout of a mini-batch is minutes, not 30 s",
    "batch-logging-level": "the logging level is valid",
    "batch-output": "output_file_name is set only if a file is written",
}

Rule = Callable[[Document], Iterator[Problem]]


def _ours(*rules: Rule) -> Rule:
    """Return the rules as one that says nothing about deployments which do not run this package."""

    def check(document: Document) -> Iterator[Problem]:
        if is_ours(document):
            for rule in rules:
                yield from rule(document)

    return check


def _our_environment_file(document: Document) -> Iterator[Problem]:
    if is_our_environment(document):
        yield from check_our_environment(document, inside="")


_ANY_DEPLOYMENT: tuple[Rule, ...] = (
    partial(check_name, key="name", rule="deployment-name"),
    partial(check_name, key="endpoint_name", rule="endpoint-name"),
    check_counts,
    check_versions,
    check_code,
    check_reference,
    check_environment,
    check_variables,
)

BY_KIND: dict[str, tuple[Rule, ...]] = {
    "online endpoint": (check_counts, check_online_endpoint),
    "online deployment": (
        *_ANY_DEPLOYMENT,
        check_instance_type,
        check_limits,
        check_instances,
        check_probe_values,
        check_egress,
        _ours(
            check_checkpoint,
            check_our_environment,
            check_settings,
            check_sku,
            check_idle_gpus,
            check_times,
            check_host,
            check_insights,
            check_probes,
            check_data_collector,
        ),
    ),
    "batch endpoint": (check_batch_endpoint,),
    "batch deployment": (
        *_ANY_DEPLOYMENT,
        check_batch,
        _ours(check_checkpoint, check_our_environment, check_settings),
    ),
    "model": (check_model_file,),
    "environment": (partial(check_environment, inside=""), _our_environment_file),
}
