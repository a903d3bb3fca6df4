"""Hooks of the task: called on rank 0, logged everywhere, and unable to change the run."""

import io
import json
from pathlib import Path

import hooked
import numpy as np
import own_steps
import pytest
import torch
from commands import OFFLINE, evenstep
from jobs import spec_of, train_in_process
from PIL import Image
from safetensors.torch import load_file
from test_second_writers import READ_EVENTS, read
from wandb_log import read_segments

from service.basics.errors import HookFailed, SpecError
from service.data.losses import own_loss
from service.data.task import custom
from service.distributed.world import alone
from service.evaluation.hooks import HookContext, Logbook, require_hooks
from service.observability.logged_files import LoggedFiles, files_of_step, png, read_histogram
from service.optimization.compilation import compile_in_place, uncompiled_copy
from service.plan.plan import make_plan
from service.runs.tracking import read_metrics, tells_of_speed
from service.spec.files import load_spec
from service.spec.models import CompileSpec

STEPS, EPOCH_ENDS = 12, (4, 7, 10)  # 71 rows by 23


def job(factory, **sections):
    return (
        spec_of("")
        | {
            "task": f"{hooked.__file__}:{factory}",
            "batch": {"global_batch": 23, "micro_batch": 5},
            "length": {"steps": STEPS},
            "test": {"every_steps": 6, "micro_batch": 7},
            "tracking": {"log_every_steps": 5},
        }
        | sections
    )


def rows_of(place):
    return {row["step"]: row for row in read_metrics(place / "job/metrics.jsonl")}


def weights(place, step=STEPS):
    return load_file(place / f"job/checkpoints/step-{step:08d}/model.safetensors")


@pytest.fixture(scope="module")
def seen(processes, tmp_path_factory):
    """What the hooks of one job have logged, at 3 processes, stopped after step 5."""
    place = tmp_path_factory.mktemp("seen")
    test = {"every_steps": 6, "micro_batch": 7, "at_start": True}
    assert processes(3).run(train_in_process, job("seen", test=test), place, 5) == [None] * 3
    LoggedFiles(place / "job/logged", resume_step=5).write(6, "text", "of-a-lost-step", b"")
    processes(3).run(train_in_process, job("seen", test=test), place)
    return place


@pytest.mark.parametrize("model", [{}, {"moving_average": 0.9}], ids=["plain", "averaged"])
def test_hooks_change_no_bit_of_a_run(processes, tmp_path, model):
    counts = (1, 3) if not model else (1,)
    for count in counts:
        ends = []
        for factory in ("plain", "hostile"):
            place = tmp_path / f"{factory}-{count}"
            processes(count).run(train_in_process, job(factory, model=model), place)
            ends.append(place)
        tensors = [weights(place) for place in ends]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
        bare, with_hooks = (rows_of(place) for place in ends)
        for step, row in bare.items():
            of_run = {k: v for k, v in row.items() if not tells_of_speed(k)}
            assert of_run.items() <= with_hooks[step].items()
        assert {"hook/val/processes", "hook/ood/processes"} <= with_hooks[6].keys()
        assert with_hooks[4]["hook/processes"] == 1
        assert "system/hook_failures" not in with_hooks[STEPS]


def test_a_hook_is_reported_what_was_measured_and_gets_the_model_that_was(seen):
    rows = rows_of(seen)
    for step in (0, 6, STEPS):
        for name in ("val", "ood"):
            measured = rows[step][f"test/{name}/accuracy"]
            assert rows[step][f"hook/{name}/accuracy"] == measured
            assert rows[step][f"hook/{name}/again"] == pytest.approx(measured)
    assert rows[STEPS]["system/hook_seconds"] > 0
    facts = json.loads((seen / "job/run.json").read_text())
    assert facts["attempts"][1]["seconds"]["hook"] > 0


def test_an_epoch_ends_with_the_step_of_its_last_row(seen):
    rows = rows_of(seen)
    assert tuple(step for step, row in rows.items() if "hook/epoch" in row) == EPOCH_ENDS
    assert rows[4]["hook/epoch"] == pytest.approx(4 * 23 / 71)


def test_what_is_logged_lies_in_the_directory_of_the_run(seen):
    logged = seen / "job/logged"
    for step in EPOCH_ENDS:
        found = {file.key: file for file in files_of_step(logged, step)}
        assert found["hook/said"].path.read_text() == f"<after step {step}>"
        assert found["hook/code.py"].path.read_bytes() == Path(hooked.__file__).read_bytes()
    found = {file.key: file for file in files_of_step(logged, STEPS)}
    model = own_steps.classifier()
    model.load_state_dict(weights(seen))
    pixels = np.asarray(Image.open(found["hook/val/weights"].path))
    assert np.array_equal(pixels, np.rint(model[0].weight.detach().sigmoid().numpy() * 255))
    counts, edges = read_histogram(found["hook/ood/bias"].path)
    expected = np.histogram(model[0].bias.detach().numpy(), bins=4)
    assert np.array_equal(counts, expected[0])
    assert np.array_equal(edges, expected[1])


def test_what_a_lost_step_has_logged_is_removed(seen):
    assert files_of_step(seen / "job/logged", 6)
    assert not [f for f in files_of_step(seen / "job/logged", 6) if "lost" in f.key]
    assert not list((seen / "job/logged").rglob(".*"))


def test_a_failure_is_reported_with_its_traceback_and_the_run_continues(processes, tmp_path, capfd):
    train_in_process(alone(), job("failing"), tmp_path)
    told = capfd.readouterr().out
    assert "WARNING: task.after_test of the test set 'val' failed at step 6.\nTraceback" in told
    assert "ZeroDivisionError: no ood today" in told
    assert f'File "{hooked.__file__}", line' in told
    assert "evaluation/hooks.py" not in told
    assert told.count("Traceback") == 2 + 2  # of two sets after two tests
    rows = rows_of(tmp_path)
    assert [rows[step]["system/hook_failures"] for step in (6, STEPS)] == [2, 4]
    assert rows[6]["hook/val/before"] == 1


def ends_for_its_hook(world, spec, runs):
    try:
        train_in_process(world, spec, runs)
    except HookFailed as error:
        return str(error)
    return None


def test_a_failure_may_end_the_run_on_all_processes_with_its_state_saved(processes, tmp_path):
    spec = job("failing", faults={"on_hook_failure": "stop"})
    spec["task_args"] = {"marker": str(tmp_path / "mended")}
    told = processes(2).run(ends_for_its_hook, spec, tmp_path)
    assert told[0] == told[1]
    assert "no val today" in told[0]
    assert "continues after this step" in told[0]
    assert weights(tmp_path, 6)
    (tmp_path / "mended").touch()
    processes(2).run(train_in_process, spec, tmp_path)
    processes(2).run(train_in_process, job("plain"), tmp_path / "plain")
    a, b = weights(tmp_path), weights(tmp_path / "plain")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_hook_that_fails_before_the_first_step_ends_the_run_there(tmp_path):
    faults = {"on_hook_failure": "stop"}
    spec = job("failing", faults=faults, test={"at_start": True})
    with pytest.raises(HookFailed, match=r"failed at step 0(.|\n)*No step is lost"):
        train_in_process(alone(), spec, tmp_path)


def started(place, *words, factory, arguments):
    spec = job(factory, task_args=arguments, length={"steps": 5})
    (place / "job.json").write_text(json.dumps(spec))
    return evenstep("run", "job.json", "--processes", 2, *words, cwd=place)


def test_a_hook_is_interrupted_at_its_limit(tmp_path):
    limit = "faults.hook_timeout_seconds=1"
    done = started(tmp_path, limit, factory="slow", arguments={"seconds": 200.0})
    assert done.returncode == 0, done.stderr
    assert "HookTimeout: it took longer than faults.hook_timeout_seconds (1 s)" in done.stdout
    assert rows_of(tmp_path / "runs")[4]["system/hook_failures"] == 1


def test_the_others_wait_longer_for_a_hook_than_for_a_hang(tmp_path):
    limit = "faults.hang_timeout_seconds=2"
    done = started(tmp_path, limit, factory="slow", arguments={"seconds": 6.0})
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout


def test_a_hook_that_cannot_be_interrupted_is_reported_by_its_line(tmp_path):
    limit = "faults.hook_timeout_seconds=1"
    arguments = {"seconds": 200.0, "stubborn": True}
    done = started(tmp_path, limit, factory="slow", arguments=arguments)
    assert done.returncode == 1
    assert "at step 4, in a hook of the task" in done.stderr
    assert "hooked.py" in done.stderr


READ_SHOWN = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
every = {"images": 0, "histograms": 0, "tensors": 0}
events = EventAccumulator(sys.argv[1], size_guidance=every)
events.Reload()
tags = events.Tags()
print(json.dumps({
    "images": {t: [(e.step, e.width, e.height) for e in events.Images(t)] for t in tags["images"]},
    "bars": {t: [e.step for e in events.Histograms(t)] for t in tags["histograms"]},
    "texts": {
        t: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(t)]
        for t in tags["tensors"]
    },
}))
"""
READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
[name] = SQLiteStorage.get_runs("tests")
print(json.dumps(SQLiteStorage.get_logs("tests", name)))
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A run that was stopped and resumed, with all trackers."""
    place = tmp_path_factory.mktemp("shown")
    tracking = {"tensorboard": True, "trackio": {"project": "tests"}, "wandb": {"project": "tests"}}
    (place / "job.json").write_text(json.dumps(job("seen", tracking=tracking)))
    environ = OFFLINE | {"TRACKIO_DIR": str(place / "trackio")}
    for words, code in ((("--stop-at", 8), 75), ((), 0)):
        done = evenstep("run", "job.json", *words, cwd=place, **environ)
        assert done.returncode == code, done.stderr
        assert "lacks" not in done.stdout
        assert "stopped:" not in done.stdout
    return place


def test_tensorboard_shows_everything_once(shown):
    found = read(READ_SHOWN, shown / "runs/job/tensorboard")
    assert found["images"]["hook/val/photo"] == [[6, 3, 2], [STEPS, 3, 2]]
    assert found["bars"]["hook/ood/bias"] == [6, STEPS]
    assert found["texts"]["hook/said"] == [[s, f"<after step {s}>"] for s in EPOCH_ENDS]
    assert [step for step, _ in found["texts"]["hook/code.py"]] == list(EPOCH_ENDS)
    numbers = read(READ_EVENTS, shown / "runs/job/tensorboard")
    assert [step for step, _ in numbers["hook/val/accuracy"]] == [6, STEPS]


def test_trackio_shows_everything_once(shown):
    rows = read(READ_TRACKIO, TRACKIO_DIR=str(shown / "trackio"))
    kinds = {row["step"]: row for row in rows}
    assert len(kinds) == len(rows)
    assert kinds[6]["hook/val/photo"]["_type"] == "trackio.image"
    assert kinds[6]["hook/ood/bias"]["_type"] == "trackio.histogram"
    assert kinds[4]["hook/said"]["_value"] == "<after step 4>"
    assert kinds[4]["hook/code.py"].endswith("logged/step-00000004/files/code.py")


def test_wandb_shows_everything_once(shown):
    rows = [row for log in read_segments(shown / "runs/job") for row in log.rows]
    by_step = {row["step"]: row for row in rows}
    assert len(by_step) == len(rows)
    assert by_step[6]["hook/val/photo._type"] == "image-file"
    assert by_step[STEPS]["hook/ood/bias._type"] == "histogram"
    assert by_step[4]["hook/said._type"] == "html-file"
    kept = list((shown / "runs/job/wandb").glob("offline-run-*/files/**/code.py"))
    assert len(kept) == len(EPOCH_ENDS)


# ---- mistakes


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda c: c.log("a b", 1), "but is 'a b'"),
        (lambda c: c.log("../a", 1), r"but is '\.\./a'"),
        (lambda c: (c.log("a", 1), c.log_text("a", "")), "'a' was already logged at step 2"),
        (lambda c: c.log("a", torch.ones(2)), "must be one number"),
        (lambda c: c.log_text("a", 5), "must be a str"),
        (lambda c: c.log_image("a", torch.ones(2, 5, 5)), r"but has \[2, 5, 5\]"),
        (lambda c: c.log_image("a", torch.full((5, 5), 1.5)), "float32 from 1.5 to 1.5"),
        (lambda c: c.log_histogram("a", torch.tensor([float("nan")])), "none of 1 is finite"),
        (lambda c: c.log_file("a", "/no/such/file"), "No such file"),
    ],
)
def test_a_mistake_in_a_hook_is_one_sentence(tmp_path, act, said):
    book = Logbook(LoggedFiles(tmp_path), step=2)
    context = HookContext(2, 0.5, "", {}, {}, torch.device("cpu"), book, own_steps.classifier)
    with pytest.raises((ValueError, OSError), match=said):
        act(context)


def untested(**hooks):
    rows = own_steps.classified()[0]
    return custom(step=own_loss, model=own_steps.classifier, train=rows, **hooks)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (lambda: own_steps.two_tests(after_test=5), "task.after_test: must be a function"),
        (lambda: untested(after_test=print), "has no test rows"),
    ],
)
def test_a_hook_that_cannot_be_called_is_refused_before_the_run(task, said):
    made, spec = task(), load_spec(job("plain"))
    rows, test_rows = made.train_rows, made.test_rows
    plan = make_plan(spec, processes=1, train_rows=rows, test_rows=test_rows)
    with pytest.raises(SpecError, match=said):
        require_hooks(made, plan)


def test_a_stream_has_no_epochs_to_call_a_hook_after():
    made, spec = own_steps.two_tests(after_epoch=print), load_spec(job("plain"))
    plan = make_plan(spec, processes=1, train_rows=None, test_rows=made.test_rows)
    with pytest.raises(SpecError, match="a stream, which has no epochs"):
        require_hooks(made, plan)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the compiler's own
def test_the_copy_of_a_compiled_model_computes_with_its_own_weights():
    model = own_steps.classifier().eval()
    compile_in_place(model, CompileSpec(), telling=False)
    copied = uncompiled_copy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert copied(torch.ones(2, 6).double()).abs().max() == 0


class ChoosesItsForward(torch.nn.Linear):
    """A model that has `forward` as an attribute, as many that pick a fast path have."""

    def __init__(self):
        super().__init__(6, 3, dtype=torch.float64)
        self.forward = self.fast

    def fast(self, rows):
        return torch.nn.functional.linear(rows, self.weight, self.bias)


def test_the_copy_of_a_model_with_its_own_forward_computes_with_its_own_weights():
    model = ChoosesItsForward()
    copied = uncompiled_copy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert copied(torch.ones(2, 6).double()).abs().max() > 0


def test_an_unknown_hook_is_refused():
    with pytest.raises(TypeError, match="unknown argument 'after_tests'"):
        own_steps.two_tests(after_tests=print)


@pytest.mark.parametrize("shape", [(5, 6), (3, 5, 6), (5, 6, 3), (1, 5, 6), (5, 6, 4)])
def test_an_image_is_a_png_of_the_same_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    shown = np.asarray(Image.open(io.BytesIO(png(pixels))))
    if shape[0] in (1, 3):
        pixels = np.moveaxis(pixels, 0, 2).squeeze()
    assert np.array_equal(shown, pixels)
