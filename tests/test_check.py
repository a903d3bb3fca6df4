"""`evenstep new` and `evenstep check`: what they write and say, and every kind of mistake found."""

import re
import shlex

import pytest
from commands import ROOT, evenstep
from test_mistakes import GOOD, MISTAKES, TASKS, wrong

from service.basics.errors import EvenstepError
from service.distributed.world import World
from service.preview.check import checked
from service.spec.files import load_spec

GOLDEN = """\
digits: the spec is valid
  task        1,433 training and 364 test rows, measures: accuracy (# s)
  plan        180 steps of 96 rows, 6 micro-batches of 16: up to 6 processes
  model       21,482 parameters in 8 tensors, 1 group of SGD (# s)
  data        16 rows, 4.22 kB (# s)
  step        loss # on cpu (# s for one micro-batch)
  test        loss #, accuracy # (# s for one micro-batch)
  checkpoint  # kB, read back equal (# s)
  memory      about # kB a process: weights 86.7 kB, gradients 85.9 kB, optimizer 85.9 kB, \
activations # kB
digits: ready to run, found in # s
"""


def without_figures(text):
    text = re.sub(r"[\d.]+(?= s\b)", "#", text)
    return re.sub(r"((?:loss|accuracy|activations|about|checkpoint) +)[\d.e+-]+", r"\1#", text)


def test_check_shows_what_a_run_would_do_and_writes_nothing(tmp_path):
    done = evenstep("check", "digits", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert without_figures(done.stdout) == GOLDEN
    assert list(tmp_path.iterdir()) == []


def test_new_writes_a_job_that_checks_runs_and_learns(tmp_path):
    made = evenstep("new", "my own", cwd=tmp_path)  # a name that a shell would part
    assert made.returncode == 0, made.stderr
    spec = (tmp_path / "my own/my_job.yaml").read_text()
    assert spec.startswith("# yaml-language-server: $schema=evenstep.schema.json\n")
    assert (tmp_path / "my own/evenstep.schema.json").exists()
    commands = re.findall(r"evenstep (.*)", made.stdout)
    assert [line.split()[0] for line in commands] == ["check", "run"]
    for line in commands:
        done = evenstep(*shlex.split(line), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert re.search(r"Done after step 600: .*test/accuracy (1\.|1$|0\.9)", done.stdout)


def test_new_replaces_nothing(tmp_path):
    (tmp_path / "my_task.py").write_text("mine")
    refused = evenstep("new", ".", cwd=tmp_path)
    assert refused.returncode == 64
    assert "already contains my_task.py" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["my_task.py"]
    assert (tmp_path / "my_task.py").read_text() == "mine"


MORE_TASKS = """
class Rows(torch.utils.data.Dataset):
    def __init__(self, broken=False, value=1.0):
        self.broken, self.value = broken, value
    def __len__(self):
        return 40
    def __getitem__(self, row):
        if self.broken:
            raise OSError("disk gone")
        return torch.full((3,), self.value), row % 2

class Linear(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

class Forgetful(Linear):
    def state_dict(self, *words, **options):
        held = super().state_dict(*words, **options)
        return {**held, "scale": torch.randn(1)}
    def load_state_dict(self, held, **options):
        return super().load_state_dict({k: v for k, v in held.items() if k != "scale"}, **options)

def job(train=None, test=None, model=Linear, **more):
    return supervised(model=model, train=train or Rows(), test=test or Rows(), **more)

class Unordered(Linear):
    def forward(self, rows):
        return super().forward(rows.clone().put_(torch.zeros(1, dtype=torch.long), rows[0, :1]))

def unordered(**_): return job(model=Unordered)
def broken_rows(**_): return job(train=Rows(broken=True))
def broken_tests(**_): return job(test=Rows(broken=True))
def no_number(**_): return job(train=Rows(value=float("nan")))
def forgetful(**_): return job(model=Forgetful)
def crooked(**_): return job(measures={"odd": lambda outputs, targets: outputs})
"""


def of(task):
    """The recipe with another task, and no measure that this one would lack."""
    return re.sub("(?m)^checkpoint:.*$", "", wrong("task", f"task: ./tasks_to_check.py:{task}"))


MORE_MISTAKES = {
    "a key that stands twice": (
        GOOD + "seed: 1\n",
        [],
        r"job.yaml:14:1: 'seed' is written twice; it is also on line 5",
    ),
    "a file that is not YAML": (
        wrong("model", "model: {batchnorm: micro"),
        [],
        r"job.yaml:\d+:\d+: .*YAML",
    ),
    "a key misspelt in a section": (
        wrong("batch", "batch: {global_batsh: 96}"),
        [],
        r"job.yaml:6:9: batch.global_batsh: unknown key; did you mean 'global_batch'",
    ),
    "a number out of range": (
        wrong("optimizer", "optimizer: {name: sgd, lr: -0.1}"),
        [],
        r"job.yaml:9:\d+: optimizer.lr: must be at least 0, but is -0.1",
    ),
    "a value that is none of several": (
        wrong("model", "model: {batchnorm: synch}"),
        [],
        r"job.yaml:8:\d+: model.batchnorm: must be .*but is 'synch'; did you mean 'sync'",
    ),
    "a number or a word, and neither": (
        wrong("batch", "batch: {global_batch: 96, micro_batch: large}"),
        [],
        r"job.yaml:6:\d+: batch.micro_batch: must be .* or 'auto', but is 'large'",
    ),
    "an optimizer nobody knows": (
        wrong("optimizer", "optimizer: {name: sdg, lr: 0.1}"),
        [],
        r"job.yaml:9:\d+: optimizer.name: must be .*but is 'sdg'; did you mean 'sgd'",
    ),
    "an option of another optimizer": (
        wrong("optimizer", "optimizer: {name: adamw, lr: 0.1, momentum: 0.9}"),
        [],
        r"job.yaml:9:\d+: optimizer.momentum: unknown key",
    ),
    "a schedule without its length": (
        wrong("schedule", "schedule: {name: step, gamma: 0.1}"),
        [],
        r"job.yaml:10:\d+: schedule: must have every_steps, .*but has none",
    ),
    "a length given twice": (
        GOOD,
        ["length.steps=300", "length.epochs=3"],
        r"length: must have epochs or steps, but has both.*length.epochs=",
    ),
    "an interval given twice": (
        wrong("test", "test: {every_epochs: 1, every_steps: 10}"),
        [],
        r"job.yaml:11:\d+: test: must have every_steps or every_epochs, but has both",
    ),
    "what waits for tests that never come": (
        wrong("test", "early_stopping: {measure: test/loss, mode: min, patience: 3}"),
        [],
        r"early_stopping needs tests: add test.every_epochs or test.every_steps",
    ),
    "a name that is no directory's": (
        GOOD,
        ["name=a/b"],
        r"name: must be letters and digits.*but is 'a/b'",
    ),
    "rows that cannot be read": (
        of("broken_rows"),
        [],
        r"The data set failed on row 34 \(step 0, micro-batch 0\): OSError: disk gone",
    ),
    "rows that cannot be read by a worker": (
        of("broken_rows"),
        ["loader.workers=1"],
        r"^The data set failed on row 34 \(step 0, [^\n]*\): OSError: disk gone \(\S+py:\d+\)$",
    ),
    "test rows that cannot be read": (
        of("broken_tests"),
        [],
        r"The test set failed on row 0 \(micro-batch 0\): OSError: disk gone",
    ),
    "a loss that is no number": (
        of("no_number"),
        [],
        r"The training loss is nan at step 1",
    ),
    "a model that a checkpoint does not hold": (
        of("forgetful"),
        [],
        r"scale",
    ),
    "a secret": (
        GOOD,
        ["task_args.source=https://me:a-password@example.com/rows"],
        r"task_args.source contains a secret",
    ),
    "a measure of another shape": (
        of("crooked"),
        [],
        r"task.measure: must have the shape \[16, 1\].*but has \[16, 2, 1\]",
    ),
}
CHECKED = {name: m for name, m in MISTAKES.items() if not any("--" in w for w in m[1])}


def message_of_check(world: World, path: str, overrides: list[str]) -> str | None:
    """What a check of this spec ends with, in a process that is there already."""
    try:
        for _ in checked(load_spec(path, overrides=overrides), world=world):
            pass
    except EvenstepError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("check")
    (place / "my_task.py").write_text(TASKS)  # the name in the mistakes of `run`
    (place / "tasks_to_check.py").write_text(TASKS + MORE_TASKS)
    return place


def message_of(kind, place, process):
    """What the check says of this kind of mistake, as a person beside the spec sees it."""
    spec, overrides, _ = (CHECKED | MORE_MISTAKES)[kind]
    (place / "job.yaml").write_text(spec)
    [told] = process.run(message_of_check, str(place / "job.yaml"), overrides)
    assert told is not None, "the check found nothing"
    return told.replace(f"{place}/", "")


@pytest.mark.parametrize("kind", [*CHECKED, *MORE_MISTAKES])
def test_check_finds_every_kind_of_mistake(place, processes, kind):
    told = message_of(kind, place, processes(1))
    assert re.search((CHECKED | MORE_MISTAKES)[kind][2], told, re.DOTALL), told
    assert "Traceback" not in told
    page = (ROOT / "docs/reference/errors.md").read_text()
    assert f"```\n{told}\n```" in page, "python tests/error_page.py > docs/reference/errors.md"


def test_a_mistake_ends_check_with_one_message(tmp_path):
    (tmp_path / "job.yaml").write_text(wrong("task", "task: ./my_task.py:mean"))
    (tmp_path / "my_task.py").write_text(TASKS)
    ended = evenstep("check", "job.yaml", cwd=tmp_path)
    assert ended.returncode == 64
    assert ended.stderr.count("error:") == 1
    assert "must give one value for each row" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "ready to run" not in ended.stdout


def test_a_check_computes_in_one_order_as_a_run_with_the_same_bits_does(tmp_path):
    (tmp_path / "tasks_to_check.py").write_text(TASKS + MORE_TASKS)
    (tmp_path / "job.yaml").write_text(f"{of('unordered')}exactness: bitwise\n")
    ends = [evenstep(command, "job.yaml", cwd=tmp_path) for command in ("check", "run")]
    told = "error: exactness: bitwise: torch has no deterministic implementation of put_ on cpu, "
    assert [(end.returncode, told in end.stderr) for end in ends] == [(64, True)] * 2
    assert all(f"({tmp_path}/tasks_to_check.py:" in end.stderr for end in ends)
    assert "ready to run" not in ends[0].stdout


def test_the_good_spec_of_these_mistakes_is_good(processes):
    assert (ROOT / "service/recipes/digits.yaml").read_text() == GOOD
    [told] = processes(1).run(message_of_check, str(ROOT / "service/recipes/digits.yaml"), [])
    assert told is None
