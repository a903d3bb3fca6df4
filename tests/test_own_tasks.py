"""Tasks as people bring them: rows of many kinds, several losses, texts of unequal length."""

import random
import runpy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from commands import evenstep
from jobs import said_in_process, spec_of, train_in_process
from processes import ProcessesFailed
from safetensors.torch import load_file
from test_features import difference
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import TensorDataset, random_split

import launch
import service
from service.basics.errors import SpecError, WillFailAgain, is_own_code, with_place
from service.checkpoints.snapshots import load_weights
from service.data.batches import first_rows, split, to_device
from service.data.streams import Stream
from service.data.task import load_task, logits, new_model, supervised
from service.preview.check import checked
from service.preview.plan import planned
from service.runs.tracking import read_metrics
from service.spec.files import load_spec
from service.task import weighted

HERE = __file__
SMALL = {"length": {"steps": 8}, "test": {}, "optimizer": {"name": "sgd", "lr": 0.05}}


def job(factory: str, **sections: Any) -> dict[str, Any]:
    return spec_of("") | SMALL | {"task": f"{HERE}:{factory}"} | sections


# ---- two losses, mappings in and out


class TwoHeads(nn.Module):
    """What it is given has names, and so has what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.kind, self.place = nn.Linear(5, 7), nn.Linear(7, 2), nn.Linear(7, 2)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.base(image).relu()
        return {"kind": self.kind(features), "place": self.place(features)}


def both_losses(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    kind = nn.functional.cross_entropy(outputs["kind"], targets["kind"], reduction="none")
    return kind + (outputs["place"] - targets["place"]).square().mean(1)


def two_losses(**parts: Any) -> supervised:
    images = torch.randn(103, 5, generator=torch.Generator().manual_seed(0))
    rows = [
        {"image": image, "targets": {"kind": int(image.sum() > 0), "place": image[:2]}}
        for image in images
    ]
    return supervised(model=TwoHeads, train=rows, test=rows[:31], loss=both_losses, **parts)


def two_losses_predicted() -> supervised:
    return two_losses(predict=lambda outputs: outputs["place"])


@pytest.mark.parametrize("factory", ["two_losses", "two_losses_predicted"])
def test_two_losses_of_mappings_need_no_measure(processes, tmp_path, factory):
    for count in (1, 3):
        [values, *_] = processes(count).run(train_in_process, job(factory), tmp_path / str(count))
        assert values["test/loss"] > 0
    assert max(difference(tmp_path / "1", tmp_path / "3")) < 1e-5


def test_what_the_task_predicts_is_written(processes, tmp_path):
    processes(1).run(train_in_process, job("two_losses_predicted"), tmp_path / "runs")
    done = evenstep("test", "job", "--predictions", "places.npy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "runs/job/checkpoints/step-00000008/model.safetensors")
    model = TwoHeads()
    model.load_state_dict(weights)
    images = torch.stack([row["image"] for row in two_losses().test_data()])
    by_hand = model(images)["place"].detach().numpy()
    assert np.load(tmp_path / "places.npy") == pytest.approx(by_hand, abs=1e-6)
    assert not list(tmp_path.glob(".*partial*"))


def test_outputs_without_logits_are_reported_where_logits_are_needed(processes, tmp_path):
    processes(1).run(train_in_process, job("two_losses"), tmp_path / "runs")
    told = evenstep("test", "job", "--predictions", "out.npy", cwd=tmp_path)
    assert told.returncode == 64
    assert "the model returns a dict, which is not a tensor and has no logits" in told.stderr
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "out.npy").exists()


def test_a_mapping_may_hold_logits():
    found = torch.ones(3)
    assert logits({"logits": found}) is found


# ---- texts of unequal length


class Letters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 30)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def pad(rows: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    inputs = pad_sequence(rows, batch_first=True)
    return {"input_ids": inputs}, pad_sequence(rows, batch_first=True, padding_value=-100)


def token_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")


def texts(collated: bool = True) -> supervised:
    # Drawn from no generator of its own: the seed of the spec is what makes it the same.
    rows = [torch.randint(30, (3 + row % 7,)) for row in range(103)]
    return supervised(
        model=Letters,
        train=rows,
        test=rows[:31],
        loss=token_losses,
        weight=lambda targets: targets.ne(-100).float(),
        collate=pad if collated else None,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_of_unequal_length_come_together_by_the_tasks_own_collate(
    processes, tmp_path, workers
):
    text = job("texts", loader={"workers": workers})
    for count in (1, 3):
        processes(count).run(train_in_process, text, tmp_path / str(count))
    assert max(difference(tmp_path / "1", tmp_path / "3")) < 1e-5


def test_rows_that_torch_cannot_stack_ask_for_a_collate(processes, tmp_path):
    (tmp_path / "job.json").write_text(to_json(job("texts", task_args={"collated": False})))
    told = evenstep("run", "job.json", cwd=tmp_path)
    assert told.returncode == 42
    assert "Give the task a collate that makes a batch of such rows." in told.stderr
    assert "Traceback" not in told.stderr


def test_predictions_of_unequal_shapes_are_reported(processes, tmp_path):
    text = job("texts", test={"micro_batch": 2})
    processes(1).run(train_in_process, text, tmp_path / "runs")
    told = evenstep("test", "job", "--predictions", "out.npy", "--processes", 2, cwd=tmp_path)
    assert told.returncode == 64
    assert (
        "task.predict: must return rows of one shape, but returned [4, 30] and [5, 30]"
        in told.stderr
    )
    assert list(tmp_path.glob("*out*")) == []


# ---- rows of a kind of their own


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, pair: Pair) -> Tensor:
        return self.head(pair.left + pair.right)


def pairs() -> supervised:
    generator = torch.Generator().manual_seed(3)
    rows = [(Pair(*torch.randn(2, 4, generator=generator)), row % 3) for row in range(61)]
    return supervised(model=Sum, train=rows, test=rows[:9], measures=("accuracy",))


def test_named_tuples_stay_what_they_are(processes, tmp_path):
    [values, *_] = processes(1).run(train_in_process, job("pairs"), tmp_path)
    assert 0 <= values["test/accuracy"] <= 1
    pair = Pair(torch.ones(3, 2), torch.zeros(3, 2))
    for same in (to_device(pair, torch.device("cpu")), first_rows(pair, 2)):
        assert isinstance(same, Pair)
    assert len(first_rows(pair, 2).left) == 2


def test_rows_of_three_say_how_to_make_two_of_them():
    with pytest.raises(TypeError, match=r"but is tuple of 3. .*\(\(a, b\), targets\)"):
        split((1, 2, 3))


# ---- data drawn or split at random, by whoever does not think of seeds


def split_at_random() -> supervised:
    rows = TensorDataset(torch.randn(97, 4), torch.randint(3, (97,)))
    train, test = random_split(rows, [70, 27])
    noise = random.random() + np.random.rand()
    data = [(inputs + noise, target) for inputs, target in train]
    return supervised(model=lambda: nn.Linear(4, 3), train=data, test=test)


class SplitWhenAsked:
    """Brings its parts by themselves, each drawn when it is asked for."""

    measures: tuple[str, ...] = ()
    train_rows, test_rows = 70, 27

    def model(self) -> nn.Module:
        model = nn.Linear(4, 3)
        nn.init.constant_(model.bias, random.random() + np.random.rand())
        return model

    def _parts(self) -> list[Any]:
        rows = TensorDataset(torch.randn(97, 4), torch.randint(3, (97,)))
        return random_split(rows, [self.train_rows, self.test_rows])

    def train_data(self) -> Any:
        return self._parts()[0]

    def test_data(self) -> Any:
        return self._parts()[1]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros(0)


@pytest.mark.parametrize("factory", ["split_at_random", "SplitWhenAsked"])
def test_data_that_is_drawn_without_a_seed_is_the_same_on_every_process(
    processes, tmp_path, factory
):
    for count in (1, 3):
        for stop_at in (3, None):  # and when it is brought again, to resume
            processes(count).run(train_in_process, job(factory), tmp_path / str(count), stop_at)
    assert max(difference(tmp_path / "1", tmp_path / "3")) < 1e-5
    processes(1).run(train_in_process, job(factory), tmp_path / "whole")
    assert difference(tmp_path / "1", tmp_path / "whole") == (0, 0)
    last = [read_metrics(tmp_path / n / "job/metrics.jsonl")[-1] for n in ("1", "3")]
    assert last[0]["test/loss"] == pytest.approx(last[1]["test/loss"], abs=1e-5)


class LayersAtRandom(nn.Module):
    """Leaves layers out at random, by Python's or numpy's generator: LayerDrop as it is written."""

    def __init__(self, draw: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 3)
        self._draw = {"python": random.random, "numpy": np.random.rand}[draw]

    def forward(self, rows: Tensor) -> Tensor:
        for layer in self.layers:
            kept = float(not self.training or self._draw() > 0.5)
            rows = rows + kept * layer(rows).tanh()
        out: Tensor = self.head(rows)
        return out


def layers_at_random(draw: str) -> supervised:
    rows = TensorDataset(torch.randn(97, 4), torch.randint(3, (97,)))
    return supervised(model=lambda: LayersAtRandom(draw), train=rows, test=rows)


@pytest.mark.parametrize("draw", ["python", "numpy"])
def test_random_numbers_not_from_torch_are_the_same_at_any_world_size(processes, tmp_path, draw):
    asked = job("layers_at_random", task_args={"draw": draw})
    for count in (1, 3):
        for stop_at in (3, None):
            processes(count).run(train_in_process, asked, tmp_path / str(count), stop_at)
    assert max(difference(tmp_path / "1", tmp_path / "3")) < 1e-5
    processes(1).run(train_in_process, asked, tmp_path / "whole")
    assert difference(tmp_path / "1", tmp_path / "whole") == (0, 0)


def test_another_seed_draws_other_data():
    [one, same, other] = [
        load_task(f"{HERE}:split_at_random", {}, seed=seed).train_data()[0][0] for seed in (1, 1, 2)
    ]
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# ---- what is no data


class Endless:
    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(4), 0


def test_a_stream_cannot_be_tested_on():
    with pytest.raises(SpecError, match="the test data is a Endless, which can only be iterated"):
        supervised(model=lambda: nn.Linear(4, 3), train=Endless(), test=Endless())


def test_what_has_no_length_is_no_data():
    with pytest.raises(SpecError, match="the training data is a object, which is not a data set"):
        supervised(model=lambda: nn.Linear(4, 3), train=object())


def test_what_can_be_read_once_only_is_no_stream():
    rows = ((torch.zeros(4), 0) for _ in range(9))
    with pytest.raises(SpecError, match="a generator, which can be read only once"):
        Stream(rows, mode="whole", index=0, of=1)


class Confused(nn.Linear):
    """Cannot be tested."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            raise ValueError("only for training")
        return super().forward(inputs)


def made_of(model: str) -> supervised:
    def wrong() -> nn.Module:
        return nn.Linear(4, "three")

    makers = {
        "one": nn.Linear(4, 3),
        "class": lambda: nn.Linear,
        "raises": wrong,
        "untested": lambda: Confused(4, 3),
        "matrix": lambda: nn.Linear(4, 3),
    }
    rows = [(torch.ones(4), row % 3) for row in range(60)]
    return supervised(
        model=makers[model],
        train=rows,
        test=rows[:7],
        measures={"confusion": confusion_matrix()} if model == "matrix" else (),
    )


def confusion_matrix():
    from torchmetrics.classification import MulticlassConfusionMatrix

    return MulticlassConfusionMatrix(num_classes=3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "one",
            "task.model: must be a function that creates a new model, but is a model: a Linear. "
            "Write model=lambda",
        ),
        ("class", "task.model: must return an nn.Module, but returned a type"),
        ("raises", "task.model: raised TypeError: .*test_own_tasks.py:"),
        ("untested", r"over its first 7 rows: ValueError: only .*test_own_tasks.py:\d+\)"),
        (
            "matrix",
            r"confusion must return numbers: .* but MulticlassConfusionMatrix returns .*3, 3",
        ),
    ],
)
def test_a_value_that_is_not_a_model_is_reported(alone, model, message):
    spec = load_spec(job("made_of", task_args={"model": model}))
    with pytest.raises(SpecError, match=message):
        list(checked(spec, world=alone))


def lazy(bad: bool = False) -> Any:
    """A model whose layers learn their sizes from the data."""
    unused = {"unused": nn.LazyLinear(2)} if bad else {}
    rows = [(torch.arange(4.0) + n, n % 3) for n in range(60)]

    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
            self.more = nn.ModuleDict(unused)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    return supervised(model=Lazy, train=rows, test=rows[:7])


def test_lazy_layers_take_their_sizes_from_the_first_row(processes, alone, tmp_path):
    spec = job("lazy")
    told = dict(checked(load_spec(spec), world=alone))
    assert any("67 parameters" in text for text in told.values())
    assert "67" in planned(load_spec(spec), processes=2, runs=tmp_path)
    for count in (1, 2):
        processes(count).run(train_in_process, spec, tmp_path / str(count))
    runs = [tmp_path / str(count) / spec["name"] / "checkpoints" for count in (1, 2)]
    found = [load_file(sorted(place.glob("step-*"))[-1] / "model.safetensors") for place in runs]
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name])
    model = new_model(load_task(spec["task"], {}), seed=0)
    load_weights(sorted(runs[0].glob("step-*"))[-1], model)
    assert torch.equal(model.layers[0].weight, found[0]["layers.0.weight"])
    with pytest.raises(SpecError, match=r"task\.model: more\.unused\.weight has no size"):
        new_model(lazy(bad=True), seed=0)


def test_a_task_needs_no_test():
    task = supervised(model=lambda: nn.Linear(4, 3), train=[(torch.zeros(4), 0)])
    assert task.test_rows == 0


# ---- where a person's own code failed


def test_an_error_is_reported_with_the_line_of_the_persons_own_code():
    def own() -> None:
        torch.stack([])

    with pytest.raises(RuntimeError) as raised:
        own()
    line = own.__code__.co_firstlineno + 1
    assert with_place(raised.value).endswith(f"({HERE}:{line})")


@pytest.mark.parametrize("packages", ["site-packages", "dist-packages"])
def test_the_packages_of_the_system_are_not_the_persons_own_code(tmp_path, packages):
    # Seen from a virtual environment by --system-site-packages, or from ~/.local.
    package = tmp_path / "lib/python3" / packages / "theirs.py"
    package.parent.mkdir(parents=True)
    package.write_text("def fail():\n    raise ValueError('no')\n")
    theirs = runpy.run_path(str(package))

    def own() -> None:
        theirs["fail"]()

    with pytest.raises(ValueError, match="no") as raised:
        own()
    line = own.__code__.co_firstlineno + 1
    assert with_place(raised.value).endswith(f"({HERE}:{line})")


def test_an_error_outside_the_users_code_has_no_place():
    assert with_place(ValueError("no")) == "ValueError: no"


@pytest.mark.parametrize(
    ("file", "is_own"),
    [
        ("/home/me/task.py", True),
        ("task.py", True),
        ("/home/me/my-site-packages/task.py", True),
        ("/usr/lib/python3/dist-packages/some.py", False),
        ("/home/me/.venv/lib//site-packages//some.py", False),
        ("<frozen runpy>", False),
        (runpy.__file__, False),
        ("SERVICE/data/task.py", False),
        ("SERVICE//./data/task.py", False),
        ("LAUNCH/cli.py", False),
        ("SERVICE/recipes/digits.py", True),
        ("SERVICE/recipes//digits.py", True),
        ("SERVICEs/task.py", True),
    ],
)
def test_the_users_own_code_is_what_is_not_installed(file, is_own):
    file = file.replace("SERVICE", str(Path(service.__file__).parent))
    assert is_own_code(file.replace("LAUNCH", str(Path(launch.__file__).parent))) is is_own


def to_json(values: dict[str, Any]) -> str:
    import json

    return json.dumps(values)


# ---- what a mistake in the data or in a weight is told as


class Broken:
    """Row 37 cannot be read; with `at_once` in one call for several rows."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if row == 37:
            raise ValueError("broken image")
        return torch.ones(4), row % 3


class BrokenAtOnce(Broken):
    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, int]]:
        return [self[row] for row in rows]


class Fewer(BrokenAtOnce):
    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, int]]:
        return [(torch.ones(4), row % 3) for row in rows if row != 37]


class OtherShape(Broken):
    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.ones(5 if row == 37 else 4), row % 3


def as_mapping(rows: list[Any]) -> Any:
    inputs, targets = torch.utils.data.default_collate(rows)
    return inputs, {"kind": targets}


def of_kind(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets["kind"], reduction="none")


def broken(kind: str) -> supervised:
    good = TensorDataset(torch.randn(60, 4), torch.arange(60) % 3)
    nothing = [(torch.ones(4), 0) if row != 37 else None for row in range(60)]
    parts: dict[str, Any] = {
        "one by one": {"train": Broken()},
        "at once": {"train": BrokenAtOnce()},
        "a subset": {"train": torch.utils.data.Subset(Broken(), range(60))},
        "no row": {"train": nothing},
        "another shape": {"train": OtherShape()},
        "fewer": {"train": Fewer(), "collate": as_mapping, "loss": of_kind},
        "a test set": {"train": good, "test": {"good": good, "bad": Broken()}},
        "a number": {"train": good, "weight": lambda targets: 1.0},
        "an array": {"train": good, "weight": lambda targets: np.ones(len(targets))},
        "an error": {"train": good, "weight": lambda targets: targets["label"]},
        "negative": {"train": good, "weight": lambda targets: -torch.ones(len(targets))},
    }[kind]
    return supervised(model=lambda: nn.Linear(4, 3), **parts)


AT = r"The data set failed on row 37 \(step 0, micro-batch \d\)"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("one by one", AT + ": ValueError: broken image"),
        ("at once", AT + ": ValueError: broken image"),
        ("a subset", AT + ": ValueError: broken image"),
        ("no row", AT + ": TypeError"),
        ("another shape", r"The data set failed on rows \[.*\b37\b.*got \[4\] at entry 0"),
        ("fewer", "Of 30 requested rows, 29 were returned"),
        ("a test set", r"The test set 'bad' failed on row 37 \(micro-batch \d\): ValueError: bro"),
    ],
)
def test_an_error_of_the_data_names_the_row(processes, tmp_path, kind, told, workers):
    """It named the first eight of the micro-batch before."""
    spec = job("broken", task_args={"kind": kind}, loader={"workers": workers})
    sections = {"batch": {"global_batch": 60, "micro_batch": 30}, "length": {"steps": 1}}
    with pytest.raises(ProcessesFailed, match=told):
        processes(1).run(train_in_process, spec | sections, tmp_path)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("a number", r"^task\.weight: must return a tensor, .* but returned a float\. "),
        ("an array", r"^task\.weight: must return a tensor, .* but returned a ndarray\. "),
        ("an error", r"^task\.weight: it failed on the targets of a micro-batch: \w+Error: "),
        ("negative", r"^task\.weight: the weights of step 1 sum to less than 0"),
    ],
)
def test_a_mistake_in_a_weight_is_told_as_one(alone, tmp_path, kind, told):
    """A negative sum trained nothing: the gradients were 0."""
    with pytest.raises((SpecError, WillFailAgain), match=told):
        train_in_process(alone, job("broken", task_args={"kind": kind}), tmp_path)


# ---- processes that do not have the same data


def of_rank(kind: str) -> supervised:
    """Data that is another on each process, as with files that are missing on a node."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    draw = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(60, 4, generator=draw), torch.arange(60) % 3
    order = torch.arange(60).roll(rank)
    good = TensorDataset(inputs, targets)
    fewer = TensorDataset(inputs[rank:], targets[rank:])
    parts: dict[str, Any] = {
        "train": {"train": fewer},
        "test": {"train": good, "test": fewer},
        "one of two": {"train": good, "test": {"a": good, "b": fewer}},
        "weights": {
            "train": good,
            "sampling": weighted(torch.ones(60).index_fill(0, order[:1], 2)),
        },
        "order": {"train": TensorDataset(inputs[order], targets[order])},
        "same": {"train": good, "test": good, "sampling": weighted(torch.ones(60))},
    }[kind]
    return supervised(model=lambda: nn.Linear(4, 3), **parts)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("train", "rank 0 has 60 training rows, and rank 1 has 59"),
        ("test", "rank 0 has 60 test rows, and rank 1 has 59"),
        ("one of two", "rank 0 has 60 rows of the test set 'b', and rank 1 has 59"),
        ("weights", "rank 1 chooses rows in another way than rank 0"),
    ],
)
def test_processes_with_other_data_are_refused(processes, tmp_path, kind, told):
    """They trained on other rows without a word, or aborted in the test."""
    spec = job("of_rank", task_args={"kind": kind})
    with pytest.raises(ProcessesFailed, match=told):
        processes(2).run(train_in_process, spec, tmp_path)


def test_the_test_command_refuses_processes_with_other_test_rows(processes, tmp_path):
    spec = job("of_rank", task_args={"kind": "test"})
    processes(1).run(train_in_process, spec, tmp_path / "runs")
    done = evenstep("test", "job", "--processes", 2, cwd=tmp_path)
    assert done.returncode == 64, done.stderr
    assert "rank 0 has 60 test rows, and rank 1 has 59" in done.stderr


@pytest.mark.parametrize(("kind", "warns"), [("order", True), ("same", False)])
def test_rows_in_another_order_on_a_process_are_told(processes, tmp_path, kind, warns):
    said = processes(2).run(said_in_process, job("of_rank", task_args={"kind": kind}), tmp_path)
    assert (
        "WARNING: the processes read different values in the same first rows" in said[0]
    ) is warns
