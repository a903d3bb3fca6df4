"""An elastic job whose run lives in an object store: nodes without a shared disk come and go."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stored
from commands import BIN, CLEAN, DEADLINE_SECONDS, evenstep, start
from elastic_nodes import Nodes, elastic_nodes, ended, require_undisturbed
from injuring import descendants, until
from stored import brought_back, local_run, steps_in, store_at, uploading_of
from stores import BUCKET, Proxy, Server, free_port

from launch.stored.following import Following
from service.basics.errors import EvenstepError, PeerLost, SpecError, Stopped
from service.runs.checkpoint_files import Checkpoint, damage_of
from service.runs.directory import RunDirectory
from service.runs.metrics_file import read_metrics
from service.storage.address import Address, address_in

pytest.importorskip("moto", reason="needs moto, flask and flask-cors")
pytest.importorskip("botocore", reason="needs botocore")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a killed launcher ends its ranks")

LEASE = {"EVENSTEP_LEASE_SECONDS": "1.5"}
CLUSTER = {"JOB_COMPLETION_INDEX": "set by an Indexed Job"}
SHARDED = {"exchange": {"mode": "sharded"}}
numbers = itertools.count()


server = stored.server
place = stored.place


@pytest.fixture
def address(server: Server, monkeypatch: pytest.MonkeyPatch) -> Address:
    """An address of runs that no other test uses; the environment is that of its client."""
    for name, value in (server.variables | LEASE).items():
        monkeypatch.setenv(name, value)
    found = address_in(f"s3://{BUCKET}/elastic-{next(numbers)}")
    assert found is not None
    return found


def lose_disk(nodes: Nodes, index: int) -> None:
    """Remove the scratch directory of a node: it starts again on an empty machine."""
    shutil.rmtree(nodes.place / f"disk-{index}")


def require_whole(nodes: Nodes, to: Path) -> None:
    """What the store holds has each step once, and good checkpoints."""
    assert nodes.address is not None
    at_end = brought_back(nodes.address, to)
    assert [row["step"] for row in read_metrics(at_end.metrics)] == [*range(1, nodes.steps + 1)]
    assert at_end.read_facts()["state"] == "done"


def store_variables(server: Server, address: Address, **more: str) -> dict[str, Any]:
    """What `elastic_nodes` needs for a run in the store; few steps, as each save is uploaded."""
    return {"address": address, "steps": 200, **server.variables, **LEASE, **more}


def test_a_sender_and_then_node_0_are_lost_with_their_disks_and_no_step_is_different(
    server: Server, address: Address, tmp_path: Path
) -> None:
    """Meanwhile the store takes nothing, and the next generation waits until it does; and it
    gives nothing to a node, which waits too."""
    more = store_variables(server, address, **CLUSTER)
    with (
        Proxy(server) as proxy,
        Proxy(server) as other,
        elastic_nodes(tmp_path, "1:2", sections=SHARDED, **more) as nodes,
    ):
        through = {"AWS_ENDPOINT_URL": proxy.server.url}
        first, second = nodes.start(0, **through), nodes.start(1)
        nodes.until_saved()
        nodes.kill_in_the_midst_of_a_save(second)
        nodes.until_said("Generation 2: 1 of 1:2 nodes (0).")
        nodes.until_saved()
        proxy.harm = lambda method, path: 503 if method == "PUT" and "/data/" in path else None
        lose_disk(nodes, 1)
        second = nodes.start(1)
        nodes.until_said("The other nodes wait for the upload: ")
        assert "Generation 3" not in nodes.output(0)
        second.kill()  # and it is lost again before the upload is through
        second.wait(DEADLINE_SECONDS)
        proxy.harm = lambda method, path: None
        nodes.until_said("Generation 3: 1 of 1:2 nodes (0).")
        lose_disk(nodes, 1)
        other.harm = lambda method, path: 503 if "/model.safetensors" in path else None
        second = nodes.start(1, AWS_ENDPOINT_URL=other.server.url)
        nodes.until_said("Generation 4: 2 of 1:2 nodes (0, 1).")
        nodes.until_said("This node waits for the next generation.", by=1)
        other.harm = lambda method, path: None
        nodes.until_said("Generation 5: 1 of 1:2 nodes (0).")
        nodes.until_said("Generation 6: 2 of 1:2 nodes (0, 1).")
        nodes.until_saved()
        *_, resumed = re.findall(r"Resuming after step (\d+) ", nodes.output(0))
        assert f"(step-{int(resumed):08d}) in" in nodes.output(1)
        other.harm = lambda method, path: 503
        first.kill()
        nodes.until_said("Node 0 (127.0.0.1) is gone.", by=1)
        nodes.until_said("This node waits for node 0, which needs the store too.", by=1)
        other.harm = lambda method, path: None
        lose_disk(nodes, 0)
        first = nodes.start(0, **through)
        nodes.until_said("Generation 7: 2 of 1:2 nodes (0, 1).")
        nodes.release()
        assert [ended(first), ended(second)] == [0, 0], nodes.everything()
        require_undisturbed(nodes)
        require_whole(nodes, tmp_path / "end")


def test_a_sender_of_two_fixed_nodes_is_lost_in_the_midst_of_a_save(
    server: Server, address: Address, tmp_path: Path
) -> None:
    more = store_variables(server, address)
    with elastic_nodes(tmp_path, "2", sections=SHARDED, **more) as nodes:
        first, second = nodes.start(0), nodes.start(1)
        nodes.until_saved()
        nodes.kill_in_the_midst_of_a_save(second)
        assert ended(first) == PeerLost.exit_code, nodes.everything()
        saved = nodes.saved_step
        assert saved, "the checkpoint before is in the store"
        for index in (0, 1):
            lose_disk(nodes, index)
        nodes.release()
        both = [nodes.start(index) for index in (0, 1)]
        assert [ended(each) for each in both] == [0, 0], nodes.everything()
        assert f"Resuming after step {saved} " in nodes.output(0)
        require_undisturbed(nodes)
        require_whole(nodes, tmp_path / "end")


def test_a_leader_that_returns_after_its_lease_publishes_nothing_and_a_stop_is_uploaded(
    server: Server, address: Address, tmp_path: Path
) -> None:
    """Node 0 is frozen; meanwhile another launcher, of another rendezvous, gets the run."""
    lease = {"EVENSTEP_LEASE_SECONDS": "6"}
    more = store_variables(server, address, **lease)
    bits = {"exactness": "bitwise"}
    elsewhere = {
        "EVENSTEP_SCRATCH": str(tmp_path / "elsewhere"),
        "PET_MASTER_PORT": str(free_port()),
    }
    with elastic_nodes(tmp_path, "1:2", sections=bits, wait_seconds=2, **more) as nodes:
        first, second = nodes.start(0), nodes.start(1)
        nodes.until_said("Generation 1: 2 of 1:2 nodes (0, 1).")
        nodes.until_saved()
        alone = ("run", "job.yaml", "--runs", str(address))
        refused = evenstep(*alone, cwd=tmp_path, **nodes.client, **lease, **elsewhere)
        assert refused.returncode == SpecError.exit_code, refused.stderr
        assert f"is being written by process {first.pid} of " in refused.stderr

        first.send_signal(signal.SIGSTOP)  # its process goes on with that of node 1
        saved = nodes.saved_step
        other = nodes.start(0, name="other", **elsewhere)
        nodes.until_said("Generation 1: 1 of 1:2 nodes (0).", by="other")
        nodes.until_saved()
        first.send_signal(signal.SIGCONT)
        assert ended(first) == EvenstepError.exit_code, nodes.everything()
        assert "another launcher has taken this run over" in nodes.output(0)
        assert ended(second) == Stopped.exit_code, nodes.everything()

        other.send_signal(signal.SIGTERM)
        assert ended(other) == Stopped.exit_code, nodes.everything()
        assert f"Everything is in {address}/job." in nodes.output("other")
        assert f"Resuming after step {saved} " in nodes.output("other")
        last = brought_back(address, tmp_path / "stopped").read_facts()["attempts"][-1]
        assert last["to_step"] == nodes.saved_step
        nodes.release()
        assert ended(nodes.start(0, name="third")) == 0, nodes.everything()
        require_undisturbed(nodes, bits=True)
        require_whole(nodes, tmp_path / "end")


@pytest.mark.parametrize("fault", ["deleted in the store", "damaged here", "damaged everywhere"])
def test_what_a_generation_resumes_from_is_good_here_and_in_the_store(
    address: Address, place: Path, tmp_path: Path, fault: str
) -> None:
    run = local_run(place, tmp_path / "local", 4, 8)
    said: list[str] = []
    uploading = uploading_of(address, run, said.append)
    uploading.start(when_lost=lambda: None)
    until(lambda: steps_in(address) == [4, 8], "both checkpoints in the store")
    store = store_at(address / "job")
    if "everywhere" in fault:
        store.remove(name for name in store.sizes("data/") if "step-00000008/model" in name)
    if "here" in fault:
        damaged = run.checkpoints / "step-00000008/model.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    if fault == "deleted in the store":
        store.remove(name for name in store.sizes("data/") if "step-00000008/model" in name)
    offer = uploading.offer(fresh=False)
    until(lambda: offer.is_settled, "what other nodes bring")
    assert uploading.finish(lambda: 60) is None
    good = 4 if fault == "damaged everywhere" else 8
    assert offer.checkpoint == f"step-{good:08d}"
    bringing = Following(address / "job", tmp_path / "disk", node=1, say=print)
    bringing.resume({"term": offer.term, "checkpoint": offer.checkpoint})
    for each in (run, RunDirectory(bringing.runs / "job")):
        checkpoint = Checkpoint(each.checkpoints / offer.checkpoint, good)
        assert damage_of(checkpoint) is None
    with pytest.raises(PeerLost, match="has gone on from"):
        bringing.resume({"term": offer.term + 1, "checkpoint": offer.checkpoint})


def under_torchrun(nodes: Nodes, index: int, port: int) -> subprocess.Popen[bytes]:
    """One of the nodes of a torchrun with a range of nodes, on a disk of its own."""
    conf = "is_host=0,last_call_timeout=2"
    words: list[object] = [BIN / "torchrun", "--nnodes", "1:2", "--nproc-per-node", 1]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]
    words += ["--rdzv-conf", conf, "--max-restarts", 3, "--monitor-interval", "0.2"]
    words += ["-m", "launch", "run", "job.yaml", "--runs", nodes.address]
    variables = {"EVENSTEP_SCRATCH": str(nodes.place / f"disk-{index}"), "EVENSTEP_DEVICE": "cpu"}
    # A node may need a minute to join, on a busy machine.
    variables |= LEASE | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PAUSE_SECONDS": "0.3"}
    with (nodes.place / f"node-{index}.log").open("ab") as log:
        return start(
            [str(word) for word in words],
            cwd=nodes.place,
            env=CLEAN | nodes.client | variables,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def leads(torchrun: subprocess.Popen[bytes]) -> bool:
    """Whether rank 0 is on this node: it trains in a child of the process that uploads."""
    mark = b"\0EVENSTEP_BROUGHT_TO="
    found = (Path(f"/proc/{each}/environ") for each in descendants(torchrun.pid))
    return any(mark in each.read_bytes() for each in found)


@pytest.mark.slow
def test_a_node_joins_a_torchrun_that_goes_on_without_the_node_of_rank_0(
    server: Server, address: Address, tmp_path: Path
) -> None:
    from torch.distributed import TCPStore

    rendezvous = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sections = {"checkpoint": {"every_steps": 1}}
    more = store_variables(server, address)
    with elastic_nodes(tmp_path, "1:2", sections=sections, **more) as nodes:
        started = [under_torchrun(nodes, 0, rendezvous.port)]
        try:
            nodes.until_saved()
            started += [under_torchrun(nodes, 1, rendezvous.port)]
            until(lambda: "Brought" in nodes.output(0) + nodes.output(1), "two nodes")
            nodes.until_saved()
            first, left = sorted(started, key=leads, reverse=True)
            for process in (first.pid, *descendants(first.pid)):
                os.kill(process, signal.SIGKILL)
            nodes.until_saved(2)  # more than the lost node can have been uploading
            nodes.release()
            assert ended(left) == 0, nodes.everything()
        finally:
            for each in started:
                each.kill()
                each.wait()
        assert "torchrun itself may end" not in nodes.everything()
        require_undisturbed(nodes)
        require_whole(nodes, tmp_path / "end")
