"""Cost and benefit of `exchange.mode: sharded`: memory, and time of a step, a save and a resume.

python -m benchmarks.sharded [memory | step | save]      (all of them)

A decoder of the recipe gpt with 25 million weights (100 MB, AdamW: 400 MB with gradients and state)
on rows of 32 characters, over gloo:

memory  how far the resident memory of the largest of 2 and 4 fresh processes rises, from before
        the model is made to the end of the run, against one process that holds all of it. Each has
        trained a small model before, so that code and threads do not count.
step    compared with a hand-written loop on torch's `fully_shard`, in alternating pairs of runs:
        time, processor time of a process (which other programs disturb less), and page faults.
save    how long a save blocks training, compared with torch.save of the whole state by one process;
        the pass that follows, while which the state is copied, compared with one without a save;
        and a resume against torch's DCP, that loads the same state into the same sharded model.
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
import torch
from jobs import train_in_process
from processes import Processes
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

from service.checkpoints.checkpoints import Checkpoints
from service.data.task import Task, load_task, supervised
from service.distributed.stragglers import peak_bytes
from service.distributed.world import World
from service.health.heartbeat import Heartbeat
from service.plan.plan import make_plan
from service.recipes import gpt
from service.recipes.text import characters, nats
from service.sharding.sharding import units_of
from service.spec.files import load_spec
from service.training.setup import prepare_training

SIZES = {"width": 512, "layers": 8, "heads": 8, "length": 32, "dropout": 0.0}
ROWS, STEPS, WARM, PAIRS = 8, 12, 4, 3
MIB = 1 << 20


def task(**sizes: Any) -> Task:
    """The decoder, some rows to train on, and so few to test on that it takes no time."""
    sized = gpt.task(**SIZES | sizes)
    book = sized.train_data()
    return supervised(
        model=sized.model,
        train=TensorDataset(*book[: ROWS * STEPS]),
        test=TensorDataset(*book[:8]),
        loss=nats,
        weight=characters,
    )


def model() -> nn.Module:
    return gpt.task(**SIZES).model()


def job_of(mode: str, **sections: Any) -> dict[str, Any]:
    return {
        "name": "job",
        "task": f"{Path(__file__)}:task",
        "batch": {"global_batch": ROWS, "micro_batch": 2},
        "length": {"steps": STEPS},
        "optimizer": {"name": "adamw", "lr": 0.0001},
        "max_grad_norm": 1.0,
        "tracking": {"log_every_steps": 4},
        "exchange": {"mode": mode},
        "test": {"micro_batch": 4},
        **sections,
    }


# ---- memory


def risen_bytes(world: World, job: dict[str, Any], runs: Path) -> int:
    """The increase of this process's resident memory during training."""
    import torch.distributed.fsdp  # exclude the memory of torch itself

    assert torch.distributed.fsdp
    small = {"name": "small", "task_args": {"width": 64, "layers": 2}}
    train_in_process(world, job | small, runs)
    before = psutil.Process().memory_info().rss
    train_in_process(world, job, runs)
    return peak_bytes(world.device) - before


def memory() -> None:

    def risen(count: int, passes: int, **exchange: Any) -> float:
        job = job_of("sharded" if count > 1 else "ddp", length={"steps": 3})
        spec = job | {
            "batch": {"global_batch": ROWS, "micro_batch": ROWS // count // passes},
            "checkpoint": {"asynchronous": False},
            "exchange": job["exchange"] | exchange,
        }
        with Processes(count) as fresh, tempfile.TemporaryDirectory() as place:
            return max(fresh.run(risen_bytes, spec, Path(place), timeout_seconds=280)) / MIB

    unit = max(sum(p.nbytes for p in u.parameters()) for u in units_of(model()).values()) / MIB
    whole = risen(1, 4)
    print(f"largest unit {unit:.0f} MiB; one process, whole: {whole:.0f} MiB")
    print(
        "| processes | micro-batches of each | MiB of largest | whole / W + largest unit | ratio |"
    )
    print("|--:|---|--:|--:|--:|")
    each = {"sync_each_micro_batch": True}
    for count, passes, how, exchange in (
        (2, 1, "1", {}),
        (4, 1, "1", {}),
        (2, 2, "2, each synced", each),
        (2, 2, "2", {}),
        (2, 1, "1, return_memory: false", {"return_memory": False}),
        (4, 1, "1, return_memory: false", {"return_memory": False}),
    ):
        found, goal = risen(count, passes, **exchange), whole / count + unit
        print(f"| {count} | {how} | {found:.0f} | {goal:.0f} | {found / goal:.2f} |", flush=True)


# ---- the step


class Laps:
    """Of the steps of an optimizer: the medians of time, processor time and page faults."""

    def __init__(self) -> None:
        self._laps: list[tuple[float, float, int]] = []

    def __enter__(self) -> Laps:
        self._hook = register_optimizer_step_post_hook(lambda *_: self._laps.append(self._now()))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _now(self) -> tuple[float, float, int]:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return time.perf_counter(), time.process_time(), faults

    def medians(self) -> list[float]:
        steps = zip(self._laps[WARM:], self._laps[WARM + 1 :], strict=False)
        lasted = [[end - begin for begin, end in zip(*both, strict=True)] for both in steps]
        return [statistics.median(each) for each in zip(*lasted, strict=True)]


def by_hand(world: World) -> list[float]:
    """The laps of a loop on `fully_shard`, of the same rows, model and optimizer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)  # the same weights on both
    decoder, rows = model(), task().train_data()
    mesh = init_device_mesh("cpu", (world.processes,))
    for block in decoder.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(decoder, mesh=mesh)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.0001)
    passes = ROWS // 2 // world.processes
    with Laps() as laps:
        for step in range(STEPS):
            optimizer.zero_grad()
            for number in range(passes):
                decoder.set_requires_gradient_sync(number == passes - 1)  # type: ignore[operator]
                first = step * ROWS + (world.index * passes + number) * 2
                read, following = rows[first : first + 2]
                losses = nn.functional.cross_entropy(decoder(read), following, reduction="sum")
                (losses * world.processes / (ROWS * SIZES["length"])).backward()
            torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
    return laps.medians()


def in_a_run(world: World, job: dict[str, Any], runs: Path) -> list[float]:
    """The laps of a run."""
    with Laps() as laps:
        train_in_process(world, job, runs)
    return laps.medians()


def step() -> None:
    print("| return_memory | | hand-written | Evenstep | ratio of each pair |")
    print("|---|---|--:|--:|---|")
    for returned in (True, False):
        job = job_of("sharded", exchange={"mode": "sharded", "return_memory": returned})
        pairs = []
        with Processes(2) as theirs, Processes(2) as pool:  # a run changes settings of its process
            for _ in range(PAIRS):
                with tempfile.TemporaryDirectory() as place:
                    hand = theirs.run(by_hand, timeout_seconds=280)
                    own = pool.run(in_a_run, job, Path(place), timeout_seconds=280)
                pairs.append(
                    [[max(each) for each in zip(*both, strict=True)] for both in (hand, own)]
                )
        for place, (what, unit) in enumerate(
            (("ms", 1000), ("ms of a processor", 1000), ("page faults", 1))
        ):
            each = [(hand[place] * unit, own[place] * unit) for hand, own in pairs]
            hand_written, evenstep = (statistics.median(of) for of in zip(*each, strict=True))
            told = ", ".join(f"{own / max(hand, 1):.2f}" for hand, own in each)
            figures = f"{what} | {hand_written:.0f} | {evenstep:.0f} | {told}"
            print(f"| {str(returned).lower()} | {figures} |", flush=True)


# ---- saves and resumes


def saved_and_read(world: World, place: Path) -> dict[str, float]:
    """Seconds of this process: the stall of a save; a resume; DCP's save and load."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    spec = load_spec(job_of("sharded"))
    made = load_task(spec.task, spec.task_args, seed=spec.seed)
    plan = make_plan(
        spec, processes=world.processes, train_rows=made.train_rows, test_rows=made.test_rows
    )
    prepared = prepare_training(plan, made, world, heartbeat=Heartbeat(), say=lambda text: None)
    state = prepared.state
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    found: dict[str, float] = {}
    checkpoints = Checkpoints(
        place / "ours", world=world, spec=spec.checkpoint, facts={}, say=lambda text: None
    )
    checkpoints.reserve(prepared.saved_bytes)
    read, following = made.train_data()[: ROWS // 2]
    passes: dict[bool, list[float]] = {False: [], True: []}
    for number in range(8):  # the first makes the buffer and the group of the writers
        saving = number % 2 == 0
        state.step = number
        world.barrier()
        began = time.perf_counter()
        if saving:
            checkpoints.save(state)
        losses = nn.functional.cross_entropy(state.model(read), following, reduction="sum")
        losses.backward()
        state.permit_update()
        passes[saving].append(time.perf_counter() - began)
        state.zero_grad()
        if saving:
            stalled = checkpoints.timings()["save/stall_seconds"]
            found["stall"] = min(found.get("stall", 1e9), stalled)
        checkpoints.finish()
    found["pass with a save"] = statistics.median(passes[True])
    found["pass"] = statistics.median(passes[False])
    found |= _least(world, "resume", lambda: checkpoints.restore(state))
    checkpoints.close()
    theirs = {
        "model": state.model.state_dict(),
        "optimizer": get_optimizer_state_dict(state.model, state.optimizer),
    }
    dcp.save(theirs, checkpoint_id=place / "dcp")
    return found | _least(world, "dcp", lambda: dcp.load(theirs, checkpoint_id=place / "dcp"))


def _least(world: World, name: str, act: Any) -> dict[str, float]:
    """The least of three: seconds until all processes are done, and of this one's processor."""
    found = []
    for _ in range(3):
        world.barrier()
        began, ran = time.perf_counter(), time.process_time()
        act()
        ran = time.process_time() - ran
        world.barrier()
        found.append((time.perf_counter() - began, ran))
    lasted, ran = (min(each) for each in zip(*found, strict=True))
    return {name: lasted, f"{name}, processor": ran}


def seconds_of_torch_save(place: Path) -> float:
    decoder = model()
    optimizer = torch.optim.AdamW(decoder.parameters())
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found = []
    for _ in range(3):
        began = time.perf_counter()
        torch.save({"m": decoder.state_dict(), "o": optimizer.state_dict()}, place / "whole.pt")
        found.append(time.perf_counter() - began)
    return min(found)


def save() -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        whole = seconds_of_torch_save(place)
        with Processes(2) as pool:
            each = pool.run(saved_and_read, place, timeout_seconds=280)
    stall = max(one["stall"] for one in each)
    print("| | seconds | against | ratio |\n|---|--:|---|--:|")
    print(f"| stall of a save | {stall:.4f} | {whole:.3f}, torch.save | {stall / whole:.2f} |")
    saving, alone = (max(one[what] for one in each) for what in ("pass with a save", "pass"))
    print(f"| a save and a pass | {saving:.3f} | {alone:.3f}, a pass | {saving / alone:.2f} |")
    for what in ("", ", processor"):
        resume, theirs = (max(one[f"{key}{what}"] for one in each) for key in ("resume", "dcp"))
        print(f"| resume{what} | {resume:.3f} | {theirs:.3f}, DCP's load | {resume / theirs:.2f} |")


if __name__ == "__main__":
    asked = sys.argv[1:] or ["memory", "step", "save"]
    for what in asked:
        print(f"\n{what}")
        {"memory": memory, "step": step, "save": save}[what]()
