"""The image, really built from the Dockerfile, and run as the manifest says."""

from __future__ import annotations

import json
import re
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from containers import IMAGE, build, podman, wheels_of
from packaging.requirements import Requirement
from pod_containers import Podman
from pods import Cluster

from launch.engines.kubernetes.manifests import new_secret, render
from service.recipes import find_recipe
from service.runs.tracking import read_metrics
from service.spec.files import load_spec

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("image")]
CLUSTER = {"image": IMAGE, "processes_per_node": 2, "device": "cpu", "cpu": "2"} | {
    "memory": "3Gi",
    "shared_memory": "64Mi",
    "env": {"WANDB_MODE": "offline"},
}


def job(
    directory: Path, *overrides: str, files: dict[str, str] | None = None, **cluster: Any
) -> Cluster:
    section = f"kubernetes={json.dumps(CLUSTER | cluster)}"
    spec = load_spec(find_recipe("digits"), overrides=["length={steps: 20}", section, *overrides])
    return Cluster(render(spec, files=files, secret=new_secret()), directory, Podman())


def inside(image: str, *command: str) -> str:
    """What a command in the image says, run as the manifests run it: no network, no write."""
    shown = json.dumps(list(command))
    run = ("run", "--rm", "--network", "none", "--read-only", "--entrypoint", shown, image)
    return podman(*run).stdout.strip()


def test_the_image_trains_as_the_manifest_runs_it(tmp_path: Path) -> None:
    with job(tmp_path / "job") as cluster:
        assert cluster.run(seconds=300) == "Complete", cluster.logs()
        assert "2 processes on cpu" in cluster.logs()
        run = cluster.runs / "digits"
        assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 20
        assert run.stat().st_uid == 10001, "not as root"


def test_a_pod_can_write_to_its_volumes_alone(image: str, tmp_path: Path) -> None:
    with job(tmp_path / "job") as cluster:
        places = "/ /opt /etc /usr /var /run /home /etc/evenstep /tmp /runs /dev/shm"
        look = f"for each in {places}; do touch $each/x 2>/dev/null && echo writes $each; done"
        facts = "echo user $(id -u); grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status"
        cluster.container["command"] = ["/bin/sh", "-c", f"{look}; {facts}"]
        assert cluster.run(seconds=60) == "Complete", cluster.logs()
        lines = [tuple(line.split()) for line in cluster.pods[0].log.splitlines()]
        assert [line[1] for line in lines if line[0] == "writes"] == ["/tmp", "/runs", "/dev/shm"]
        assert ("user", "10001") in lines
        assert ("CapEff:", "0" * 16) in lines
        assert ("NoNewPrivs:", "1") in lines
        assert ("Seccomp:", "2") in lines, "a filter"


def test_a_pod_that_takes_more_than_its_memory_is_killed_and_counted(tmp_path: Path) -> None:
    hungry = (
        "from service.recipes.digits import task as digits\n"
        "def task(**options):\n"
        "    made = digits(**options)\n"
        "    made.eaten = bytearray(b'x' * (3 << 30))\n"
        "    return made\n"
    )
    (tmp_path / "hungry.py").write_text(hungry)
    words = (f"task={tmp_path}/hungry.py:task", "kubernetes.processes_per_node=1")
    with job(
        tmp_path / "job", *words, files={"hungry.py": hungry}, memory="1Gi", restarts=0
    ) as cluster:
        ended = cluster.run(seconds=120)
        assert ended == "Failed: MaxFailedIndexesExceeded", cluster.logs()
        assert cluster.ended == [(0, 137, "Count")], cluster.logs()


def test_the_image_has_a_user_an_entry_and_labels(image: str) -> None:
    (facts,) = json.loads(podman("image", "inspect", image).stdout)
    config = facts["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["evenstep"], "in exec form"
    assert config["StopSignal"] == "SIGTERM"
    labels = {
        key.removeprefix("org.opencontainers.image."): v for key, v in config["Labels"].items()
    }
    assert labels["title"] == "evenstep"
    assert labels["base.name"].startswith("localhost/evenstep-base:")
    assert {"version", "revision", "licenses", "description"} <= labels.keys()


def test_nothing_in_the_image_compiles_or_installs(image: str) -> None:
    look = "for each in cc gcc g++ clang nvcc make pip git; do command -v $each; done; true"
    assert inside(image, "/bin/sh", "-c", look) == ""
    assert inside(image, "evenstep", "--version").startswith("evenstep ")


def test_the_versions_in_the_image_are_the_pinned_ones(image: str) -> None:
    listing = (
        "from importlib.metadata import distributions\n"
        "for each in distributions():\n"
        "    print(each.name.lower().replace('_', '-'), each.version.partition('+')[0])\n"
    )
    words = inside(image, "/opt/evenstep/bin/python", "-c", listing).split()
    found = dict(zip(words[::2], words[1::2], strict=True))
    pinned = dict(re.findall(r"(?m)^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text()))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    own = [Requirement(each) for each in requires("evenstep") or []]
    needed = {each.name.lower() for each in own if each.marker is None}
    assert needed <= found.keys(), "and what they need in turn:"
    assert {name: pinned[name] for name in found if name in pinned} == {
        name: version for name, version in found.items() if name in pinned
    }
    assert found.keys() - pinned.keys() <= {"evenstep", "setuptools"}, "nothing without a pin"


def test_the_example_of_the_page_is_an_image_that_trains(image: str, tmp_path: Path) -> None:
    """docs/how-to/image.md: its four files, built and run as the two pods that they ask for."""
    page = (ROOT / "docs/how-to/image.md").read_text()
    files = dict(re.findall(r"(?ms)`([\w./]+)`[^`\n]*:\n\n```\w*\n(.*?)^```$", page))
    assert len(files) == 4
    files["Dockerfile"] = re.sub(r"(?m)^FROM \S+", f"FROM {image}", files["Dockerfile"])
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    own = f"{IMAGE}-example"
    wheels = wheels_of("example", files["requirements.txt"].split(), python=python_in(image))
    build(tmp_path, own, wheels=wheels)
    try:
        options = CLUSTER | {"image": own, "nodes": 2, "cpu": "1"}
        words = [f"kubernetes.{key}={json.dumps(value)}" for key, value in options.items()]
        spec = load_spec(tmp_path / "my_job.yaml", overrides=words)
        objects = render(spec, secret=new_secret())
        with Cluster(objects, tmp_path / "job", Podman()) as cluster:
            assert cluster.run(seconds=300) == "Complete", cluster.logs()
            assert "4 processes on cpu" in cluster.logs()
            assert cluster.step() == 34, "ceil(4 epochs of 500 rows / 60)"
    finally:
        podman("rmi", own)


def python_in(image: str) -> str:
    return inside(image, "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
