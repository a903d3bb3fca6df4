"""`evenstep doctor`: what it finds on this machine, and on machines with something wrong."""

import json
import os
import socket

import pytest
from commands import evenstep

from launch.commands import doctor
from launch.commands.doctor import Asked, Finding, _kubectl, _shared_memory, _wandb, exit_code
from service.basics.limits import limits, memory_each, workers_each
from service.recipes import find_recipe
from service.spec.files import load_spec


def findings(*words, cwd, **environ):
    done = evenstep("doctor", *words, "--json", cwd=cwd, **environ)
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    states = {finding["state"] for finding in found.values()}
    assert done.returncode == (2 if "failed" in states else 1 if "warning" in states else 0)
    for finding in found.values():
        assert bool(finding["fix"]) == (finding["state"] in ("warning", "failed")), finding
    return found


def test_every_check_is_made_and_real_processes_add_up(tmp_path):
    found = findings("digits", cwd=tmp_path)
    assert {"packages", "devices", "cores", "memory", "/dev/shm", "disk", "fsync", "lock"} | {
        "clock",
        "host name",
        "RDMA",
        "all-reduce",
        "W&B",
        "kubectl",
    } <= set(found)
    assert found["packages"]["state"] == "ok"
    assert found["all-reduce"]["state"] == "ok", found["all-reduce"]
    assert "GB/s" in found["all-reduce"]["told"]
    assert found["lock"]["state"] == "ok"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_what_a_run_would_report_is_no_bug_of_evenstep(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", (doctor._stop,))
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/run.json").write_text("{torn")
    spec = load_spec(find_recipe("digits"))
    (found,) = doctor.examined(Asked(runs=tmp_path, spec=spec))
    assert (found.name, found.state) == ("stop", "failed")
    assert found.told.startswith(f"{tmp_path}/digits/run.json cannot be read: ")
    assert found.fix == "Correct this first: a run would end with the same message."


def test_what_is_wrong_is_reported_with_its_fix(tmp_path):
    """A torchvision of another torch, a W&B nobody reaches, a file for a directory, a dead rank."""
    broken = tmp_path / "site"
    (broken / "torchvision").mkdir(parents=True)
    (broken / "torchvision/__init__.py").write_text("raise RuntimeError('no torchvision::nms')")
    (broken / "torchvision-0.9.dist-info").mkdir()
    (broken / "torchvision-0.9.dist-info/METADATA").write_text("Name: torchvision\nVersion: 0.9\n")
    (broken / "sitecustomize.py").write_text(
        "import os, sys\nif os.environ.get('RANK') == '1':  os.write(2, b'no fabric'); os._exit(3)"
    )
    (tmp_path / "a_file").write_text("")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens
        found = findings(
            *("--runs", "a_file"),
            cwd=tmp_path,
            PYTHONPATH=str(broken),
            WANDB_MODE="online",
            WANDB_API_KEY="x" * 40,
            WANDB_BASE_URL=f"http://127.0.0.1:{closed.getsockname()[1]}",
        )
    assert found["torchvision"]["state"] == "failed"
    assert "no torchvision::nms" in found["torchvision"]["told"]
    assert "pip uninstall torchvision" in found["torchvision"]["fix"]
    assert found["W&B"]["state"] == "warning"
    assert "cannot be reached in 3 s" in found["W&B"]["told"]
    assert found["disk"]["state"] == "failed"
    assert "--runs" in found["disk"]["fix"]
    assert found["all-reduce"]["state"] == "failed"
    assert "no fabric" in found["all-reduce"]["told"]


def test_a_kubectl_that_waits_is_no_fault_of_ours(tmp_path, monkeypatch):
    (tmp_path / "kubectl").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("launch.commands.doctor.KUBECTL_SECONDS", 0.2)
    [found] = _kubectl(Asked())
    assert (found.state, found.told) == ("warning", "kubectl config took over 0.2 s")


def test_a_loader_that_overflows_shared_memory_is_found():
    path = find_recipe("digits")
    modest = load_spec(path, overrides=["loader.workers=1"])
    greedy = load_spec(path, overrides=["loader.workers=4", "loader.prefetch=1000000000"])
    [fine] = _shared_memory(Asked(spec=modest))
    [full] = _shared_memory(Asked(processes=3, spec=greedy))
    assert fine.state == "ok"
    assert full.state == "failed"
    # 3 processes x 4 workers x 10^9 steps ahead x 2 micro-batches x 16 rows of 64 floats, 1 label
    assert f"{3 * 4 * 10**9 * 2 * 16 * 264 / 2**30:.1f} GiB needed" in full.told
    assert "--shm-size" in full.fix


def test_the_exit_code_is_that_of_the_worst():
    def found(*states):
        return [Finding("", state, "") for state in states]

    assert exit_code(found("ok", "skipped")) == 0
    assert exit_code(found("ok", "warning")) == 1
    assert exit_code(found("warning", "failed", "ok")) == 2


CGROUPS = {
    "v2, the limit at the container's root": (
        "0::/\n",
        {"cpu.max": "150000 100000", "memory.max": "2147483648"},
        1.5,
        2**31,
    ),
    "v2, the strictest is above": (
        "0::/pod/box\n",
        {
            "pod/cpu.max": "300000 100000",
            "pod/box/cpu.max": "max 100000",
            "pod/memory.max": "max",
        },
        3.0,
        None,
    ),
    "v2, the path of the host": ("0::/host/only\n", {"cpu.max": "50000 100000"}, 0.5, None),
    "v1": (
        "4:cpu,cpuacct:/box\n3:memory:/box\n1:name=systemd:/\n",
        {
            "cpu/box/cpu.cfs_quota_us": "400000",
            "cpu/box/cpu.cfs_period_us": "100000",
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/box/memory.limit_in_bytes": "1073741824",
            "memory/memory.limit_in_bytes": "9223372036854771712",
        },
        4.0,
        2**30,
    ),
    "no cgroups": ("", {}, None, None),
}


@pytest.mark.parametrize("kind", CGROUPS)
def test_the_limits_of_a_container_are_read(tmp_path, kind):
    own, files, quota, memory = CGROUPS[kind]
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    found = limits(tmp_path / "cgroup", tmp_path / "own")
    assert (found.quota, found.memory_bytes) == (quota, memory)
    assert found.cores == max(1, min(found.affinity, int(quota or found.affinity)))


def test_memory_is_what_the_container_leaves_and_files_in_its_cache_are_free(tmp_path):
    (tmp_path / "own").write_text("0::/box\n")
    box = tmp_path / "cgroup/box"
    box.mkdir(parents=True)
    (box / "memory.max").write_text("1000000000\n")
    (box / "memory.current").write_text("700000000\n")
    (box / "memory.stat").write_text("anon 100000000\nfile 600000000\nkernel 1\n")
    assert memory_each(3, tmp_path / "cgroup", tmp_path / "own") == 300_000_000
    (box / "memory.stat").write_text("")
    assert memory_each(1, tmp_path / "cgroup", tmp_path / "own") == 300_000_000


def test_workers_follow_the_cores():
    cores = limits().cores
    assert workers_each(1) == min(8, cores - 1)
    assert workers_each(cores) == workers_each(cores + 1) == 0


@pytest.mark.parametrize("url", ["http://wandb.example.com:99999", "http://[::1", "https://a:b"])
def test_an_address_of_wandb_that_is_none_is_a_mistake_and_no_bug(url, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", url)
    [finding] = _wandb(Asked())
    assert (finding.state, finding.fix) == ("warning", "Correct or unset it.")
    assert finding.told.startswith("WANDB_BASE_URL is no address of a server: ")
