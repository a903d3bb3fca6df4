"""What processes tell each other in pairs comes to what they would tell each other in a ring."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from service.distributed import recursive_doubling
from service.distributed.recursive_doubling import MOST_BYTES, RecursiveDoubling, Tree
from service.distributed.world import World, accelerator_for
from service.spec.models import ExchangeSpec

SIZES = [2, 3, 4, 5]


def rows_of(rank: int, kind: torch.dtype, count: int) -> torch.Tensor:
    """Numbers that differ from rank to rank, and whose sums have to be rounded."""
    generator = torch.Generator().manual_seed(rank)
    if kind.is_floating_point:
        return torch.randn(count, generator=generator, dtype=torch.float64).to(kind)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def summed(world, kind, count):
    values = rows_of(world.index, kind, count)
    total = world.sum_of_integers(values) if kind == torch.int64 else world.sum(values)
    untouched = torch.equal(values, rows_of(world.index, kind, count))
    return total, untouched


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_sum_is_that_of_all_and_the_same_bits_everywhere(processes, size, kind):
    answers = processes(size).run(summed, kind, 1001)
    wanted = sum(rows_of(rank, kind, 1001) for rank in range(size))
    for total, untouched in answers:
        assert untouched, "a sum is a new tensor"
        assert torch.equal(total, answers[0][0])
        if kind == torch.int64:
            assert torch.equal(total, wanted), "modulo 2**64"
        else:
            torch.testing.assert_close(total, wanted)


def summed_both_ways(world, kind):
    tree = rows_of(world.index, kind, 101)
    pairs = tree.clone()
    Tree(dist.group.WORLD).combine(tree)
    RecursiveDoubling(dist.group.WORLD).combine(pairs)
    return tree, pairs


@pytest.mark.parametrize("size", SIZES)
def test_over_a_tree_a_sum_has_the_same_bits(processes, size):
    for kind in (torch.float32, torch.int64):
        answers = processes(size).run(summed_both_ways, kind)
        for tree, pairs in answers:
            assert torch.equal(tree, pairs)
            assert torch.equal(tree, answers[0][1])


def highest(world):
    values = [world.index, -world.index, (world.index * 7) % 5]
    return world.highest(values)


@pytest.mark.parametrize("size", SIZES)
def test_the_highest_of_each_value_is_found(processes, size):
    wanted = [size - 1, 0, max(rank * 7 % 5 for rank in range(size))]
    assert processes(size).run(highest) == [wanted] * size


def transposed(world):
    return world.sum(torch.arange(6.0).reshape(2, 3).T + world.index)


def test_a_tensor_laid_out_otherwise_is_summed_as_well(processes):
    wanted = 3 * torch.arange(6.0).reshape(2, 3).T + 3
    for total in processes(3).run(transposed):
        assert torch.equal(total, wanted)


def messages_sent(world, elements):
    """How many messages a sum is sent by, as the profiler sees them, and the sum."""
    values = torch.full((elements,), 1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        total = world.sum(values)
    names = [event.name for event in profile.events()]
    return sum(n == "gloo:send" for n in names), float(total.min()), float(total.max())


def test_many_numbers_go_round_the_ring(processes):
    few, many = MOST_BYTES // 4, MOST_BYTES // 4 + 1
    assert processes(4).run(messages_sent, few) == [(2, 4.0, 4.0)] * 4
    assert processes(4).run(messages_sent, many) == [(0, 4.0, 4.0)] * 4


def gradients(world, width):
    """(the gradient of DDP, the mean of those of all processes by themselves)."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, width), nn.Tanh(), nn.Linear(width, 3))
    inputs = torch.randn(7, 9, generator=torch.Generator().manual_seed(world.index))
    model(inputs).pow(2).sum().backward()
    own = torch.cat([p.grad.flatten() for p in model.parameters()])
    dist.all_reduce(own)
    model.zero_grad()
    wrapped = world.wrap(model, find_unused=False, spec=ExchangeSpec())
    for _ in range(3):
        model.zero_grad()
        wrapped(inputs).pow(2).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), own / world.processes


@pytest.mark.parametrize("width", [11, 20_000], ids=["few", "many"])
def test_ddp_has_the_mean_of_the_gradients(processes, width):
    assert (13 * width * 4 > MOST_BYTES) == (width == 20_000)
    answers = processes(3).run(gradients, width)
    for found, wanted in answers:
        torch.testing.assert_close(found, wanted)
        assert torch.equal(found, answers[0][0]), "weights must not drift apart"


def stacked(world, elements):
    values = rows_of(world.index, torch.float32, elements)
    return world.stack(values)


@pytest.mark.parametrize("elements", [7, MOST_BYTES // 4], ids=["few", "many"])
def test_values_stand_by_rank(processes, elements):
    wanted = torch.stack([rows_of(rank, torch.float32, elements) for rank in range(3)])
    for found in processes(3).run(stacked, elements):
        assert torch.equal(found, wanted)


def sends_of_a_backward_pass(world, width):
    """How many messages of pairs, and how many rings, the exchange of gradients takes."""
    model = nn.Sequential(nn.Linear(9, width), nn.Linear(width, 3))
    wrapped = world.wrap(model, find_unused=False, spec=ExchangeSpec())
    for _ in range(2):
        wrapped(torch.ones(7, 9)).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        wrapped(torch.ones(7, 9)).sum().backward()
    names = [event.name for event in profile.events()]
    return names.count("gloo:send"), names.count("gloo:all_reduce")


def test_few_gradients_meet_in_pairs_and_many_go_round(processes):
    assert processes(4).run(sends_of_a_backward_pass, 11) == [(2, 0)] * 4
    many = processes(4).run(sends_of_a_backward_pass, 20_000)
    assert all(sends == 0 and rings > 0 for sends, rings in many)


# ---- a barrier


def times_at_a_barrier(world, late, over_a_tree):
    """When this process came to the barrier, and when it went on."""
    if world.index == late:
        time.sleep(0.3)
    came = time.monotonic()
    if over_a_tree:
        Tree(dist.group.WORLD).combine(torch.zeros(1))
    else:
        world.barrier()
    return came, time.monotonic()


@pytest.mark.parametrize(("size", "late"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (5, 4)])
def test_nobody_passes_a_barrier_before_all_have_come(processes, size, late):
    came, went_on = zip(*processes(size).run(times_at_a_barrier, late, False), strict=True)
    assert max(came) <= min(went_on)


def kinds_of_sums(world, many):
    """How a world agrees, and how it sums gradients, if so many processes are many."""
    before, recursive_doubling.MANY = recursive_doubling.MANY, many
    try:
        another = World(accelerator_for("cpu"))
    finally:
        recursive_doubling.MANY = before
    return type(another._pairs).__name__, type(another._gradients).__name__


def test_many_processes_agree_over_a_tree(processes):
    pool = processes(2)
    assert pool.run(kinds_of_sums, 2) == [("Tree", "RecursiveDoubling")] * 2
    assert pool.run(kinds_of_sums, 3) == [("RecursiveDoubling", "RecursiveDoubling")] * 2


@pytest.mark.parametrize("late", [0, 1, 3, 4])
def test_nobody_passes_a_barrier_over_a_tree_before_all_have_come(processes, late):
    came, went_on = zip(*processes(5).run(times_at_a_barrier, late, True), strict=True)
    assert max(came) <= min(went_on)


# Each process of a job is a thread, and all write into one store; a socket has an end in two.
CONNECTED = """
import os, sys, threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
import torch
from torch.distributed import HashStore, ProcessGroupGloo
from service.distributed.recursive_doubling import agreements, meet

processes = int(sys.argv[1])
store, turn = HashStore(), threading.Barrier(processes)

def connect(rank):
    group = ProcessGroupGloo(store, rank, processes, timedelta(seconds=60))
    files = []
    for act in (lambda: None, lambda: meet(group), lambda: add(group)):
        act()
        turn.wait()
        if rank == 0:
            files.append(len(os.listdir("/proc/self/fd")))
        turn.wait()
    return group, files

def add(group):
    total = torch.ones(1)
    agreements(group).combine(total)
    assert total == processes

with ThreadPoolExecutor(processes) as pool:
    groups, files = zip(*pool.map(connect, range(processes)))
print(*files[0], flush=True)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(("processes", "files"), [(16, 4 * 16), (64, 2 * 63)])
def test_a_barrier_connects_the_pairs_that_sums_use(tmp_path, processes, files):
    """Four for each of 16 processes, those of a tree for 64, and no more for the sums after it."""
    lazy = {"TORCH_GLOO_LAZY_INIT": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-c", CONNECTED, str(processes)],
        env=os.environ | lazy,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    before, met, summed_up = map(int, done.stdout.split())
    assert met - before == files, done.stderr
    assert summed_up == met
