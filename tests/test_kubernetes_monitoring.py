"""Metrics on a cluster: who may scrape, the liveness probe, the PodMonitor, the dashboard."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from commands import ROOT
from pod_security import violations
from test_kubernetes_manifests import IMAGE, JOB, TARGETS, of_kind, pod_of

from launch.engines.kubernetes.dashboard import dashboard
from launch.engines.kubernetes.manifests import render
from launch.engines.kubernetes.pod.monitoring import PORT
from service.basics.errors import SpecError
from service.monitoring.metrics import METRICS
from service.spec.files import load_spec
from service.spec.models import Spec


def watched(*, port: int | None = 9400, **cluster: Any) -> Spec:
    tracking = {} if port is None else {"metrics_port": port}
    return load_spec(JOB | {"tracking": tracking, "kubernetes": {"image": IMAGE} | cluster})


FROM = {"kubernetes.io/metadata.name": "monitoring"}


@pytest.mark.parametrize("target", TARGETS)
def test_nobody_reaches_the_metrics_but_whom_the_spec_names(target: Any) -> None:
    closed = of_kind(render(watched(), target=target), "NetworkPolicy")["spec"]["ingress"]
    assert closed == []
    objects = render(watched(nodes=2, scrape_from=FROM), target=target)
    own, scrape = of_kind(objects, "NetworkPolicy")["spec"]["ingress"]
    assert "ports" not in own
    assert scrape == {
        "from": [{"namespaceSelector": {"matchLabels": FROM}}],
        "ports": [{"port": 9400, "protocol": "TCP"}],
    }
    [container] = pod_of(objects)["containers"]
    assert {"name": PORT, "containerPort": 9400, "protocol": "TCP"} in container["ports"]
    [address] = [e for e in container["env"] if e["name"] == "EVENSTEP_METRICS_ADDRESS"]
    assert address["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert violations(pod_of(objects)) == []


def test_without_a_port_nothing_of_it_is_rendered() -> None:
    [container] = pod_of(render(watched(port=None)))["containers"]
    assert "ports" not in container
    assert "livenessProbe" not in container
    assert "METRICS" not in str(container)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_the_probe_asks_the_endpoint_and_is_strictly_valid(target: Any, version: str) -> None:
    import kubernetes_validate

    objects = render(watched(scrape_from=FROM, liveness_probe=True), target=target)
    [container] = pod_of(objects)["containers"]
    words = container["livenessProbe"]["exec"]["command"]
    assert words == ["python", "-P", "-m", "service.monitoring.probe", "9400"]
    for made in objects:
        if "." not in made["apiVersion"].partition("/")[0].replace("networking.k8s.io", ""):
            kubernetes_validate.validate(made, version, strict=True)
    assert violations(pod_of(objects)) == []


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"port": None, "scrape_from": FROM}, "kubernetes.scrape_from: needs the endpoint"),
        ({"port": None, "liveness_probe": True}, "kubernetes.liveness_probe: needs the endpoint"),
        ({"port": 29500, "nodes": 2}, "tracking.metrics_port: 29500 is kubernetes.port"),
    ],
)
def test_what_could_not_work_is_refused(spec: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=re.escape(told)):
        render(watched(**spec))


def test_the_pod_monitor_selects_the_pods_and_names_their_port() -> None:
    place = ROOT / "k8s/overlays/monitored"
    monitor = yaml.safe_load((place / "podmonitor.yaml").read_text())
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    spec = load_spec(ROOT / "k8s/specs/monitored.yaml")
    objects = render(spec)
    pods = of_kind(objects, "Job")["spec"]["template"]["metadata"]["labels"]
    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= pods.items()
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    [container] = pod_of(objects)["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports[endpoint["port"]] == spec.tracking.metrics_port
    assert endpoint["path"] == "/metrics"
    interval, timeout = (int(endpoint[key][:-1]) for key in ("interval", "scrapeTimeout"))
    assert timeout <= interval, "Prometheus refuses a longer one"
    known = {"port", "path", "interval", "scrapeTimeout"}
    assert endpoint.keys() == known
    resources = yaml.safe_load((place / "kustomization.yaml").read_text())["resources"]
    assert "podmonitor.yaml" in resources


def test_the_dashboard_asks_only_for_metrics_that_exist() -> None:
    text = (ROOT / "k8s/grafana-dashboard.json").read_text()
    assert text == dashboard(), "make it again: python -m launch.engines.kubernetes.kustomize"
    made = json.loads(text)
    queries = [target["expr"] for panel in made["panels"] for target in panel.get("targets", ())]
    queries += [v["query"] for v in made["templating"]["list"] if v["type"] == "query"]
    known = {metric.sample: set(metric.labels) for metric in METRICS}
    for query in queries:
        names = re.findall(r"evenstep_\w+", query)
        assert names, query
        assert set(names) <= known.keys(), query
        labels = set(re.findall(r"[{,] *(\w+) *=~", query))
        assert labels <= set.intersection(*(known[name] for name in names)), query
        assert query.count("(") == query.count(")"), query
    asked = {name for query in queries for name in re.findall(r"evenstep_\w+", query)}
    assert len(asked) > 20


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = [panel["gridPos"] for panel in json.loads(dashboard())["panels"]]
    cells = [
        (x, y)
        for place in panels
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    numbers = [panel["id"] for panel in json.loads(dashboard())["panels"]]
    assert len(numbers) == len(set(numbers))
