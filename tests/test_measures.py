"""The test loop's measures: each row once, the same at any number of processes."""

import csv
import json
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import DEADLINE_SECONDS, command, evenstep
from jobs import HERE, spec_of, train_in_process
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import ClasswiseWrapper, Metric, MetricCollection, PearsonCorrCoef
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassRecall,
)

from service.basics import randomness
from service.basics.errors import DataBroken, SpecError
from service.data.batches import Batch
from service.data.loading import test_batches as batches_of
from service.data.task import measured_by, supervised
from service.distributed.world import World
from service.evaluation.metrics import _HELD_AT_MOST, Tally
from service.evaluation.predictions import Predictions
from service.evaluation.test_loop import Counted
from service.evaluation.test_loop import test as run_test
from service.optimization.train_state import require_measured, require_measures
from service.plan.plan import make_plan
from service.spec.files import load_spec

ROWS = 517


def _task():
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(ROWS, 4, generator=generator)
    labels = (points[:, 0] + 0.5 * torch.randn(ROWS, generator=generator) > 0).long()

    class Fixed(torch.nn.Module):
        """Gives its outputs as a transformers model does."""

        def forward(self, x):
            return {"logits": x[:, :1] * torch.tensor([-1.0, 1.0]), "hidden": x}

    warnings.filterwarnings("ignore", "Metric `", UserWarning)  # that it keeps every output
    return supervised(
        model=Fixed,
        train=TensorDataset(points[:64], labels[:64]),
        test=TensorDataset(points, labels),
        measures={
            "accuracy": "accuracy",
            "auroc": Area(),
            "precision": Precision(),
            "f1": F1(),
            "correlation": Correlation(),
            "mistakes": "error",
            "classes": MetricCollection(
                {"each": MulticlassRecall(2, average=None), "all": MulticlassAccuracy(2)}
            ),
            "named": Named(),
            "by_name": ClasswiseWrapper(MulticlassRecall(2, average=None), labels=["no", "yes"]),
        },
    )


class OfSecond:
    """Looks at the second output alone."""

    def update(self, outputs, targets):
        super().update(outputs[:, 1].sigmoid(), targets)


class Area(OfSecond, BinaryAUROC):
    """Keeps every output, and is merged by joining the lists."""


class Precision(OfSecond, BinaryAveragePrecision):
    """Likewise."""


class F1(OfSecond, BinaryF1Score):
    """Counts, and is merged by adding."""


class Correlation(PearsonCorrCoef):
    """A metric that torchmetrics cannot merge: it has to see all outputs itself."""

    def update(self, outputs, targets):
        super().update(outputs[:, 1], targets.float())


class Named(F1):
    """A metric that comes to a mapping."""

    def compute(self):
        return {"score": super().compute(), "seen": torch.stack([self.tp, self.fp]).flatten()}


def measure(world, micro_batch):
    task = _task()
    spec = load_spec(spec_of("plain_rows", test={"micro_batch": micro_batch}))
    plan = make_plan(spec, processes=1, train_rows=64, test_rows=ROWS)
    batches = batches_of(task.test_data(), task=task, plan=plan, world=world)
    model = task.model()
    model.train()
    counted = Counted(task, plan=plan, world=world)
    measures = run_test(model, batches, world=world, counted=counted)
    assert model.training, "the mode is given back"
    return measures


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_kind_of_measure_is_the_same_at_any_process_count(processes, count):
    (alone,) = processes(1).run(measure, 100)
    for measures in processes(count).run(measure, 100):
        # In float32, and from tensors that came by post: its last bit depends on where they lie.
        correlation = measures.pop("test/correlation")
        assert correlation == pytest.approx(alone["test/correlation"], abs=1e-6)
        assert measures == {k: v for k, v in alone.items() if k != "test/correlation"}


def test_they_are_what_one_pass_over_all_rows_gives(processes):
    task = _task()
    points, labels = task.test_data().tensors
    outputs = task.model()(points)["logits"]
    (found,) = processes(1).run(measure, 100)
    for name in ("auroc", "precision", "f1", "correlation"):
        metric = task.metrics[name]
        metric.update(outputs, labels)
        assert found[f"test/{name}"] == pytest.approx(float(metric.compute()), abs=1e-6)
    recall = [(outputs.argmax(1) == labels)[labels == n].double().mean().item() for n in (0, 1)]
    parts = [found[f"test/classes/each/{n}"] for n in (0, 1)]
    assert parts == pytest.approx(recall, abs=1e-6)
    assert found["test/classes/all"] == pytest.approx(sum(recall) / 2, abs=1e-6)
    names = [name for name in found if name.startswith("test/by_name/")]
    assert [found[name] for name in sorted(names)] == pytest.approx(recall, abs=1e-6)
    assert found["test/named/score"] == found["test/f1"]
    assert found["test/named/seen/0"] + found["test/named/seen/1"] == outputs.argmax(1).sum()
    assert found["test/mistakes"] == pytest.approx(1 - found["test/accuracy"])
    assert found["test/accuracy"] == (outputs.argmax(1) == labels).double().mean().item()


class Within(Metric):
    """Has no state itself, but a metric that has."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.inner = MulticlassAccuracy(2, average="micro")

    def update(self, outputs, targets):
        self.inner.update(outputs, targets)

    def compute(self):
        return self.inner.compute()


class InPlainPython(Metric):
    """Counts in a state, and in an attribute that torchmetrics does not know."""

    full_state_update = False

    def __init__(self, *, from_number=0.0):
        super().__init__()
        self.add_state("positive", torch.tensor(0), dist_reduce_fx="sum")
        self.rows, self.from_number = 0, from_number

    def update(self, outputs, targets):
        self.positive += targets.sum()
        if outputs[:, 1].max() >= self.from_number:
            self.rows += len(targets)

    def compute(self):
        return self.positive / self.rows

    def reset(self):
        super().reset()
        self.rows = 0


class InOrder(Metric):
    """Merged by joining lists, and its value depends on their order."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("seen", [], dist_reduce_fx="cat")

    def update(self, outputs, targets):
        self.seen.append(outputs[:, 1])

    def compute(self):
        return torch.cat([part.flatten() for part in self.seen])


class Lazy(Metric):
    """Has a state from the first update on, when it knows the number of outputs."""

    full_state_update = False

    def update(self, outputs, targets):
        if not self._defaults:
            self.add_state("sums", torch.zeros(outputs.shape[1]), dist_reduce_fx="sum")
        self.sums += outputs.sum(0)

    def compute(self):
        return self.sums


OWN_METRICS = {
    "within": Within,
    "plain": InPlainPython,
    "order": InOrder,
    "lazy": Lazy,
}


def measure_own(world, name, rows=70, **arguments):
    points = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1))
    labels = (points[:, 1] > points[:, 0]).long()
    metric = OWN_METRICS[name](**arguments)
    test = TensorDataset(points, labels)
    task = supervised(
        model=nn.Identity,
        train=test,
        test=test,
        loss=lambda outputs, targets: torch.zeros(len(targets)),
        measures={"own": metric},
    )
    spec = load_spec(spec_of("plain_rows", test={"micro_batch": 20}))
    plan = make_plan(spec, processes=1, train_rows=rows, test_rows=rows)
    batches = batches_of(test, task=task, plan=plan, world=world)
    found = run_test(
        task.model(), batches, world=world, counted=Counted(task, plan=plan, world=world)
    )
    metric.distributed_available_fn = lambda: False
    metric.update(points, labels)
    by_hand = metric.compute().flatten().tolist()
    return [value for name, value in found.items() if "own" in name], by_hand


@pytest.mark.parametrize("name", OWN_METRICS)
def test_a_metric_of_ones_own_gets_every_row_in_order(processes, name):
    """The first two were 0 before, the third in the order of the last process first."""
    for count in (1, 2, 5):  # five processes have four micro-batches
        for found, by_hand in processes(count).run(measure_own, name):
            assert found == pytest.approx(by_hand, abs=1e-5), (name, count)


def test_what_a_metric_keeps_beside_its_states_only_later_is_refused(alone):
    """Only the third micro-batch has an output of 1.9 or more."""
    with pytest.raises(SpecError, match="own keeps something in an attribute that is no state"):
        measure_own(alone, "plain", from_number=1.9)


class Missing(InOrder):
    def compute(self):
        return {}["score"]


class MissingInPlace(Missing):
    full_state_update = True


class OfOthers(InOrder):
    def update(self, outputs, targets):
        raise ValueError("outputs are no probabilities")


class OfOthersInPlace(OfOthers):
    full_state_update = True


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Missing, r"task\.measures: own failed on the test set: KeyError: 'score'"),
        (MissingInPlace, r"task\.measures: own failed on the test set: KeyError: 'score'"),
        (OfOthers, r"task\.measures: own failed on a micro-batch: ValueError: outputs are no"),
        (
            OfOthersInPlace,
            r"task\.measures: own failed on a micro-batch: ValueError: outputs are no",
        ),
    ],
)
def test_a_metric_that_fails_is_named(alone, monkeypatch, kind, told):
    monkeypatch.setitem(OWN_METRICS, "failing", kind)
    with pytest.raises(SpecError, match=told):
        measure_own(alone, "failing")


@pytest.mark.parametrize(
    ("predict", "told"),
    [
        (lambda outputs: outputs.numpy(), "must return a tensor, .* but returned a ndarray"),
        (lambda outputs: (outputs, outputs), "must return a tensor, .* but returned a tuple"),
        (lambda outputs: outputs["logits"], "it failed on the outputs of a micro-batch: "),
    ],
)
def test_a_predict_that_returns_no_tensor_is_told(alone, tmp_path, predict, told):
    task = supervised(model=nn.Identity, train=[(0.0, 0)], predict=predict)
    predictions = Predictions(tmp_path / "all.npy", task=task, rows=3, world=alone)
    batch = Batch(0, np.arange(3), torch.zeros(3, 2), torch.zeros(3), None, 0)
    with pytest.raises(SpecError, match=f"^task.predict: {told}"):
        predictions.add(torch.zeros(3, 2), batch)


@pytest.mark.parametrize(
    ("measures", "told"),
    [
        ({"loss": "accuracy"}, "'loss' is the name of the loss"),
        (
            {"a/b": "accuracy", "a": MetricCollection({"b": MulticlassAccuracy(2)})},
            "'a/b' is the name of two measures",
        ),
    ],
)
def test_a_measure_does_not_replace_another_value(measures, told):
    spec = load_spec(spec_of("plain_rows"))
    task = supervised(model=nn.Identity, train=[(0.0, 0)], test=[(0.0, 0)], measures=measures)
    with pytest.raises(SpecError, match=f"task.measures: {told}. Give the measure another name"):
        require_measures(spec, task)


def test_a_collection_is_measures_and_what_is_no_metric_is_reported():
    def task(measures):
        return supervised(model=nn.Identity, train=[(0.0, 0)], measures=measures)

    collection = MetricCollection([BinaryF1Score(), BinaryAUROC()])
    assert set(task(collection).metrics) == {"BinaryF1Score", "BinaryAUROC"}

    class Other:
        def compute(self):
            return 0.0

    with pytest.raises(SpecError, match=r"task\.measures: other is a Other, which is neither"):
        measured_by(task({"other": Other()}))


def test_a_measure_by_name_may_have_a_name_of_ones_own():
    rows = TensorDataset(torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 1, 0]))
    task = supervised(
        model=nn.Identity, train=rows, test=rows, loss="cross_entropy", measures={"a": "accuracy"}
    )
    assert tuple(task.measures) == ("a",)
    outputs, labels = rows.tensors
    right = (outputs.argmax(1) == labels).float()[:, None]  # [B, 1]
    assert torch.equal(task.measure(outputs, labels).float(), right)


def test_a_part_of_a_metric_can_decide():
    best = {"measure": "test/classes/each/1", "mode": "max"}
    spec = load_spec(spec_of("plain_rows", checkpoint={"best": best}))
    require_measures(spec, _task())
    require_measured(spec, {"test/classes/each/1": 0.5})
    with pytest.raises(SpecError, match=r"has no 'test/classes/each/1'; did you mean .*each/0"):
        require_measured(spec, {"test/classes/each/0": 0.5})


def test_more_processes_than_rows_count_each_once(processes):
    few = spec_of("plain_rows", test={"micro_batch": 2})
    assert processes(5).run(count_rows, few) == [3.0] * 5


def count_rows(world, spec):
    from jobs import plain_rows

    task = plain_rows(rows=60, test_rows=3)
    plan = make_plan(load_spec(spec), processes=1, train_rows=60, test_rows=3)
    rows = sum(
        len(batch.rows) for batch in batches_of(task.test_data(), task=task, plan=plan, world=world)
    )
    return float(world.sum(torch.tensor(float(rows))))


def test_a_missing_row_fails_the_test_instead_of_changing_its_result(alone):
    tally = Tally(("accuracy",), micro_batches=2, device=torch.device("cpu"))
    tally.add(0, torch.ones(3), torch.ones(3, 1), None, rows=3)
    with pytest.raises(DataBroken, match="counted 3 rows, but the test set has 5"):
        tally.means(alone, rows=5)


def test_a_negative_weight_of_the_test_set_is_refused(alone):
    tally = Tally((), micro_batches=1, device=torch.device("cpu"))
    tally.add(0, torch.ones(3), torch.zeros(0), torch.tensor([1.0, -2.0, -2.0]), rows=3)
    with pytest.raises(DataBroken, match=r"task\.weight: the weights of the test set sum to -3"):
        tally.means(alone, rows=3)


def test_the_test_command_writes_predictions_in_the_order_of_the_data(processes, tmp_path):
    spec = spec_of("plain_rows", length={"steps": 3}, checkpoint={"keep": 1})
    processes(1).run(train_in_process, spec, tmp_path)
    found = []
    for count, file in ((1, "one.npy"), (3, "three.safetensors")):
        words = ["job", "--processes", count, "--predictions", file]
        done = evenstep("test", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    one = np.load(tmp_path / "one.npy")
    three = load_file(tmp_path / "three.safetensors")["predictions"].numpy()
    assert one.shape == (517, 3)
    assert (one == three).all()
    for kind, read in (("csv", csv_table), ("parquet", parquet_table)):
        done = evenstep(
            "test", "job", "--processes", 2, "--predictions", f"as.{kind}", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        table = read(tmp_path / f"as.{kind}")
        assert list(table) == ["row", "prediction_0", "prediction_1", "prediction_2", "target"]
        assert list(table["row"]) == list(range(517))
        assert list(table["target"]) == [row % 3 for row in range(517)]
        assert [np.float32(value) for value in table["prediction_1"]] == list(one[:, 1])
    weights = load_file(tmp_path / "job/checkpoints/step-00000003/model.safetensors")
    inputs = torch.full((4,), 400 / 517)
    by_hand = weights["weight"] @ inputs + weights["bias"]
    assert one[400] == pytest.approx(by_hand.numpy(), abs=1e-6)


def csv_table(path):
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows] for key in rows[0]}


def parquet_table(path):
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pydict()


def test_parquet_without_pyarrow_is_refused_before_the_test(tmp_path, processes):
    """A directory of the path in which pyarrow is a module that cannot be found."""
    processes(1).run(train_in_process, spec_of("plain_rows", length={"steps": 1}), tmp_path)
    hiding = "import sys; sys.modules['pyarrow'] = None\nfrom launch.__main__ import main; main()"
    words = (sys.executable, "-c", hiding, "test", "job", "--predictions", "out.parquet")
    told = command(*words, cwd=tmp_path, timeout=DEADLINE_SECONDS)
    assert told.returncode == 64
    assert "out.parquet needs pyarrow, which is not installed" in told.stderr


def test_an_impossible_path_for_predictions_is_reported(tmp_path, processes):
    spec = spec_of("plain_rows", length={"steps": 1})
    processes(1).run(train_in_process, spec, tmp_path)
    told = evenstep("test", "job", "--predictions", "out.txt", cwd=tmp_path)
    assert told.returncode == 64
    assert "must end in .npy, .safetensors, .csv or .parquet" in told.stderr
    assert HERE.exists()


def test_predictions_that_cannot_be_written_are_reported_before_the_test(alone, tmp_path):
    task = supervised(model=nn.Identity, train=[(0.0, 0)])
    batch = Batch(0, np.arange(3), torch.zeros(3, 2), torch.zeros(3), None, 0)
    with pytest.raises(SpecError, match=r"^--predictions: /proc/out.npy: "):
        Predictions(Path("/proc/out.npy"), task=task, rows=3, world=alone)
    one, other = (
        Predictions(tmp_path / "out.npy", task=task, rows=3, world=alone) for _ in range(2)
    )
    assert list(tmp_path.iterdir()) == []
    for number, predictions in enumerate((one, other)):
        predictions.add(torch.full((3, 2), float(number)), batch)
    other.write()
    one.write()  # what the other writes at the same time is not in its way
    assert np.load(tmp_path / "out.npy").tolist() == [[0.0, 0.0]] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]


def peak_of_writing(world: World, path: Path) -> int:
    """The most bytes that Python's objects take while outputs are written, in a quiet process."""
    outputs, targets = csv_values()
    task = supervised(model=nn.Identity, train=[(0.0, 0)])
    predictions = Predictions(path, task=task, rows=len(outputs), world=world)
    rows = np.arange(len(outputs))
    predictions.add(outputs, Batch(0, rows, outputs, targets, None, 0))
    tracemalloc.start()
    predictions.write()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def csv_values() -> tuple[Tensor, Tensor]:
    """Outputs of shape [8001, 10] and targets of shape [8001]."""
    outputs = torch.randn(8_001, 10, generator=torch.Generator().manual_seed(3))
    return outputs, torch.arange(8_001) % 10


def test_a_csv_file_is_written_without_the_text_of_all_values_in_memory(processes, tmp_path):
    path = tmp_path / "out.csv"
    [peak] = processes(1).run(peak_of_writing, path)

    outputs, targets = csv_values()
    assert peak < 4 * 2**20  # the text of all values, as numpy's, takes 11 MiB
    written = np.loadtxt(path, delimiter=",", skiprows=1, dtype=np.float64)
    assert np.array_equal(written[:, 0], np.arange(8_001))
    assert np.array_equal(written[:, 1:11].astype(np.float32), outputs.numpy())
    assert np.array_equal(written[:, 11], targets.numpy())


def test_more_micro_batches_than_fit_in_the_buffer_are_all_counted(alone):
    count = 2 * _HELD_AT_MOST + 17
    tally = Tally(("square",), micro_batches=count, device=torch.device("cpu"))
    for number in reversed(range(count)):  # each of two rows, in any order
        losses = torch.tensor([float(number), 1.0])
        tally.add(number, losses, losses.square()[:, None], None, rows=2)
    numbers = torch.arange(count, dtype=torch.float64)
    assert tally.means(alone, rows=2 * count) == {
        "test/loss": (numbers.sum() + count).item() / (2 * count),
        "test/square": (numbers.square().sum() + count).item() / (2 * count),
    }


@pytest.mark.parametrize("seed", [0, 7])
def test_every_micro_batch_of_a_test_has_random_numbers_of_its_own(alone, seed):
    spec = load_spec(spec_of("plain_rows", seed=seed, test={"micro_batch": 100}))
    task = _task()
    plan = make_plan(spec, processes=1, train_rows=64, test_rows=ROWS)
    for _ in range(2):  # the second time it is what the first one found
        batches = batches_of(task.test_data(), task=task, plan=plan, world=alone)
        found = [batch.key for batch in batches]
        assert found == [randomness.key(randomness.TEST, seed, n) for n in range(6)]
