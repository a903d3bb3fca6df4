"""Pods of a rendered elastic Job that a test takes away and that come back (tests/pods.py)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import containers
from commands import evenstep
from elastic_nodes import SPEC, TASK
from engines import Engine
from pods import Cluster

from launch.engines.kubernetes.manifests import code_beside, new_secret, render
from service.runs.directory import RunDirectory
from service.spec.files import load_spec

HOLD = "hold"


def elastic_job(place: Path, engine: Engine, *, most: int, steps: int, bitwise: bool) -> Cluster:
    """The Job of 1 to `most` pods, one process in each; `release` ends the pauses in its steps."""
    section = {
        "image": containers.IMAGE,
        "nodes": {"least": 1, "most": most, "wait_seconds": 5} if most > 1 else 1,
        "device": "cpu",
        "cpu": "1",
        "memory": "1Gi",
        "shared_memory": "64Mi",
        "restarts": 10,
        "env": {"WANDB_MODE": "offline", "HOLD_FILE": f"/runs/{HOLD}", "PAUSE_SECONDS": "0.2"},
    }
    sections = {"length": {"steps": steps}, "kubernetes": section}
    written = place / "spec"
    written.mkdir(parents=True)
    (written / "job.py").write_text(TASK)
    exactness = {"exactness": "bitwise"} if bitwise else {}
    (written / "job.yaml").write_text(json.dumps(SPEC | sections | exactness))
    spec = load_spec(str(written / "job.yaml"))
    objects = render(spec, files=code_beside(spec), secret=new_secret())
    cluster = Cluster(objects, place / "cluster", engine)
    if most > 1:
        (cluster.runs / HOLD).touch()
    return cluster


def release(cluster: Cluster) -> None:
    """Let the steps that are left be taken at full speed."""
    (cluster.runs / HOLD).unlink(missing_ok=True)


def lose(cluster: Cluster, index: int) -> None:
    """Lose the machine of a pod."""
    cluster.running[index].disrupted = True
    cluster.kill(index)


def attempts_by_processes(cluster: Cluster) -> dict[int, int]:
    """How many attempts of the run had so many processes."""
    attempts = RunDirectory(cluster.runs / "job").read_facts()["attempts"]
    return dict(Counter(attempt["processes"] for attempt in attempts))


def require_run_of_one_pod(
    cluster: Cluster, place: Path, engine: Callable[[], Engine], *, steps: int, bitwise: bool
) -> None:
    """A Job of one pod that nothing happens to has the same rows, and losses within 1e-9.

    Args:
        bitwise: equal bits of the losses and the weights instead.
    """
    with elastic_job(place, engine(), most=1, steps=steps, bitwise=bitwise) as alone:
        assert alone.run(seconds=300 + steps) == "Complete", alone.logs()
        assert alone.ended == [(0, 0, "Complete")], alone.ended
    level = ("--level", "bits") if bitwise else ("--tolerance", "1e-9")
    both = (str(of.runs / "job") for of in (cluster, alone))
    compared = evenstep("verify", *both, *level, cwd=place)
    assert compared.returncode == 0, f"{compared.stdout}{compared.stderr}\n{cluster.logs()}"
    assert f"{steps:,} steps" in compared.stdout, compared.stdout
