"""What usually makes a run depend on the number of processes, and does not here."""

from pathlib import Path

import pytest
from features import FEATURES, at
from jobs import train_in_process
from safetensors.torch import load_file
from torch import Tensor

from service.runs.receipt_file import read_receipt
from service.runs.tracking import read_metrics

STEPS = 12  # more than an epoch and a half


def difference(alone: Path, together: Path) -> tuple[float, float]:
    """The largest difference of (losses, weights) between two finished runs."""
    losses = [
        [row["train/loss"] for row in read_metrics(place / "job" / "metrics.jsonl")]
        for place in (alone, together)
    ]
    weights = [_weights(place / "job" / "checkpoints") for place in (alone, together)]
    of_losses = max(abs(a - b) for a, b in zip(*losses, strict=True))
    pairs = [(weights[0][name].double(), weights[1][name].double()) for name in weights[0]]
    return of_losses, max((a - b).abs().max().item() for a, b in pairs)


def _weights(checkpoints: Path) -> dict[str, Tensor]:
    """Those of the newest checkpoint, with their moving average where there is one."""
    newest = max(checkpoints.glob("step-*"))
    files = [newest / name for name in ("model.safetensors", "average.safetensors")]
    return {
        f"{file.stem}.{name}": tensor
        for file in files
        if file.exists()
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_does_not_depend_on_the_number_of_processes(processes, tmp_path, feature):
    job = FEATURES[feature] | {"length": {"steps": STEPS}}
    others = (4,) if job.get("exactness") == "bitwise" else (3, 5)
    for count in (1, *others):
        processes(count).run(train_in_process, at(job, count), tmp_path / str(count))
    for count in others:
        losses, weights = difference(tmp_path / "1", tmp_path / str(count))
        bound = 0 if job.get("exactness") == "bitwise" else 1e-9
        assert losses <= bound
        assert weights <= bound
        if at(job, count) == at(job, 1):  # a receipt tells of micro-batches too
            runs = [tmp_path / str(n) / "job" for n in (1, count)]
            receipts = [read_receipt(run / "receipt.jsonl") for run in runs]
            assert receipts[0] == receipts[1]


def test_the_workers_of_the_loader_do_not_matter(processes, tmp_path):
    job = FEATURES["augmentation"] | {"length": {"steps": 12}}
    for workers in (0, 1, 2):
        processes(1).run(
            train_in_process, job | {"loader": {"workers": workers}}, tmp_path / str(workers)
        )
    assert difference(tmp_path / "0", tmp_path / "1") == (0, 0)
    assert difference(tmp_path / "0", tmp_path / "2") == (0, 0)


def test_sync_with_uneven_shares_takes_part_with_no_rows(processes, tmp_path):
    # 5 micro-batches on 3 processes: in the second round one of them has nothing.
    job = FEATURES["BatchNorm, micro"] | {
        "length": {"steps": 6},
        "batch": {"global_batch": 45, "micro_batch": 9},
        "model": {"batchnorm": "sync"},
    }
    processes(3).run(train_in_process, job, tmp_path)
    assert len(read_receipt(tmp_path / "job" / "receipt.jsonl")) == 6
