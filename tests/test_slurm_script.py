"""What a spec looks like on Slurm: its script, and what is refused before there is one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from commands import ROOT, evenstep

from launch.commands.engines import ENGINES, commands_of
from launch.engines.settings import settings_of
from launch.engines.slurm.allowance import allowance
from launch.engines.slurm.script import Script, render
from launch.engines.slurm.states import state_in_words
from service.basics.errors import SpecError
from service.runs.directory import RunDirectory
from service.spec.files import load_spec
from service.spec.models import Spec
from service.storage.address import Address

RUNS = Path("/shared/runs")
ADDRESS = Address("s3", "bucket/runs")
JOB = {
    "name": "digits",
    "task": "service.recipes.digits:task",
    "batch": {"global_batch": 96, "micro_batch": 16},
    "length": {"epochs": 2},
    "optimizer": {"name": "sgd", "lr": 0.1},
}
EVERY_OPTION = {
    "partition": "gpu,spot",
    "account": "team-vision",
    "qos": "long",
    "constraint": "a100&ib",
    "time": "2-00:00:00",
    "nodes": 2,
    "gpus_per_node": 8,
    "gpu_type": "a100",
    "processes_per_node": 4,
    "cpus": 32,
    "memory": "200G",
    "options": ["--exclusive", "--mail-type=FAIL"],
    "prolog": ["module load cuda/12.4", "ulimit -l unlimited"],
    "env": {"NCCL_DEBUG": "INFO", "WORDS": 'it\'s "two" $words'},
    "command": "/shared/venv/bin/evenstep",
    "restarts": 5,
    "stop_seconds": 600,
}
MOUNTS = [
    {"source": "/shared/data", "path": "/data"},
    {"source": "/scratch", "path": "/out", "read_only": False},
]
PYXIS = {"image": "nvcr.io#nvidia/pytorch:25.01-py3", "mounts": MOUNTS}
WAYS: dict[str, dict[str, Any]] = {
    "the least": {},
    "on the CPU": {"gpus_per_node": 0, "nodes": 2},
    "every option": EVERY_OPTION,
    "pyxis": {"container": PYXIS},
    "apptainer": {"container": PYXIS | {"image": "/shared/e.sif", "runtime": "apptainer"}},
}
SWEEP = settings_of(["optimizer.lr=0.1,0.2", "batch={global_batch: 96},{global_batch: 48}"])


def job(**asked: Any) -> Spec:
    return load_spec(JOB | {"slurm": asked})


def script(sweep: Any = (), seconds: float = 120.0, **asked: Any) -> str:
    return render(Script(job(**asked), RUNS, seconds, sweep))


def at_address(**asked: Any) -> str:
    return render(Script(job(**asked), ADDRESS, 120.0, files=Path("/shared/files")))


def scripts() -> list[str]:
    ways = [script(**asked) for asked in WAYS.values()]
    return [*ways, script(sweep=SWEEP), at_address(nodes=2)]


@pytest.mark.parametrize("way", [*WAYS, "sweep", "address"])
def test_the_script_is_clean(way: str, tmp_path: Path) -> None:
    others = {"sweep": lambda: script(sweep=SWEEP), "address": lambda: at_address(nodes=2)}
    text = others[way]() if way in others else script(**WAYS[way])
    file = tmp_path / "job.sh"
    file.write_text(text)
    subprocess.run(["bash", "-n", file], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck not installed: apt-get install shellcheck")
    checked = subprocess.run(["shellcheck", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_every_line_has_its_reason() -> None:
    page = (ROOT / "docs/how-to/slurm.md").read_text()
    table = page.partition("## Every line of the script")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \| .{10,} \|$", table, re.MULTILINE)
    # A * is anything; brackets are themselves, and a | is \| in a table.
    rows = [c.replace("\\|", "|") for cell in cells for c in re.findall(r"`([^`]+)`", cell)]
    patterns = {row: row.replace("[", "[[]") for row in rows}
    used = set()
    for text in scripts():
        text = re.sub(
            r"(<<'END_OF_SPEC' \|\| exit\n).*?\n(END_OF_SPEC\n)", r"\1\2", text, flags=re.DOTALL
        )
        for line in text.splitlines():
            words = re.sub(r"\s# .*", "", line).strip()
            if not words or (words.startswith("#") and not words.startswith(("#SBATCH", "#!"))):
                continue
            fits = [row for row, pattern in patterns.items() if fnmatchcase(words, pattern)]
            assert fits, f"no reason for: {words}"
            used.update(fits)
    assert not set(rows) - used, "a reason for what is not there"


def test_runs_at_an_address_need_no_disk_but_for_the_logs() -> None:
    text = at_address(nodes=2)
    (place,) = re.findall(r"^place=(.*)$", text, re.MULTILINE)
    assert re.fullmatch(r"/shared/files/\.slurm/digits-[0-9a-f]{8}", place)
    assert f"#SBATCH --output={place}/log-%j" in text
    assert '--name "$name" --runs s3://bucket/runs' in text
    # The nodes have no directory in common in which the first could leave a secret.
    assert 'export EVENSTEP_SECRET_FILE="$place/secret-$SLURM_JOB_ID"' in text
    assert "SECRET" not in at_address(nodes=1)
    assert "SECRET" not in script(nodes=2)
    contained = at_address(container=PYXIS | {"mounts": []})
    assert "--container-mounts=/shared/files:/shared/files" in contained
    other = render(Script(job(), Address("s3", "other/runs"), 120.0, files=Path("/shared/files")))
    assert f"place={place}" not in other, "a run of the same name elsewhere"


def test_every_option_arrives() -> None:
    text = script(**EVERY_OPTION)
    asked = set(re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE))
    assert asked >= {
        "partition=gpu,spot",
        "account=team-vision",
        "qos=long",
        "constraint=a100&ib",
        "time=2-00:00:00",
        "nodes=2",
        "gpus-per-node=a100:8",
        "cpus-per-task=32",
        "mem=200G",
        "exclusive",
        "mail-type=FAIL",
        "signal=B:TERM@600",
        "requeue",
    }
    assert "\nmodule load cuda/12.4\nulimit -l unlimited\n" in text
    assert "/shared/venv/bin/evenstep run " in text
    assert "--processes 4" in text
    assert "-gt 5 ] || again\n" in text
    ran = subprocess.run(
        ["bash", "-c", next(line for line in text.splitlines() if "WORDS=" in line) + "; env"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'WORDS=it\'s "two" $words\n' in ran.stdout


def test_a_container_sees_the_runs_and_what_is_mounted() -> None:
    mounts = "/shared/runs:/shared/runs,/shared/data:/data:ro,/scratch:/out"
    pyxis = script(**WAYS["pyxis"])
    assert '--container-image="nvcr.io#nvidia/pytorch:25.01-py3"' in pyxis
    assert f"--container-mounts={mounts} " in pyxis
    assert f" apptainer exec --nv --bind {mounts} /shared/e.sif " in script(**WAYS["apptainer"])


def test_the_nodes_read_the_very_spec_that_was_rendered() -> None:
    text = script(**EVERY_OPTION)
    found = re.search(r"<<'END_OF_SPEC' \|\| exit\n(.*)\nEND_OF_SPEC\n", text, re.DOTALL)
    assert found is not None
    assert load_spec(yaml.safe_load(found[1])) == job(**EVERY_OPTION)


def test_a_stop_gets_the_time_that_the_saves_of_the_run_took(tmp_path: Path) -> None:
    assert "#SBATCH --signal=B:TERM@150\n" in script(), "before one was measured"
    run = tmp_path / "runs/digits"
    run.mkdir(parents=True)
    attempt = {"started": 1.0, "ended": 2.0, "from_step": 0, "to_step": 9, "outcome": "stopped"}
    facts = {"format": 1, "id": "x", "state": "stopped"}
    facts |= {"attempts": [attempt | {"longest_save_seconds": 100.0}]}
    (run / "run.json").write_text(json.dumps(facts))
    done = evenstep("slurm", "render", "digits", "slurm={nodes: 1}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --signal=B:TERM@450\n" in done.stdout, "twice two saves and leaving; and 30 s"
    assert not (tmp_path / "runs/.slurm").exists(), "to render writes nothing"


REFUSED = {
    "no section": ({}, "slurm: missing; add slurm:"),
    "a time in words": ({"slurm.time": "'1 day'"}, "slurm.time: must be a time as HH:MM:SS"),
    "a time of minutes": ({"slurm.time": "'60'"}, "slurm.time: must be a time as HH:MM:SS"),
    "a stop as long as the time": (
        {"slurm.time": "'00:10:00'", "slurm.stop_seconds": "600"},
        "slurm: stop_seconds (600) must be less than time (00:10:00)",
    ),
    "a time that is spent on stopping": (
        {"slurm.time": "'00:05:00'"},
        "slurm.time: of 00:05:00 a stop may take 150 s, so most",
    ),
    "an option that is ours": (
        {"slurm.options": "[--nodes=3]"},
        "slurm.options: --nodes is set by slurm.nodes: do not set it here",
    ),
    "an option with a command in it": (
        {"slurm.options": "['--comment=x y']"},
        "must be an option of sbatch with two dashes",
    ),
    "a prolog of several lines": (
        {"slurm.prolog": '["a\\nb"]'},
        "slurm.prolog: must be lines of shell, one in each item",
    ),
    "a key where everybody reads it": (
        {"slurm.prolog": "['export WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567']"},
        "slurm: prolog or env contains an apparent secret",
    ),
    "a password in an address": (
        {"slurm.env": "{STORE: 'https://me:word@example.com/data'}"},
        "slurm: prolog or env contains an apparent secret",
    ),
    "a key in the arguments of the task": (
        {"task_args": f"{{token: ghp_{'a' * 36}}}"},
        "task_args.token contains a secret",
    ),
    "a NUL in an image": (
        {"slurm.container": '{image: "/shared/e\\0.sqsh"}'},
        "slurm.container.image: must be a file or a name of an image",
    ),
    "a control character in an option": (
        {"slurm.options": '["--mail-user=a\\e[2J"]'},
        "must be an option of sbatch with two dashes",
    ),
    "a mount that is two": (
        {"slurm.container": '{image: /e, mounts: [{source: "/data,/etc", path: /d}]}'},
        "must be an absolute path without spaces, commas and :",
    ),
    "a name with a space": ({"slurm.partition": "'my gpus'"}, "must be a name in Slurm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_cluster_could_run_is_refused(case: str) -> None:
    changed, message = REFUSED[case]
    overrides = [f"{key}={value}" for key, value in changed.items()]
    given = JOB | {"slurm": {}} if "task_args" in changed else JOB
    with pytest.raises(SpecError, match=re.escape(message)):
        render(Script(load_spec(given, overrides=overrides), RUNS, 120.0))


def test_a_key_among_the_values_of_a_sweep_is_refused() -> None:
    with pytest.raises(SpecError, match="--sweep: a value is an apparent secret"):
        script(sweep=settings_of([f"task_args.token=ghp_{'a' * 36},none"]))


def test_no_secret_of_the_environment_stands_in_the_script(tmp_path: Path) -> None:
    key = "0123456789abcdef0123456789abcdef01234567"
    words = ("slurm", "render", "digits", "slurm={nodes: 2}")
    done = evenstep(*words, cwd=tmp_path, WANDB_API_KEY=key)
    assert done.returncode == 0, done.stderr
    assert key not in done.stdout


def test_a_directory_that_sbatch_would_misread_is_refused(tmp_path: Path) -> None:
    for name in ("my runs", "100%", "runs\ntouch", "it's", 'a"b', "a#b", "a\\b"):
        words = ("slurm", "render", "digits", "slurm={nodes: 1}", "--runs", name)
        done = evenstep(*words, cwd=tmp_path)
        assert done.returncode == 64
        assert "contains a space, a control character, a quote, or one of % #" in done.stderr
        assert done.stderr.count("\n") == 1
    contained = job(container={"image": "/e"})
    for name in ("a,b", "a:b"):
        with pytest.raises(SpecError, match="a comma or a colon, which separate the mounts"):
            render(Script(contained, Path("/shared") / name, 120.0))


def test_a_sweep_is_an_array_with_a_run_for_each_combination() -> None:
    text = script(sweep=SWEEP)
    assert "#SBATCH --array=0-3\n" in text
    assert "#SBATCH --output=/shared/runs/.slurm/digits/log-%A_%a\n" in text
    assert '2) settings=(optimizer.lr=0.2 "batch={global_batch: 96}") ;;' in text
    assert 'name="digits-$SLURM_ARRAY_TASK_ID"' in text


ARRAY = {  # as SchedMD's documentation of job arrays says: 36 is the array, and one of its jobs
    "squeue": """case "$*" in
        *--jobs=36_*%e*) echo 2026-11-28T12:00:00 ;;
        *--jobs=36_*%T*) echo RUNNING ;;
        *--jobs=36\\ *) echo ONE; echo ANOTHER ;;
        esac""",
    "scontrol": 'echo "$*" >>asked',
    "srun": 'echo "ends $EVENSTEP_ENDS" >>asked; exit $CODE',
}


@pytest.mark.parametrize(("code", "failures"), [(75, []), (137, ["failures-36_1"])])
def test_one_job_of_an_array_is_queued_again_alone(
    code: int, failures: list[str], tmp_path: Path
) -> None:
    """The whole script, by bash, as the job that has the number of its array as its own."""
    for name, text in ARRAY.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    place = tmp_path / "runs/.slurm/digits"
    place.mkdir(parents=True)
    file = tmp_path / "job.sh"
    file.write_text(render(Script(job(nodes=1), tmp_path / "runs", 120.0, SWEEP)))
    of_slurm = {"SLURM_JOB_ID": "36", "SLURM_ARRAY_JOB_ID": "36", "SLURM_ARRAY_TASK_ID": "1"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", file],
        cwd=tmp_path,
        env={"PATH": path, "TZ": "UTC", "CODE": str(code), **of_slurm},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "asked").read_text().splitlines() == ["ends 1795867200", "requeue 36_1"]
    assert sorted(file.name for file in place.glob("failures-*")) == failures


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["seed"], "must be KEY=VALUE,VALUE, but is 'seed'"),
        (["seed=1", "seed=2"], "seed is swept twice"),
        (["a=" + ",".join("x" * 40), "b=" + ",".join("x" * 40)], "1,600 combinations are more"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(sweep: list[str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        settings_of(sweep)


def test_without_slurm_the_error_says_so(tmp_path: Path) -> None:
    words = ("slurm", "submit", "digits", "slurm={nodes: 1}")
    done = evenstep(*words, cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 64
    assert "There is no squeue here. Use a machine from which jobs are submitted" in done.stderr
    assert list(tmp_path.iterdir()) == []


def one_job(place: Path, runs: Path) -> str:
    """A PATH with a squeue of ours, which has one job of the run `digits`."""
    (runs / ".slurm/digits").mkdir(parents=True)
    cells = ("7", "RUNNING", "1:00", "2:00", "1", "n1", str(runs / ".slurm/digits"), "None")
    (place / "answer").write_text("\t".join(cells) + "\n")
    (place / "squeue").write_text(f"#!/bin/sh\ncat '{place}/answer'\n")
    (place / "squeue").chmod(0o755)
    return f"{place}:{os.environ['PATH']}"


def test_a_printed_command_finds_the_runs(tmp_path: Path) -> None:
    runs = tmp_path / "run's"  # sbatch could not, but a command without a job can
    path = one_job(tmp_path, runs)
    done = evenstep("slurm", "logs", "digits", "--runs", runs, cwd=tmp_path, PATH=path)
    assert done.returncode == 1, done.stderr
    assert "does not have a log yet. See: evenstep slurm status digits" in done.stderr
    words = shlex.split(done.stderr.partition("See: evenstep ")[2])
    told = evenstep(*words, cwd=tmp_path, PATH=path)
    assert told.returncode == 0, told.stderr
    assert "digits: job 7 is running" in told.stdout


def test_a_job_that_exists_is_named_with_its_runs(tmp_path: Path) -> None:
    runs = tmp_path / "shared"
    words = ("slurm", "submit", "digits", "slurm={nodes: 1}", "--runs", runs)
    done = evenstep(*words, cwd=tmp_path, PATH=one_job(tmp_path, runs))
    assert done.returncode == 64, done.stderr
    assert f"Stop it with evenstep slurm cancel digits --runs {runs}, or" in done.stderr


ENDED_0 = "JobId=36 ArrayJobId=36 ArrayTaskId=0 JobState=COMPLETED ExitCode=0:0\n"
ENDED_1 = "JobId=37 ArrayJobId=36 ArrayTaskId=1 JobState=FAILED ExitCode=42:0\n"
FAILED = "36_1 has ended with 42 (would fail again)"
FORGOTTEN = "36_0 has ended, and Slurm no longer knows how"
OF_A_SWEEP = {  # Slurm's commands: the job 36_1 ends first, and squeue is asked for the 5th time
    "sbatch": "echo 36",
    "squeue": """n=$(cat asked); echo $((n + 1)) >asked
        [ "$n" -gt 3 ] || [ "$n" = 0 ] || cat job-0
        [ "$n" != 1 ] || cat job-1""",
    "scontrol": '[ "$(cat asked)" -gt 4 ] && cat later || cat now',
}


@pytest.mark.parametrize(
    ("later", "told"),
    [
        (ENDED_1 + ENDED_0, f"1 of 2 jobs are done; {FAILED}"),
        (ENDED_0, f"1 of 2 jobs are done; {FAILED}"),  # Slurm has forgotten the first
        ("", f"0 of 2 jobs are done; {FORGOTTEN}; {FAILED}"),
    ],
)
def test_a_failed_job_of_a_sweep_fails_the_wait(tmp_path: Path, later: str, told: str) -> None:
    for name, text in OF_A_SWEEP.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncd '{tmp_path}'\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for task in range(2):
        comment = tmp_path / "runs/.slurm/digits"
        cells = (f"36_{task}", "RUNNING", "1:00", "2:00", "1", "n1", str(comment), "None")
        (tmp_path / f"job-{task}").write_text("\t".join(cells) + "\n")
    (tmp_path / "asked").write_text("0")
    (tmp_path / "now").write_text(ENDED_1 + ENDED_0.replace("COMPLETED", "RUNNING"))
    (tmp_path / "later").write_text(later)
    words = ("slurm", "submit", "digits", "slurm={nodes: 1}", "--sweep", "seed=1,2", "--wait")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = evenstep(*words, cwd=tmp_path, PATH=path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"digits: {told}\n" in done.stdout
    (tmp_path / "runs/.slurm/digits/failures-36_1").write_text("1\n137\n")
    status = evenstep("slurm", "status", "digits", cwd=tmp_path, PATH=path)
    assert status.returncode == 0, status.stderr
    assert "  36_1 failed 2 times, the last with 137 (killed" in status.stdout


def record(tasks: str, state: str) -> str:
    """A line of scontrol for the jobs `tasks` of the array 36."""
    return f"JobId=9 ArrayJobId=36 ArrayTaskId={tasks} JobState={state} ExitCode=0:0\n"


DONE = "COMPLETED"


@pytest.mark.parametrize(
    ("between", "later", "code", "told"),
    [
        (record("1-3", "PENDING"), record("3", DONE), 0, "4 of 4 jobs are done"),
        (record("1,2,3%1", "PENDING"), record("3", DONE), 0, "4 of 4 jobs are done"),
        # Jobs that are cancelled before their start are one record to their end.
        (
            record("1,2-3", "PENDING"),
            record("1-3:2", "CANCELLED"),
            1,
            "2 of 4 jobs are done; 36_1 was cancelled; 36_3 was cancelled",
        ),
    ],
    ids=["a range", "a list", "cancelled"],
)
def test_jobs_of_a_sweep_that_wait_in_one_record_do_not_fail_it(
    tmp_path: Path, between: str, later: str, code: int, told: str
) -> None:
    """One job runs at a time; scontrol is asked at the end of the first, and of the last."""
    commands = {
        "sbatch": "echo 36",
        "squeue": """n=$(cat asked); echo $((n + 1)) >asked
            [ "$n" -lt 1 ] || [ "$n" -gt 2 ] || tail -n +$n queue""",
        "scontrol": """[ "$SLURM_BITSTR_LEN" = 0 ] || exit 1
            if [ "$(cat asked)" -gt 3 ]; then cat later; else cat between; fi""",
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncd '{tmp_path}'\n{text}\n")
        (tmp_path / name).chmod(0o755)
    comment = tmp_path / "runs/.slurm/digits"
    rows = [
        (f"36_{task}", "PENDING", "0:00", "1:00", "1", "", str(comment), "Resources")
        for task in range(4)
    ]
    (tmp_path / "queue").write_text("".join("\t".join(row) + "\n" for row in rows))
    (tmp_path / "asked").write_text("0")
    (tmp_path / "between").write_text(record("0", DONE) + between)
    (tmp_path / "later").write_text("".join(record(str(n), DONE) for n in range(3)) + later)
    words = ("slurm", "submit", "digits", "slurm={nodes: 1}", "--sweep", "seed=1,2,3,4", "--wait")
    done = evenstep(*words, cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == code, done.stdout + done.stderr
    assert f"digits: {told}\n" in done.stdout


def test_a_comment_of_another_job_may_have_any_bytes(tmp_path: Path) -> None:
    path = one_job(tmp_path, tmp_path / "runs")
    with open(tmp_path / "answer", "ab") as answer:
        answer.write(b"8\tRUNNING\t1:00\t2:00\t1\tn1\tcaf\xe9\tNone\n")
    done = evenstep("slurm", "status", "digits", cwd=tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("digits: job 7 is running")


def test_a_command_of_slurm_that_cannot_be_started_is_reported(tmp_path: Path) -> None:
    one_job(tmp_path, tmp_path / "runs")
    (tmp_path / "squeue").write_text("#!/nowhere/sh\n")  # on a longer PATH the next one is tried
    done = evenstep("slurm", "status", "digits", cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "error: squeue cannot be started: No such file or directory.\n"


@pytest.mark.parametrize(("nodes", "shown"), [(1, "5: epoch five\n"), (2, "")])
def test_a_number_before_a_line_is_a_label_only_with_several_nodes(
    tmp_path: Path, nodes: int, shown: str
) -> None:
    path = one_job(tmp_path, tmp_path / "runs")
    place = tmp_path / "runs/.slurm/digits"
    (place / "job.sh").write_text(render(Script(job(nodes=nodes), tmp_path / "runs", 120.0)))
    (place / "log-7").write_text("5: epoch five\n")
    done = evenstep("slurm", "logs", "digits", cwd=tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown


@pytest.mark.parametrize(
    ("command", "name"),
    [("status", ""), ("logs", "../x"), *(("cancel", each) for each in ("", "a/b", "x/job.yaml"))],
)
def test_a_name_that_no_run_can_have_is_refused(tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "runs/.slurm/digits").mkdir(parents=True)
    (tmp_path / "runs/x").mkdir()
    (tmp_path / "squeue").write_text("#!/bin/sh\necho asked >>asked\n")
    (tmp_path / "squeue").chmod(0o755)
    done = evenstep("slurm", command, name, cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 64, done.stderr
    assert "NAME|SPEC: must be the name of a run" in done.stderr
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (("PENDING", "Resources"), "is pending (Resources: it is the next; it starts when enough"),
        (("PENDING", "None"), "is pending"),
        (
            ("PENDING", "QOSMaxGRESPerUser"),
            "is pending (QOSMaxGRESPerUser: you have reached the limit of",
        ),
        (("PENDING", "AssocGrpCPUMinutesLimit"), "your group has reached its limit"),
        (("PENDING", "SomethingNew"), "is pending (SomethingNew: see man squeue"),
        (("RUNNING", "None"), "is running"),
        (("TIMEOUT", "", 0), "reached its time limit; submit it again"),
        (("FAILED", "", 42), "has ended with 42 (would fail again)"),
    ],
)
def test_slurms_words_are_explained(told: tuple[Any, ...], words: str) -> None:
    assert words in state_in_words(*told)


def test_every_engine_has_the_same_commands_with_the_same_options() -> None:
    groups = {engine.name: commands_of(engine) for engine in ENGINES}
    assert groups.keys() == {"kubernetes", "slurm"}
    changing = {"change", "accept_changes"}
    shared = {
        "render": {*changing, "spec", "overrides", "set_files", "name"},
        "submit": {*changing, "spec", "overrides", "set_files", "name", "waits"},
        "status": {"name"},
        "logs": {"name", "rank", "node", "previous", "follow"},
        "cancel": {"name"},
    }
    for engine in ENGINES:
        group = groups[engine.name]
        assert group.commands.keys() == shared.keys()
        for name, command in group.commands.items():
            assert isinstance(command, click.Command)
            own = engine.job_options if name in ("render", "submit") else engine.run_options
            mine = {parameter.name for parameter in command.params}
            assert mine == shared[name] | {option.name for option in own}


def test_the_time_left_and_whether_the_run_fits_are_reported(tmp_path: Path) -> None:
    done = evenstep("run", "digits", "length={steps: 6}", "--stop-at", 3, cwd=tmp_path)
    assert done.returncode == 75, done.stderr
    run = RunDirectory(tmp_path / "runs/digits")

    def told(seconds: float) -> str:
        line = allowance(run, {"EVENSTEP_ENDS": str(int(time.time() + seconds))})
        assert line is not None
        return line

    assert re.match(r"Slurm's time limit: (00:59:59|01:00:00) left\. 3 steps remain", told(3600))
    assert told(3600).endswith(", so they fit.")
    assert "so they do not fit: the run saves before the limit" in told(-5)
    assert allowance(run, {}) is None, "nobody says"
    assert allowance(run, {"EVENSTEP_ENDS": "9999999999"}) is None, "no limit"
    fresh = allowance(RunDirectory(tmp_path / "runs/new"), {"EVENSTEP_ENDS": "1"})
    assert fresh is not None
    assert "The time of a step is known once an attempt has ended" in fresh


@pytest.mark.parametrize(
    ("states", "asked"),
    [
        (["RUNNING"], 1),
        (["COMPLETING"], 0),  # by scancel, or as Slurm has seen that a node is lost
        (["PENDING"], 0),
        (["RUNNING refused", "PENDING"], 1),  # it has seen it between the two
        (["RUNNING refused", "RUNNING"], 2),  # the controller was restarting
    ],
)
def test_a_job_that_slurm_queues_again_is_not_queued_twice(
    states: list[str], asked: int, tmp_path: Path
) -> None:
    """With commands in place of Slurm's that answer one state after the other."""
    function = re.search(r"^again\(\) \{\n.*?^\}\n", script(), re.MULTILINE | re.DOTALL)
    assert function is not None
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    commands = {
        "squeue": "head -n 1 states | cut -d ' ' -f 1",
        "scontrol": "echo x >>asked; head -n 1 states | grep -qv refused",
        "sleep": "sed -i 1d states",
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run(
        ["bash", "-uc", f"{function[0]}\nstopped=no code=76 job=7\nagain"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
        capture_output=True,
        timeout=60,
    )
    file = tmp_path / "asked"
    assert (file.read_text().count("x") if file.exists() else 0) == asked
