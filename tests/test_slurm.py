"""Jobs on a real Slurm controller with two nodes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from slurm import Cluster

pytestmark = pytest.mark.cluster
WORDS = ("evenstep", "run", "digits", "length={steps: 12}", "schedule={name: constant}")


def test_one_task_on_each_node_is_one_job(cluster: Cluster, tmp_path: Path) -> None:
    ran = cluster.ran("srun", "-l", "-N2", "-n2", *WORDS, "--processes", 2, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "0: digits: 4 processes on cpu" in ran.stdout
    assert "0: Done after step 12" in ran.stdout
    assert re.search(r"1: Node 1 of 2, rendezvous at n0:\d+\.", ran.stderr)
    assert "WARNING" not in ran.stderr, "they have a secret"


def test_one_task_for_each_gpu_is_one_job(cluster: Cluster, tmp_path: Path) -> None:
    words = ("srun", "-N2", "--ntasks-per-node=2", "--gpus-per-node=2", *WORDS)
    ran = cluster.ran(*words, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "digits: 4 processes on cpu" in ran.stdout


def test_the_doctor_measures_the_network_between_the_tasks(
    cluster: Cluster, tmp_path: Path
) -> None:
    words = ("srun", "-l", "-N2", "-n2", "evenstep", "doctor", "--nodes", 2)
    ran = cluster.ran(*words, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    measured = (
        r"[01]: ok +network +\d+\.\d\d GB/s for each process, in a sum of .* 2 processes on 2 nodes"
    )
    assert len(re.findall(measured, ran.stdout)) == 2, ran.stdout


def test_a_mixture_is_refused_by_all(cluster: Cluster, tmp_path: Path) -> None:
    ran = cluster.ran("srun", "-l", "-N2", "-n3", *WORDS, cwd=tmp_path)
    assert ran.returncode == 64
    assert ran.stderr.count("Slurm started 2, 1 tasks on the machines of this step") == 3
    assert list(tmp_path.iterdir()) == []


def test_gpus_that_are_not_all_used_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    words = ("srun", "-N1", "-n3", "--gpus-per-node=2", *WORDS)
    ran = cluster.ran(*words, cwd=tmp_path, EVENSTEP_DEVICE="")
    assert ran.returncode == 64
    assert "Slurm started 3 tasks on a machine with 2 GPUs" in ran.stderr


def test_the_script_of_a_job_is_no_task(cluster: Cluster, tmp_path: Path) -> None:
    """Also where it was submitted from within a step, whose variables it then has."""
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n{' '.join(map(repr, WORDS))}\n")
    out = ("--output", tmp_path / "out")
    words = ("srun", "-N2", "-n2", "bash", "-c")
    words += ('[ "$SLURM_PROCID" = 1 ] || sbatch --wait -N1 "$@"', "-", *out, "job.sh")
    ran = cluster.ran(*words, cwd=tmp_path)
    told = (tmp_path / "out").read_text()
    assert ran.returncode == 0, (ran.stderr, told)
    assert "digits: 1 process on cpu" in told
