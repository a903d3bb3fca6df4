"""Jobs of a real Slurm controller whose runs live in a bucket."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, evenstep
from slurm import Cluster, until
from stores import BUCKET, Server
from test_slurm_jobs import JOB, write_job

pytestmark = pytest.mark.cluster
pytest.importorskip("moto", reason="needs moto, flask and flask-cors")
pytest.importorskip("botocore", reason="needs botocore")
SERVER = Server(5005)
"""In the namespaces of the cluster, whose loopback is its own."""
ADDRESS = f"s3://{BUCKET}/runs"


@pytest.fixture(scope="module")
def store(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with a server of S3."""
    words = (sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", SERVER.port)
    server = cluster.started(*words, cwd=cluster.place)
    make = f"from stores import put_bucket; put_bucket({SERVER.port}, {BUCKET!r})"
    path = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    try:
        until(lambda: cluster.ran(sys.executable, "-c", make, **path).returncode == 0, "the bucket")
        yield cluster
    finally:
        server.kill()  # of nsenter; the server ends with the namespaces
        server.wait()
        for pipe in (server.stdout, server.stderr):
            assert pipe is not None
            pipe.close()


class Jobs:
    """A directory with the job, and a scratch directory that no attempt shares with another."""

    def __init__(self, path: Path, cluster: Cluster) -> None:
        self.path, self.cluster = path, cluster
        write_job(path)
        # As on another node: nothing but the bucket is left of an earlier attempt.
        scratch = f"export EVENSTEP_SCRATCH={path}/scratch-$job-${{SLURM_RESTART_COUNT:-0}}"
        slurm = JOB["slurm"] | {"prolog": [scratch]}
        (path / "job.yaml").write_text(json.dumps(JOB | {"slurm": slurm}))

    def ran(self, *words: object, code: int = 0) -> str:
        done = self.cluster.ran("evenstep", *words, cwd=self.path, **SERVER.variables)
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def slurm(self, verb: str, *words: object, runs: str, code: int = 0) -> str:
        name = "job.yaml" if verb == "submit" else "job"
        places = ("--runs", runs, "--files", "files")
        return self.ran("slurm", verb, name, *words, *places, code=code)

    def log(self, job: str) -> str:
        (found,) = [*self.path.glob(f"files/.slurm/*/log-{job}")] or [None]
        return found.read_text() if found is not None else ""


@pytest.fixture
def jobs(tmp_path: Path, store: Cluster) -> Iterator[Jobs]:
    yield Jobs(tmp_path, store)
    store.ran("scancel", "--user=root")
    store.wait_until_idle()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run in one process."""
    path = tmp_path_factory.mktemp("plain")
    write_job(path)
    done = evenstep("run", "job.yaml", cwd=path, EVENSTEP_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    return path / "runs/job"


def number_in(told: str) -> str:
    found = re.search(r"submitted as job (\d+)", told)
    assert found is not None, told
    return found[1]


def test_a_preempted_job_of_two_nodes_resumes_from_the_bucket(jobs: Jobs, plain: Path) -> None:
    runs = f"{ADDRESS}/preempted"
    job = number_in(jobs.slurm("submit", "slurm.partition=main", runs=runs))
    for node in range(2):
        until((jobs.path / f"held-{node}").exists, f"step 7 on node {node}")
    assert "exists already and has not ended" in jobs.slurm("submit", runs=runs, code=64)
    assert "step 6 of 14" in jobs.slurm("status", runs=runs)
    urgent = jobs.cluster.done(
        *("sbatch", "--parsable", "--nodes=2", "--exclusive", "--partition=urgent"),
        *("--output=/dev/null", "--wrap=true"),
    )
    until(lambda: "SIGTERM: saving" in jobs.log(job), "the launchers have heard")
    (jobs.path / "go").touch()
    jobs.cluster.wait_for(urgent, "COMPLETED")
    jobs.cluster.wait_for(job, "COMPLETED", "FAILED")
    assert jobs.cluster.state_of(job) == "COMPLETED", jobs.log(job)
    assert jobs.cluster.restarts_of(job) == 1
    assert "Resuming after step 7" in jobs.log(job)
    assert len([*jobs.path.glob("scratch-*")]) == 2
    told = jobs.ran("verify", f"{runs}/job", plain, "--level", "bits")
    assert "different" not in told
    assert not (jobs.path / "runs").exists(), "nothing of the runs is on the shared disk"
    secret = next(jobs.path.glob("files/.slurm/*/secret-*"))
    assert secret.stat().st_mode & 0o777 == 0o600
    log = jobs.slurm("logs", runs=runs)
    assert "Everything is in " in log


def test_a_job_that_is_killed_goes_on_elsewhere_and_jobs_of_an_array_on_their_own(
    jobs: Jobs,
) -> None:
    runs = f"{ADDRESS}/array"
    words: tuple[Any, ...] = ("slurm.nodes=1", "slurm.options=[]", "--sweep", "seed=1,2")
    number = number_in(jobs.slurm("submit", *words, "slurm.processes_per_node=2", runs=runs))
    both = [f"{number}_{index}" for index in range(2)]
    until(lambda: all("step=6/14" in jobs.log(job) for job in both), "both are held")
    until(lambda: jobs.ran("runs", runs).count("running") == 2, "both are uploaded")
    jobs.cluster.done("scontrol", "requeue", both[1])  # without notice
    (jobs.path / "go").touch()
    for job in both:
        assert jobs.cluster.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", jobs.log(job)
    assert [jobs.cluster.restarts_of(job) for job in both] == [0, 1]
    assert re.search(r"Resuming after step \d+", jobs.log(both[1]))
    assert "Resuming" not in jobs.log(both[0])
    assert "  job-0: done\n  job-1: done\n" in jobs.slurm("status", runs=runs)


def test_a_job_without_credentials_fails_at_once_and_says_so(jobs: Jobs) -> None:
    words = ("slurm.nodes=1", "slurm.options=[--export=NONE]", f"slurm.command={_command()}")
    number = number_in(jobs.slurm("submit", *words, runs=f"{ADDRESS}/refused"))
    assert jobs.cluster.wait_for(number, "FAILED") == "FAILED"
    assert jobs.cluster.restarts_of(number) == 0
    assert "has ended with 64 (an error in the spec)" in jobs.slurm(
        "status", runs=f"{ADDRESS}/refused"
    )
    assert f"error: {ADDRESS}/refused/job: " in jobs.log(number)


def _command() -> str:
    return os.path.join(os.path.dirname(sys.executable), "evenstep")
