"""Between logged steps nothing waits for the device.

Whoever reads a number off a GPU waits for all the work that is queued on it. On any device it goes
through the same operators, which a profile of the steps in question must not contain.
"""

import json

import pytest
from commands import evenstep

# What torch calls where Python, or a shape, needs a value that lies on the device.
WAITING = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique2",
}
JOB = ("run", "digits", "length={steps: 40}", "schedule={}", "tracking.wandb=", "test={}")
ADAMW = "optimizer={name: adamw, lr: 0.001, fused: true}"


def operators(tmp_path, *words):
    """Names of all operators of steps 12 to 19; logged are steps 10 and 20."""
    done = evenstep(*JOB, "--profile", "12:8", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trace = json.loads((tmp_path / "runs/digits/profile/rank-0.json").read_text())["traceEvents"]
    events = [event for event in trace if event.get("ph") == "X"]
    names = [event["name"] for event in events]
    assert sorted(n for n in names if n.startswith("step ")) == [f"step {n}" for n in range(12, 20)]
    assert "aten::convolution_backward" in names
    # The fused kernels of the CPU read the count of their steps, which lies there; those of a GPU
    # have it beside the weights.
    fused = [event for event in events if event["name"].startswith("aten::_fused_")]
    return {event["name"] for event in events if not any(within(event, f) for f in fused)}


def within(event, other):
    ends_in_it = event["ts"] + event["dur"] <= other["ts"] + other["dur"]
    return event["tid"] == other["tid"] and event["ts"] > other["ts"] and ends_in_it


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--processes", 2),
        ("max_grad_norm=1.0", "max_grad_value=0.5"),
        ("model.moving_average=0.99", "model.precision=bf16"),
        ("faults.on_non_finite=skip", ADAMW),
        ("exchange.precision=bf16", "--processes", 2),
    ],
    ids=lambda words: " ".join(map(str, words)) or "default",
)
def test_no_step_waits_for_the_device(tmp_path, words):
    words = tuple(map(str, words))
    assert operators(tmp_path, *words) & WAITING == set()


def test_a_logged_step_does(tmp_path):
    # Otherwise the test above would prove nothing.
    found = operators(tmp_path, "tracking.log_every_steps=5")
    assert found & WAITING
