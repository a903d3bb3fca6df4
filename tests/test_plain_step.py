"""A step without torch's wrapper is the same step, and whoever attends the wrapper gets it."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from service.optimization.learning_rates import Schedule
from service.optimization.optimizers import plain_step
from service.optimization.train_state import TrainState


def state_of(kind=torch.optim.AdamW, **options):
    torch.manual_seed(3)
    model = nn.Linear(5, 2)
    optimizer = kind(model.parameters(), lr=0.1, **options)
    return TrainState(model, optimizer, Schedule(optimizer, lambda step: 1.0))


def stepped(state, take_step, times=3):
    for n in range(times):
        state.zero_grad()
        state.model(torch.full((4, 5), n + 1.0)).pow(2).sum().backward()
        take_step()
    return [p.detach().clone() for p in state.model.parameters()]


KINDS = [
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.AdamW, {"foreach": True}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.Adafactor, {}),
    (torch.optim.Rprop, {}),
]


@pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=lambda value: getattr(value, "__name__", "")
)
def test_it_takes_the_same_step(kind, options):
    ours, torchs = state_of(kind, **options), state_of(kind, **options)
    assert plain_step(ours.optimizer) is not None
    mine = stepped(ours, ours.take_step)
    theirs = stepped(torchs, torchs.optimizer.step)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_hooks_of_the_optimizer_are_called():
    state, seen = state_of(), []
    state.optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    state.optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    stepped(state, state.take_step, times=2)
    assert seen == ["pre", "post"] * 2


def test_hooks_of_all_optimizers_are_called():
    state, seen = state_of(), []
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append("all"))
    try:
        stepped(state, state.take_step, times=1)
    finally:
        handle.remove()
    assert seen == ["all"]


def test_a_profiler_sees_the_label():
    state = state_of()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stepped(state, state.take_step, times=1)
    assert "Optimizer.step#AdamW.step" in {event.name for event in profile.events()}


def test_what_stands_in_the_place_of_step_stays_there():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    StepLR(optimizer, 5)  # counts the steps by a method of its own on this optimizer
    assert plain_step(optimizer) is None
