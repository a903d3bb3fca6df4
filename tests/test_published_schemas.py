"""The objects of JobSet, Kubeflow and Kueue against the CRDs those projects publish.

EVENSTEP_CRDS names a directory with the projects' own files, which are theirs and megabytes:
{jobsets,trainjobs,trainingruntimes,workloads,localqueues}.yaml, each found under crd/ or crds/ in
the project's repository. What the models of the trainer hold without them is in
test_kubernetes_manifests.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from test_kubernetes_manifests import TARGETS, WAYS, job, of_kind, pod_of

from launch.engines.kubernetes.manifests import render
from launch.engines.kubernetes.pod.queues import QUEUE

DIRECTORY = os.environ.get("EVENSTEP_CRDS")
pytestmark = pytest.mark.skipif(
    DIRECTORY is None, reason="EVENSTEP_CRDS names no directory with the CRDs"
)


@pytest.fixture(scope="module")
def published() -> dict[str, Draft202012Validator]:
    """A strict validator for each kind, at the version we render."""
    found = {}
    for path in sorted(Path(str(DIRECTORY)).glob("*.yaml")):
        for document in yaml.load_all(path.read_text(), yaml.CSafeLoader):
            spec = document["spec"]
            for version in spec["versions"]:
                kind = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                schema = _strict(version["schema"]["openAPIV3Schema"])
                found["/".join(kind)] = Draft202012Validator(schema)
    return found


def _strict(schema: Any) -> Any:
    """The schema as a server with fieldValidation=Strict reads it: nothing that is not named."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {**made, "type": ["integer", "string"]} | {"anyOf": [{}]}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", bool(open_ended))
    return made


def _validate(published: dict[str, Draft202012Validator], made: dict[str, Any]) -> None:
    # The server's own fields of every object's metadata are not in a CRD.
    published[f"{made['apiVersion']}/{made['kind']}"].validate({**made, "metadata": {}})


@pytest.mark.parametrize("target", ["jobset", "kubeflow"])
@pytest.mark.parametrize("way", WAYS)
def test_every_field_is_published(
    published: dict[str, Draft202012Validator], way: str, target: Any
) -> None:
    work = [m for m in render(job(**WAYS[way]), target=target) if "." in m["apiVersion"]]
    own = [made for made in work if not made["apiVersion"].startswith("networking.k8s.io")]
    assert own
    for made in own:
        _validate(published, made)
        wrong = copy.deepcopy(made)
        wrong["spec"]["suspended"] = True
        with pytest.raises(ValidationError, match="suspended"):
            _validate(published, wrong)


@pytest.mark.parametrize("version", ["v1beta1", "v1beta2"])
@pytest.mark.parametrize("target", TARGETS)
def test_kueue_can_make_its_workload_of_our_job(
    published: dict[str, Draft202012Validator], target: Any, version: str
) -> None:
    """Kueue makes it of the queue's name, the count and the template of the pods."""
    objects = render(job(**WAYS["every option"]), target=target)
    kind = {"job": "Job", "jobset": "JobSet", "kubeflow": "TrainJob"}[target]
    work = of_kind(objects, kind)
    workload = {
        "apiVersion": f"kueue.x-k8s.io/{version}",
        "kind": "Workload",
        "spec": {
            "queueName": work["metadata"]["labels"][QUEUE],
            "podSets": [{"name": "main", "count": 3, "template": {"spec": pod_of(objects)}}],
        },
    }
    _validate(published, workload)
    assert work["spec"]["suspend"] is True
    workload["spec"]["queueName"] = "No Queue"
    with pytest.raises(ValidationError, match="No Queue"):
        _validate(published, workload)
