"""Rows that fit in memory are picked by index, and are the rows that they were before."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import evenstep
from jobs import plan_of, spec_of, train_in_process
from torch import nn
from torch.utils.data import Subset, TensorDataset

from service.basics.errors import SpecError
from service.data.in_memory import InMemory, in_memory
from service.data.streams import reads_at_once
from service.data.task import supervised
from service.runs.directory import RunDirectory
from service.runs.verification import compare

HERE = Path(__file__)
ROWS, TEST_ROWS = 5003, 517


class Rows:
    """Rows that come one by one, and count how often."""

    def __init__(self, count, named=False):
        self.count, self.named, self.asked = count, named, 0

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        self.asked += 1
        inputs, target = torch.full((4,), row / self.count), row % 3
        if self.named:
            return {"x": inputs, "half": inputs[:2], "label": target}
        return inputs, target


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.all, self.some = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x, half):
        return self.all(x) + self.some(half)


def one_by_one(named=False):
    return supervised(
        model=Named if named else lambda: nn.Linear(4, 3),
        train=Rows(ROWS, named),
        test=Rows(TEST_ROWS, named),
        measures=("accuracy",),
    )


def ragged():
    class Ragged(Rows):
        def __getitem__(self, row):
            return torch.ones(4 if row < 4500 else 5), 0

    return supervised(model=lambda: nn.Linear(4, 3), train=Ragged(ROWS))


def stream():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(4), 0)] * 60)

    return supervised(model=lambda: nn.Linear(4, 3), train=Endless())


def huge():
    class Huge(Rows):
        def __getitem__(self, row):
            return torch.ones(1000, 1000), 0

    return supervised(model=lambda: nn.Linear(1000, 3), train=Huge(10**9))


def job(name, task="one_by_one", **sections):
    return spec_of(task, name=name, **sections) | {"task": f"{HERE}:{task}"}


@pytest.mark.parametrize("named", [False, True], ids=["pairs", "mappings"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_run_is_the_same_to_the_bit(processes, tmp_path, named, workers):
    args = {"task_args": {"named": named}}
    processes(2).run(train_in_process, job("read", **args), tmp_path)
    loader = {"in_memory": True, "workers": workers}
    processes(2).run(train_in_process, job("held", loader=loader, **args), tmp_path)
    runs = [RunDirectory(tmp_path / name) for name in ("read", "held")]
    compared = compare(*runs, level="bits", tolerance=0)
    assert compared.equal, compared.lines
    assert [run.read_facts()["attempts"][0]["data"] for run in runs] == [
        "row by row",
        "by index, from memory",
    ]


def rows_asked(world, runs):
    """How often a training row was read in 200 steps of 50."""
    from service.health.stop_request import StopRequest
    from service.plan.plan import make_plan
    from service.spec.files import load_spec
    from service.training.worker import run

    task = one_by_one()
    spec = load_spec(job("held", loader={"in_memory": True}, length={"steps": 200}))
    plan = make_plan(spec, processes=1, train_rows=ROWS, test_rows=TEST_ROWS)
    run(plan, task, world, runs=runs, stop=StopRequest())
    return task.train_data().asked, task.test_data().asked


def test_each_row_is_read_once(processes, tmp_path):
    train, test = processes(1).run(rows_asked, tmp_path)[0]
    assert train == ROWS + 1, "each once, and the first one to see how large it is"
    assert test == TEST_ROWS + 1, "in ten test passes"


def test_a_part_of_tensors_is_in_memory_too():
    whole = TensorDataset(torch.arange(20.0).reshape(10, 2), torch.arange(10))
    held = in_memory(Subset(Subset(whole, [9, 3, 5, 1]), [2, 0]))
    assert isinstance(held, InMemory)
    assert held.inputs.tolist() == [[10.0, 11.0], [18.0, 19.0]]
    assert held.targets.tolist() == [5, 9]
    assert len(held) == 2
    assert held[1][1] == 9


class Doubled(TensorDataset):
    """Rows that are not those of its tensors, as with an augmentation."""

    def __getitem__(self, row):
        inputs, target = super().__getitem__(row)
        return inputs * 2, target


class Repeated(TensorDataset):
    def __len__(self):
        return 2 * len(self.tensors[0])

    def __getitem__(self, row):
        return super().__getitem__(row % len(self.tensors[0]))


class DoubledPart(Subset):
    def __getitem__(self, row):
        inputs, target = self.dataset[self.indices[row]]
        return inputs * 2, target

    def __getitems__(self, rows):
        return [self[row] for row in rows]


class ByLists:
    """Gives several rows in one call."""

    def __init__(self, inputs, targets):
        self.rows = list(zip(inputs, targets, strict=True))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]

    def __getitems__(self, rows):
        return [self.rows[row] for row in rows]


class DoubledRow(ByLists):
    """With an inherited `__getitems__`, which does not call it."""

    def __getitem__(self, row):
        inputs, target = super().__getitem__(row)
        return inputs * 2, target


class Twice:
    def __getitem__(self, row):
        inputs, target = super().__getitem__(row)
        return inputs * 2, target


class Mixed(Twice, ByLists):
    pass


class Plain(TensorDataset):
    """Only another name."""


def few():
    return torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 1])


def doubled(kind="DoubledPart"):
    part = DoubledPart(TensorDataset(*few()), [2, 0, 1])
    train = {"DoubledPart": part, "DoubledRow": DoubledRow(*few()), "Mixed": Mixed(*few())}[kind]
    return supervised(model=lambda: nn.Linear(2, 2), train=train, test=Doubled(*few()))


def test_a_data_set_that_makes_its_rows_itself_is_asked_for_them():
    """Its tensors were used before, without a word."""
    assert in_memory(Doubled(*few())) is None
    assert in_memory(Repeated(*few())) is None
    assert in_memory(Subset(Doubled(*few()), [0])) is None
    assert in_memory(DoubledPart(TensorDataset(*few()), [0])) is None
    assert isinstance(in_memory(Plain(*few())), InMemory)
    assert [reads_at_once(data(*few())) for data in (ByLists, DoubledRow, Mixed)] == [
        True,
        False,
        False,
    ]


def batches_of_doubled(world, kind):
    from service.data.loading import test_batches, train_steps
    from service.plan.plan import make_plan
    from service.spec.files import load_spec

    task, batch = doubled(kind), {"global_batch": 3, "micro_batch": 3}
    spec = load_spec(job("job", "doubled", batch=batch, length={"steps": 1}))
    plan = make_plan(spec, processes=1, train_rows=3, test_rows=3)
    [step] = train_steps(task.train_data(), task=task, plan=plan, world=world, start=0)
    tested = [*test_batches(task.test_data(), task=task, plan=plan, world=world)]
    return [float(batch.inputs.sum()) for batch in (*step.micro_batches, *tested)]


@pytest.mark.parametrize("kind", ["DoubledPart", "DoubledRow", "Mixed"])
def test_training_and_test_get_the_rows_that_a_data_set_makes(processes, kind):
    assert processes(1).run(batches_of_doubled, kind)[0] == [30.0, 30.0]


@pytest.mark.parametrize(
    "rows",
    [
        [-1, 0, -3],
        [],
        np.array([2, 1], np.uint16),
        range(2),
        [torch.tensor(1), torch.tensor(0)],
        {"a": 2, "b": 1}.values(),
    ],
    ids=["from the end", "none", "small numbers", "a range", "tensors", "values"],
)
def test_the_rows_of_a_subset_are_those_that_torch_gives(rows):
    whole, rows_as_list = TensorDataset(*few()), list(rows)
    held = in_memory(Subset(whole, rows))
    by_torch = [Subset(whole, rows_as_list)[n] for n in range(len(rows_as_list))]
    assert [target for _, target in by_torch] == held.targets.tolist()
    assert [inputs.tolist() for inputs, _ in by_torch] == held.inputs.tolist()


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (np.array([True, False, True]), r"are bool of the shape \[3\].*mask\.nonzero"),
        ([0.0, 1.0], "must be whole numbers, but are float64"),
        ([0, 3], "a Subset has the row 3, but its data set has 3 rows, numbered from 0 to 2"),
    ],
)
def test_a_subset_of_other_things_than_rows_is_told(rows, told):
    with pytest.raises(SpecError, match=told):
        in_memory(Subset(TensorDataset(*few()), rows))


def refused(tmp_path, task, *words):
    (tmp_path / "job.yaml").write_text(json.dumps(job("job", task)))
    return evenstep("run", "job.yaml", "loader.in_memory=true", *words, cwd=tmp_path)


def test_rows_that_do_not_fit_are_refused_before_they_are_read(tmp_path):
    done = refused(tmp_path, "huge")
    assert done.returncode == 64, done.stderr
    assert "loader.in_memory: 1,000,000,000 rows take" in done.stderr
    assert "Leave in_memory out" in done.stderr


def test_rows_of_several_shapes_are_reported(tmp_path):
    done = refused(tmp_path, "ragged", "test={}")
    assert done.returncode == 42, done.stderr
    assert done.stderr.count("error:") == 1
    assert "stack expects each tensor to be equal size" in done.stderr


def named_by_text(kind="text"):
    class Texts(Rows):
        def __getitem__(self, row):
            return {"x": torch.ones(4), "name": f"row {row}", "label": row % 3}

    def together(rows):
        made = torch.utils.data.default_collate(rows)
        name = {"text": made["name"], "array": np.ones(len(rows)), "setting": "english"}[kind]
        return made | {"name": name}

    class Model(nn.Linear):
        def forward(self, x, name):
            return super().forward(x)

    return supervised(model=lambda: Model(4, 3), train=Texts(ROWS), collate=together)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("text", r"of the inputs of the collated rows, \['name'\] is a list of str, and only"),
        ("array", r"\['name'\] is a ndarray"),
    ],
)
def test_what_cannot_be_selected_by_index_is_refused(alone, tmp_path, kind, told):
    """Each micro-batch had the texts of all rows."""
    spec = job("job", "named_by_text", loader={"in_memory": True}, task_args={"kind": kind})
    with pytest.raises(SpecError, match=told):
        train_in_process(alone, spec, tmp_path)


def test_a_setting_that_belongs_to_no_row_stays(alone, tmp_path):
    spec = job("job", "named_by_text", loader={"in_memory": True}, task_args={"kind": "setting"})
    assert train_in_process(alone, spec, tmp_path)["train/loss"] > 0


def test_a_stream_is_not_held(tmp_path):
    done = refused(tmp_path, "stream")
    assert done.returncode == 64, done.stderr
    assert "the training data is a stream. Leave in_memory out." in done.stderr


@pytest.mark.parametrize(
    ("words", "way"),
    [
        ((), "row by row"),
        (("loader.workers=2",), "row by row, by 2 workers ahead of time"),
        (("loader.workers=auto",), "row by row, by as many workers as there are cores for"),
        (("loader.in_memory=true",), "by index, from memory"),
    ],
)
def test_the_plan_says_how_rows_come(tmp_path, words, way):
    (tmp_path / "job.yaml").write_text(json.dumps(job("job")))
    plan = plan_of(tmp_path / "job.yaml", *words, runs=tmp_path)
    (line,) = (line for line in plan.splitlines() if "rows come" in line)
    assert line.split(maxsplit=2)[2] == way
