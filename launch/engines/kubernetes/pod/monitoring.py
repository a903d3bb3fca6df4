"""How a cluster's Prometheus finds and reaches the metrics of a run, and the liveness probe.

Sources: https://kubernetes.io/docs/concepts/workloads/pods/probes/,
https://prometheus-operator.dev/docs/api-reference/api/#monitoring.coreos.com/v1.PodMonitor
"""

from __future__ import annotations

from typing import Any

from service.basics.errors import SpecError
from service.spec.kubernetes import KubernetesSpec
from service.spec.models import Spec

PORT = "metrics"
"""What the port is called in the pods."""
ADDRESS = "EVENSTEP_METRICS_ADDRESS"
_PROBE_SECONDS, _PROBES = 30, 4
_ANSWER_SECONDS = 10
_SCRAPE_SECONDS = 15


def check_monitoring(spec: Spec, cluster: KubernetesSpec) -> None:
    """Refuse what asks for an endpoint where none is served.

    Raises:
        SpecError: names the key, and what to add.
    """
    port = spec.tracking.metrics_port
    for key in ("scrape_from", "liveness_probe"):
        if getattr(cluster, key) and port is None:
            raise SpecError(
                f"kubernetes.{key}: needs the endpoint of the metrics. Add tracking.metrics_port, "
                "such as 9400."
            )
    if port == cluster.port and cluster.most_nodes > 1:
        raise SpecError(
            f"tracking.metrics_port: {port} is kubernetes.port, at which the nodes meet. "
            "Use another, such as 9400."
        )


def container_ports(spec: Spec) -> list[dict[str, Any]]:
    """The port of the metrics, if they are served."""
    port = spec.tracking.metrics_port
    return [] if port is None else [{"name": PORT, "containerPort": port, "protocol": "TCP"}]


def variables(spec: Spec) -> dict[str, dict[str, Any]]:
    """The pod's own address, on which the endpoint listens besides loopback."""
    if spec.tracking.metrics_port is None:
        return {}
    return {ADDRESS: {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}}


def probe(spec: Spec, cluster: KubernetesSpec) -> dict[str, Any]:
    """The liveness probe, if it is asked for.

    /healthz fails only where a rank's hang watch has been silent for more than twice the limit of
    a hang, so neither a save nor a start needs an allowance of its own. A command and no httpGet:
    that one would also kill a pod that trains while its endpoint is not there.
    """
    if not cluster.liveness_probe:
        return {}
    command = ["python", "-P", "-m", "service.monitoring.probe", str(spec.tracking.metrics_port)]
    return {
        "livenessProbe": {
            "exec": {"command": command},
            "periodSeconds": _PROBE_SECONDS,
            "timeoutSeconds": _PROBE_SECONDS,  # in a throttled container Python starts slowly
            "failureThreshold": _PROBES,
            "initialDelaySeconds": _PROBE_SECONDS,
        }
    }


def ingress(spec: Spec, cluster: KubernetesSpec) -> list[dict[str, Any]]:
    """Whom the NetworkPolicy lets scrape: pods of the namespaces that the spec names."""
    if not cluster.scrape_from:
        return []
    namespaces = {"namespaceSelector": {"matchLabels": dict(cluster.scrape_from)}}
    return [
        {"from": [namespaces], "ports": [{"port": spec.tracking.metrics_port, "protocol": "TCP"}]}
    ]


def pod_monitor(selector: dict[str, Any]) -> dict[str, Any]:
    """The spec of a PodMonitor, by which the Prometheus operator scrapes the run's pods.

    Args:
        selector: of the run's pods.
    """
    endpoint = {
        "port": PORT,
        "path": "/metrics",
        "interval": f"{_SCRAPE_SECONDS}s",
        "scrapeTimeout": f"{_ANSWER_SECONDS}s",
    }
    return {"selector": selector, "podMetricsEndpoints": [endpoint]}
