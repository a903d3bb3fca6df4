"""`init`: a run begins with weights of another run, of a file, or of a transformers directory."""

import json
import shutil

import pytest
import torch
from commands import evenstep
from jobs import spec_of, train_in_process
from safetensors.torch import load_file, save_file
from torch import nn

from service.basics.errors import SpecError
from service.checkpoints.initial_weights import initial_weights
from service.data.task import supervised
from service.distributed.world import alone
from service.preview.check import checked
from service.spec.files import dump_spec, load_spec

TASK = f"{__file__}:tuned"


class Rows:
    def __len__(self):
        return 37

    def __getitem__(self, row):
        return torch.full((4,), row / 37), row % 3


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
        self.head = nn.Linear(5, classes)

    def forward(self, rows):
        return self.head(self.base(rows))


def tuned(classes=3):
    return supervised(model=lambda: Net(classes), train=Rows(), test=Rows(), loss="cross_entropy")


def job(name, **sections):
    few = {"length": {"steps": 2}, "batch": {"global_batch": 10, "micro_batch": 5}, "test": {}}
    return (
        spec_of("x", name=name) | few | {"task": TASK, "schedule": {"name": "constant"}} | sections
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory, processes):
    """A run of two steps, and its weights as a file."""
    place = tmp_path_factory.mktemp("initial")
    processes(1).run(train_in_process, job("first"), place / "runs")
    shutil.copy(weights_of(place / "runs/first", 2), place / "first.safetensors")
    return place


def weights_of(run, step):
    return run / f"checkpoints/step-{step:08}/model.safetensors"


def taken_by(model, source, **init):
    spec = load_spec(job("x", init={"from": str(source), **init}))
    return initial_weights(spec.init, model)


def test_a_run_starts_with_the_weights_of_another_at_any_number_of_processes(place, processes):
    still = {"optimizer": {"name": "sgd", "lr": 0.0}, "model": {"batchnorm": "local"}}
    init = {"from": str(place / "runs/first"), "skip": ["head.*"]}
    for count in (1, 2):
        name = f"on-{count}"
        spec = job(name, task_args={"classes": 7}, init=init, **still)
        processes(count).run(train_in_process, spec, place / "runs")
        first = load_file(place / "first.safetensors")
        then = load_file(weights_of(place / "runs" / name, 2))
        assert torch.equal(then["base.0.weight"], first["base.0.weight"])
        assert then["head.weight"].shape == (7, 5)
    one, two = (load_file(weights_of(place / "runs" / f"on-{n}", 2)) for n in (1, 2))
    assert torch.equal(one["head.weight"], two["head.weight"]), "drawn from the seed"


def test_a_run_that_has_a_checkpoint_needs_the_source_no_more(place, processes):
    source = place / "gone.safetensors"
    shutil.copy(place / "first.safetensors", source)
    spec = job("resumed", init={"from": str(source)})
    processes(1).run(train_in_process, spec, place / "runs", 1)
    source.unlink()
    processes(1).run(train_in_process, spec, place / "runs")
    assert weights_of(place / "runs/resumed", 2).exists()


def test_a_wrong_source_is_reported_before_anything_is_written(place):
    spec = load_spec(job("wrong", init={"from": str(place / "first.safetensors")}))
    (place / "wrong.yaml").write_text(dump_spec(spec))
    told = evenstep("run", "wrong.yaml", "task_args={classes: 7}", cwd=place)
    assert told.returncode == 64
    assert "head.weight [3, 5] in the source and [7, 5] in the model" in told.stderr
    assert not (place / "runs/wrong").exists()


def test_check_shows_what_is_taken_and_what_does_not_fit(place):
    world = alone()
    spec = load_spec(job("x", init={"from": str(place / "first.safetensors")}))
    found = dict(checked(spec, world=world))
    assert found["init"].endswith("first.safetensors: 9 tensors loaded.")
    other = load_spec(job("x", init={"from": "first"}, task_args={"classes": 7}))
    with pytest.raises(SpecError, match="There is no run first"):
        list(checked(other, world=world))


def test_the_plan_has_the_table(place):
    init = {"from": str(place / "runs/first"), "skip": ["head.*"], "checkpoint": "2"}
    (place / "planned.yaml").write_text(dump_spec(load_spec(job("planned", init=init))))
    told = evenstep("plan", "planned.yaml", cwd=place)
    assert told.returncode == 0, told.stderr
    rows = [line.split(None, 2) for line in told.stdout.splitlines()]
    assert ["loaded", "7"] in [row[:2] for row in rows]
    assert ["new", "2", "head.weight, head.bias"] in rows
    assert "from first after step 2" in told.stdout


def test_modules_are_renamed_and_all_can_go_below_one(place):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = Net(3).base, nn.Linear(5, 3)

    source = place / "first.safetensors"
    found = taken_by(Other(), source, rename={"base": "encoder"})
    assert (len(found.taken), found.new, found.left) == (9, [], [])
    below = taken_by(nn.ModuleDict({"backbone": Net(3)}), source, rename={".": "backbone"})
    assert "backbone.head.bias" in below.taken


def test_tied_weights_that_a_file_holds_once_are_taken_for_both(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.ends, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.out.weight = self.ends.weight

    model = Tied()
    for name in ("ends.weight", "out.weight"):
        value = torch.rand(5, 4)
        save_file({name: value}, tmp_path / "tied.safetensors")
        found = taken_by(model, tmp_path / "tied.safetensors")
        assert found.new == []
        found.apply(model)
        assert torch.equal(model.out.weight, value)


def test_a_directory_of_transformers_is_read_whole_or_in_parts(place, tmp_path):
    tensors = load_file(place / "first.safetensors")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    save_file(tensors, whole / "model.safetensors")
    names = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == file}, parts / file)
    index = {"weight_map": names}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    for directory in (whole, parts):
        found = taken_by(Net(3), directory)
        assert found.taken.keys() == tensors.keys()
    outside = {"weight_map": {"head.bias": "../part-0.safetensors"}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(outside))
    with pytest.raises(SpecError, match="names files outside of its directory"):
        taken_by(Net(3), parts)


@pytest.mark.parametrize(
    ("classes", "init", "told"),
    [
        (
            7,
            {},
            r"does not match the model: head.bias \[3\] in the source and \[7\] in the model;",
        ),
        (
            3,
            {"skip": ["haed.*"]},
            r"init.skip: 'haed.\*' matches no tensor of the model or the source",
        ),
        (
            3,
            {"rename": {"head": "hat"}},
            r"the model also has head.weight, head.bias, and the model",
        ),
        (3, {"rename": {".": "x"}, "strict": False}, r"has no tensor of this model. It has x.base"),
    ],
)
def test_what_does_not_fit_is_reported(place, classes, init, told):
    with pytest.raises(SpecError, match=told):
        taken_by(Net(classes), place / "first.safetensors", **init)


def test_not_strict_takes_whatever_fits(place):
    found = taken_by(Net(7), place / "first.safetensors", strict=False)
    assert set(found.new) == {"head.weight", "head.bias"}
    assert set(found.left) == {"head.weight", "head.bias"}


def test_what_is_not_a_source_of_weights_is_reported(place, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    for source, told in (
        (tmp_path / "none.safetensors", "init.from: there is no file"),
        (tmp_path / "weights.bin", "Pickle files .* are not read: save them as safetensors"),
        (tmp_path / "nothing", "There is no run"),
        (tmp_path, "is not a .safetensors file, a run, or a directory of"),
    ):
        with pytest.raises(SpecError, match=told):
            taken_by(Net(3), source)
    with pytest.raises(SpecError, match="has no moving average"):
        taken_by(Net(3), place / "runs/first", average=True)
