"""A W&B sweep: the real agent starts our command with its own arguments and ids."""

import subprocess

import pytest
from commands import BIN, CLEAN, DEADLINE_SECONDS, OFFLINE, evenstep
from wandb_log import read_segments
from wandb_server import WandBServer

from service.runs.tracking import read_metrics
from service.spec.files import load_spec

TRIALS = [
    ("trial1", {"optimizer.lr": 1e-05, "max_grad_norm": None, "model.channels_last": True}),
    ("trial2", {"optimizer.lr": 0.07, "max_grad_norm": 0.5, "model.channels_last": False}),
]


@pytest.fixture
def swept(tmp_path):
    """The server, after an agent has run every trial in `tmp_path`."""
    with WandBServer() as server:
        server.sweep_command = [
            *(str(BIN / "evenstep"), "run", "digits"),
            *("length.epochs=1", "tracking.wandb.mode=online", "${args_no_hyphens}"),
        ]
        server.trials.extend(TRIALS)
        clean = {key: value for key, value in CLEAN.items() if key != "WANDB_MODE"}
        done = subprocess.run(
            [BIN / "wandb", "agent", "--count", "2", "me/digits/s1"],
            cwd=tmp_path,
            env=clean | server.environment() | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        yield server, done


def test_an_agent_runs_every_trial_as_a_run_of_its_own(swept, tmp_path):
    server, done = swept
    for run_id, arguments in TRIALS:
        run = tmp_path / "runs" / f"digits-{run_id}"
        assert run.is_dir(), done.stdout[-3000:] + done.stderr[-3000:]
        spec = load_spec(run / "spec.yaml")
        found = (spec.optimizer.lr, spec.max_grad_norm, spec.model.channels_last)
        assert found == tuple(arguments.values())
        on_server = server.runs[run_id]
        assert on_server.steps == [row["step"] for row in read_metrics(run / "metrics.jsonl")]
        assert on_server.exit_code == 0
        assert on_server.config["optimizer"]["value"]["lr"] == arguments["optimizer.lr"]


def test_checkpoints_are_referred_to_on_request_and_not_copied(tmp_path):
    words = ("run", "digits", "tracking.wandb.artifacts=reference")
    # wandb stages artifacts below HOME.
    done = evenstep(*words, cwd=tmp_path, **OFFLINE, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/digits"
    [log] = read_segments(run)
    best = (run / "checkpoints/best").read_text().strip()
    names = sorted({best, "step-00000180"})
    assert log.exit_code == 0
    assert "best" in log.artifacts[0]["aliases"]
    assert "latest" in log.artifacts[-1]["aliases"]
    for name, artifact in zip(names, log.artifacts, strict=True):
        assert artifact["type"] == "checkpoint"
        assert artifact["copies"] == []
        assert artifact["references"]
        place = (run / "checkpoints" / name).as_uri()
        assert all(reference.startswith(place) for reference in artifact["references"])
