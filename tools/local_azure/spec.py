"""Reads from a deployment's resource what is needed to run it."""

from dataclasses import dataclass
from typing import Any

import isodate

from local_azure.errors import Refused


@dataclass(frozen=True)
class Probe:
    """A health probe, times in seconds; defaults are those of Azure's YAML reference, "ProbeSettings"."""

    initial_delay_s: float = 10
    period_s: float = 10
    timeout_s: float = 2
    success_threshold: int = 1
    failure_threshold: int = 30

    @property
    def patience_s(self) -> float:
        """Return how many seconds the probe may fail continuously before the container counts as failed."""
        return self.failure_threshold * self.period_s


@dataclass(frozen=True)
class Spec:
    """What a deployment runs, and its limits."""

    code_id: str
    scoring_script: str
    model_id: str
    environment_id: str
    environment_variables: dict[str, str]
    instance_type: str
    n_instances: int
    request_timeout_s: float
    max_concurrent_requests: int
    liveness: Probe
    readiness: Probe
    app_insights: bool

    @property
    def max_pending(self) -> int:
        """Return the maximum of requests in flight; further ones get 429 (troubleshooting page, 429)."""
        return 2 * self.max_concurrent_requests * self.n_instances


def read_spec(resource: dict[str, Any]) -> Spec:
    """Return the spec of a `PUT …/deployments/NAME` body; raises Refused where Azure would refuse it.

    Azure's limits are from DOC: reference-yaml-deployment-managed-online, how-to-manage-quotas.
    """
    properties = resource.get("properties") or {}
    settings = properties.get("requestSettings") or {}
    code = properties.get("codeConfiguration") or {}
    spec = Spec(
        code_id=code.get("codeId") or "",
        scoring_script=code.get("scoringScript") or "",
        model_id=_model_id(properties.get("model")),
        environment_id=properties.get("environmentId") or "",
        environment_variables=dict(properties.get("environmentVariables") or {}),
        instance_type=properties.get("instanceType") or "",
        n_instances=int((resource.get("sku") or {}).get("capacity") or 1),
        request_timeout_s=_seconds(settings.get("requestTimeout"), 5.0),
        max_concurrent_requests=int(settings.get("maxConcurrentRequestsPerInstance") or 1),
        liveness=_probe(properties.get("livenessProbe")),
        readiness=_probe(properties.get("readinessProbe")),
        app_insights=bool(properties.get("appInsightsEnabled")),
    )
    if spec.request_timeout_s > 180:
        raise Refused(
            400, "BadRequest", f"request_timeout_ms must be 180000 or less, got {spec.request_timeout_s * 1000:.0f}"
        )
    if not 1 <= spec.n_instances <= 50:
        raise Refused(400, "BadRequest", f"instance_count must be between 1 and 50, got {spec.n_instances}")
    if not spec.instance_type.startswith("Standard_"):
        raise Refused(400, "BadRequest", f"{spec.instance_type!r} is not an instance type")
    if not spec.code_id or not spec.scoring_script:
        raise Refused(
            400, "BadRequest", "the emulator runs only deployments with a code_configuration, no custom containers"
        )
    return spec


def _model_id(model: Any) -> str:
    """Return the model's id: a string in the SDK's API version, an object with `assetId` in others."""
    return (model.get("assetId") or "") if isinstance(model, dict) else (model or "")


def _seconds(duration: str | None, default: float) -> float:
    return float(isodate.parse_duration(duration).total_seconds()) if duration else default


def _probe(settings: dict[str, Any] | None) -> Probe:
    settings = settings or {}
    defaults = Probe()
    return Probe(
        _seconds(settings.get("initialDelay"), defaults.initial_delay_s),
        _seconds(settings.get("period"), defaults.period_s),
        _seconds(settings.get("timeout"), defaults.timeout_s),
        int(settings.get("successThreshold") or defaults.success_threshold),
        int(settings.get("failureThreshold") or defaults.failure_threshold),
    )
