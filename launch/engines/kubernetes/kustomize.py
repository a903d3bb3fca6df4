"""Writes k8s/base and its overlays: `python -m launch.engines.kubernetes.kustomize`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.engines.kubernetes.dashboard import dashboard
from launch.engines.kubernetes.manifests import render, to_yaml
from launch.engines.kubernetes.pod.monitoring import pod_monitor
from launch.engines.kubernetes.pod.pods import Manifest, labels, own_pods
from service.spec.files import load_spec
from service.spec.models import Spec

BASE = "single-gpu"
"""The overlay that equals the base."""

DASHBOARD = "grafana-dashboard.json"

_MADE = "# Made by: python -m launch.engines.kubernetes.kustomize\n"


def kustomization(specs: Path) -> dict[str, str]:
    """Every file of the base and of the overlays, by its path in the directory of `specs`."""
    rendered = {path.stem: _by_kind(_objects(load_spec(path))) for path in sorted(specs.glob("*"))}
    base = rendered[BASE]
    files = {f"base/{kind.lower()}.yaml": to_yaml([made]) for kind, made in base.items()}
    files["base/kustomization.yaml"] = _kustomization({"resources": sorted(_names(base))})
    for name, objects in rendered.items():
        files |= _overlay(f"overlays/{name}", base, objects)
    return {path: _MADE + text for path, text in files.items()}


def _objects(spec: Spec) -> list[Manifest]:
    """What `render` makes; and where a Prometheus may scrape, what has its operator do so."""
    objects = render(spec)
    if spec.kubernetes is None or not spec.kubernetes.scrape_from:
        return objects
    metadata = {"name": spec.name, "labels": labels(spec)}
    kind = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor"}
    return [*objects, {**kind, "metadata": metadata, "spec": pod_monitor(own_pods(spec))}]


def write(directory: Path) -> None:
    """Write the base and the overlays into `directory`, and remove earlier ones."""
    for made in ("base", "overlays"):
        shutil.rmtree(directory / made, ignore_errors=True)
    for path, text in kustomization(directory / "specs").items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text, encoding="utf-8")
    (directory / DASHBOARD).write_text(dashboard(), encoding="utf-8")


def _overlay(place: str, base: dict[str, Manifest], objects: dict[str, Manifest]) -> dict[str, str]:
    assert base.keys() <= objects.keys(), "an overlay only adds to the base"
    added = {kind: made for kind, made in objects.items() if kind not in base}
    files = {f"{place}/{kind.lower()}.yaml": to_yaml([made]) for kind, made in added.items()}
    patches = []
    for kind, made in base.items():
        operations = list(_operations(made, objects[kind], ""))
        if operations:
            patch, target = f"{kind.lower()}-patch.yaml", {"kind": kind}
            patches.append({"path": patch, "target": target})
            files[f"{place}/{patch}"] = to_yaml([operations])
    content: Manifest = {"resources": ["../../base", *sorted(_names(added))]}
    if patches:
        content["patches"] = patches
    return {**files, f"{place}/kustomization.yaml": _kustomization(content)}


def _operations(old: Any, new: Any, path: str) -> Iterator[dict[str, Any]]:
    """The JSON patch from `old` to `new`; a list of another length is replaced completely."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for at, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _operations(before, after, f"{path}/{at}")
        return
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield {"op": "replace", "path": path, "value": new}
        return
    for key in {**old, **new}:
        inner = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
        if key not in new:
            yield {"op": "remove", "path": inner}
        elif key not in old:
            yield {"op": "add", "path": inner, "value": new[key]}
        else:
            yield from _operations(old[key], new[key], inner)


def _kustomization(content: Manifest) -> str:
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    return to_yaml([{**head, **content}])


def _by_kind(objects: list[Manifest]) -> dict[str, Manifest]:
    found = {made["kind"]: made for made in objects}
    assert len(found) == len(objects), "one object of each kind"
    return found


def _names(objects: dict[str, Manifest]) -> list[str]:
    return [f"{kind.lower()}.yaml" for kind in objects]


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "k8s"))
