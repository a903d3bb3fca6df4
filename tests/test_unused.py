"""Parameters on which the loss does not depend: named, and never a wrong sum."""

import torch
from commands import evenstep
from torch import nn

from service.data.task import supervised

SPEC = """
name: {name}
task: {file}:{name}
batch: {{global_batch: 20, micro_batch: 7}}
length: {{steps: 20}}
optimizer: {{name: sgd, lr: 0.1}}
tracking: {{log_every_steps: 1}}
"""


class Net(nn.Module):
    """Two layers; the second one is used so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.used, self.spare, self.left = nn.Linear(4, 3), nn.Linear(4, 3), times

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.left -= self.training
        return self.used(rows) + (self.spare(rows) if self.left >= 0 else 0)


class Growing(Net):
    """The second one is used from then on."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.left -= self.training
        return self.used(rows) + (self.spare(rows) if self.left < 0 else 0)


def _task(times: int, kind: type[Net] = Net):
    rows = torch.linspace(-1, 1, 412).reshape(103, 4)
    data = torch.utils.data.TensorDataset(rows, torch.arange(103) % 3)
    return supervised(model=lambda: kind(times), train=data, test=data, measures=("accuracy",))


def never():
    return _task(0)


def at_first():
    return _task(12)


def later():
    return _task(12, Growing)


def ran(tmp_path, name, *words):
    (tmp_path / "job.yaml").write_text(SPEC.format(file=__file__, name=name))
    return evenstep("run", "job.yaml", *words, "--processes", 2, cwd=tmp_path)


def test_what_is_never_trained_is_named_at_the_start(tmp_path):
    done = ran(tmp_path, "never")
    assert done.returncode == 0, done.stderr
    told = "The loss does not depend on spare.weight, spare.bias: never trained."
    assert told in done.stdout


def test_what_is_trained_in_some_steps_only_is_named_before_a_sum_goes_wrong(tmp_path):
    # The rank with two micro-batches a step leaves it out first: left alone, the other one's
    # gradients met the first one's loss.
    done = ran(tmp_path, "at_first")
    assert done.returncode == 42, done.stderr
    assert (
        "does not depend on spare.weight, spare.bias, unlike that of the first rows" in done.stderr
    )
    assert done.stderr.count("error:") == 1, done.stderr
    assert "Abort" not in done.stderr
