"""The image, built from the Dockerfile, running as the manifest says: EVENSTEP_IMAGE names it.

docker build -t evenstep:test ... . && EVENSTEP_IMAGE=evenstep:test make test-slow
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.kubernetes.manifests import render
from service.recipes import find_recipe
from service.spec_file import load_spec
from service.tracking import read_metrics

IMAGE = os.environ.get("EVENSTEP_IMAGE")
ENGINE = shutil.which("podman") or shutil.which("docker")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ENGINE is None, reason="neither podman nor docker is installed"),
    pytest.mark.skipif(IMAGE is None, reason="EVENSTEP_IMAGE names no image to test"),
]
CLUSTER = "kubernetes={image: 'i', processes_per_node: 2, device: cpu, cpu: '2', memory: 3Gi}"


def container(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(ENGINE), *words], capture_output=True, text=True, timeout=300)


def test_the_image_trains_as_the_manifest_runs_it(tmp_path: Path) -> None:
    spec = load_spec(find_recipe("digits"), overrides=["length={steps: 20}", CLUSTER])
    objects = {made["kind"]: made for made in render(spec)}
    pod = objects["Job"]["spec"]["template"]["spec"]
    (trainer,) = pod["containers"]
    runs, spec_file = tmp_path / "runs", tmp_path / "spec.yaml"
    runs.mkdir()
    runs.chmod(0o777)
    spec_file.write_text(objects["ConfigMap"]["data"]["spec.yaml"])
    variables = {each["name"]: each.get("value", "0") for each in trainer["env"]}
    user = pod["securityContext"]["runAsUser"]
    assert trainer["securityContext"]["readOnlyRootFilesystem"]
    command, *words = trainer["command"]
    ended = container(
        *("run", "--rm", "--network", "none", "--read-only", "--user", f"{user}:{user}"),
        *("--tmpfs", "/tmp:rw,mode=1777", "--cap-drop", "ALL"),
        *("--security-opt", "no-new-privileges", "--memory", "3g"),
        *("-v", f"{runs}:/runs", "-v", f"{spec_file}:/etc/evenstep/spec.yaml:ro"),
        *(word for k, v in variables.items() for word in ("-e", f"{k}={v}")),
        *("--entrypoint", command, str(IMAGE), *words),
    )
    assert ended.returncode == 0, ended.stderr
    assert "2 processes on cpu" in ended.stdout
    assert read_metrics(runs / "digits/metrics.jsonl")[-1]["step"] == 20
    assert (runs / "digits").stat().st_uid == user


def test_the_image_has_a_user_an_entry_and_no_compiler() -> None:
    facts = yaml.safe_load(container("image", "inspect", str(IMAGE)).stdout)[0]["Config"]
    assert facts["User"] == "10001:10001"
    assert facts["Entrypoint"] == ["evenstep"]
    assert facts["Labels"]["org.opencontainers.image.title"] == "evenstep"
    look = "for each in cc gcc g++ clang nvcc make; do command -v $each; done; true"
    found = container("run", "--rm", "--entrypoint", "/bin/sh", str(IMAGE), "-c", look)
    assert (found.returncode, found.stdout) == (0, ""), found.stderr
    words = container("run", "--rm", str(IMAGE), "--version")
    assert words.stdout.startswith("evenstep "), words.stderr
