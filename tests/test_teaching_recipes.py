"""The recipes text, fashion and huggingface: what their own files and data can do."""

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import evenstep
from torch.nn import functional as F

from service.basics.errors import SpecError
from service.checkpoints.snapshots import load_weights
from service.recipes import fashion, text
from service.runs.tracking import read_metrics

# ---- text


def test_text_weighs_a_verse_by_its_characters():
    task = text.task(longest=120)
    read, following = task.train_data().tensors
    weight = task.weight(following)
    assert weight.shape == following.shape == (1379, 120)
    assert len(set(weight.sum(1).tolist())) > 50, "verses are of unequal length"
    losses = task.loss(torch.randn(1379, 62, 120), following)
    assert (losses[weight == 0] == 0).all()
    assert (losses[weight == 1] > 0).all()

    alphabet = sorted(set(Path(text.__file__).with_name("genesis.txt").read_text()))
    written = ["".join(alphabet[code] for code in codes) for codes in (read[0], following[0, :99])]
    assert written[0].startswith("\nAnd the earth was without form, and void;")
    assert written[1] == written[0][1:100]


def test_text_learns_alike_on_one_process_and_on_three(tmp_path):
    words = ["task_args={width: 24, longest: 40}", "length={steps: 30}", "test={}"]
    words += ["tracking.log_every_steps=1", "checkpoint={}"]
    rows = {}
    for count in (1, 3):
        name = f"on-{count}"
        done = evenstep("run", "text", *words, "--processes", count, "--name", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows[count] = read_metrics(tmp_path / "runs" / name / "metrics.jsonl")
    for a, b in zip(rows[1], rows[3], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
    assert rows[1][-1]["test/bits"] == pytest.approx(rows[3][-1]["test/bits"], rel=1e-4)
    assert rows[1][-1]["train/loss"] < 3.2 < rows[1][0]["train/loss"]

    # The mean over the test's characters, each once, of the averaged weights.
    task = text.task(width=24, longest=40)
    model = task.model()
    load_weights(tmp_path / "runs/on-3/checkpoints/step-00000030", model, average=True)
    read, following = task.test_data().tensors
    loss = F.cross_entropy(model.eval()(read), following, ignore_index=text.NOTHING).item()
    assert rows[3][-1]["test/loss"] == pytest.approx(loss, rel=1e-5)


# ---- gpt


def test_gpt_learns_alike_whole_and_sharded(tmp_path):
    words = ["task_args={width: 16, layers: 2, heads: 2, length: 32, dropout: 0.1}", "test={}"]
    words += ["length={steps: 12}", "batch={global_batch: 12, micro_batch: 4}", "checkpoint={}"]
    words += ["tracking.log_every_steps=1"]
    rows = {}
    for mode, count in (("ddp", 1), ("sharded", 2)):
        words_of_mode = ["--processes", count, "--name", mode, f"exchange.mode={mode}"]
        done = evenstep("run", "gpt", *words, *words_of_mode, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows[mode] = read_metrics(tmp_path / "runs" / mode / "metrics.jsonl")
    for a, b in zip(rows["ddp"], rows["sharded"], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
    assert rows["ddp"][-1]["test/bits"] == pytest.approx(rows["sharded"][-1]["test/bits"], rel=1e-4)
    assert rows["ddp"][-1]["train/loss"] < rows["ddp"][0]["train/loss"]


# ---- fashion


def write_idx(path, values):
    content = b"\0\0\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    content += values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def folder(tmp_path):
    """103 and 31 images of 9x7 with a bright row where their kind says."""
    draw = np.random.default_rng(4)
    for part, count, end in (("train", 103, ".gz"), ("t10k", 31, "")):
        labels = np.arange(count) % 3
        images = draw.integers(0, 60, (count, 9, 7))
        images[np.arange(count), 2 * labels] = 255
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{end}", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{end}", labels)
    return tmp_path


def test_fashion_reads_a_folder_of_idx_files_and_learns_it(folder):
    words = [f"task_args.folder={folder}", "batch={global_batch: 16}", "length={epochs: 4}"]
    done = evenstep("run", "fashion", *words, "test={}", "task_args.dropout=0", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "103 training and 31 test rows" in done.stdout
    assert read_metrics(folder / "runs/fashion/metrics.jsonl")[-1]["test/accuracy"] > 0.9


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fashion_pools_as_adaptive_pooling_does(memory_format):
    found = []
    for pool in (fashion.pooling(14, 21), torch.nn.AdaptiveMaxPool2d(7)):
        values = torch.randn(5, 3, 14, 21, generator=torch.Generator().manual_seed(1)).relu()
        values = values.to(memory_format=memory_format).requires_grad_()  # many are equal: zero
        pooled = pool(values)
        (pooled * torch.linspace(1, 2, 7)).sum().backward()
        found.append((pooled, values.grad))
    assert all(map(torch.equal, *found))


def test_fashion_computes_in_one_order_on_a_device_or_says_what_to_change(folder, with_sim):
    def run(*words):
        words = (f"task_args.folder={folder}", "exactness=bitwise", "length={steps: 2}", *words)
        return evenstep("run", "fashion", "batch={global_batch: 8}", *words, cwd=folder, **with_sim)

    refused = run()
    assert refused.returncode == 64, refused.stderr
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(
        "error: exactness: bitwise: torch has no deterministic implementation of "
        "adaptive_max_pool2d_backward_cuda on sim, and "
    )
    assert not (folder / "runs/fashion").exists()
    for part, count in (("train", 103), ("t10k", 31)):  # of Fashion-MNIST's size
        for file in folder.glob(f"{part}-images*"):
            write_idx(file, np.arange(count * 28 * 28).reshape(count, 28, 28) % 255)
    done = run("schedule={}", "test={}")
    assert done.returncode == 0, done.stderr
    assert "1 process on sim" in done.stdout


def test_fashion_gives_pixels_around_zero_and_labels(folder):
    images, labels = fashion.images_in(folder, "train").tensors
    assert images.shape == (103, 1, 9, 7)
    assert images.dtype == torch.float32
    assert images[4, 0, 2].tolist() == [1.0] * 7  # 255, for the second kind
    assert labels[:4].tolist() == [0, 1, 2, 0]


def test_fashion_without_its_files_names_the_package(tmp_path):
    done = evenstep("run", "fashion", f"task_args.folder={tmp_path}", cwd=tmp_path)
    assert done.returncode == 64
    assert re.search("there is no train-images-idx3-ubyte.*apt install", done.stderr)
    assert not (tmp_path / "runs").exists()


DAMAGED = {
    "is not an IDX file of bytes": lambda content: b"\0\0\x0d" + content[3:],
    r"should hold 31 bytes of shape \[31\], but holds 30": lambda content: content[:-1],
    "is not an IDX file": lambda content: content[:5],
}


@pytest.mark.parametrize("told", DAMAGED)
def test_fashion_refuses_a_damaged_file(folder, told):
    path = folder / "t10k-labels-idx1-ubyte"
    path.write_bytes(DAMAGED[told](path.read_bytes()))
    with pytest.raises(SpecError, match=told):
        fashion.images_in(folder, "t10k")


def test_fashion_refuses_a_torn_archive_and_labels_of_other_images(folder):
    packed = folder / "train-labels-idx1-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(SpecError, match=r"cannot be read: Compressed file ended"):
        fashion.images_in(folder, "train")
    write_idx(folder / "t10k-labels-idx1-ubyte", np.zeros(30))
    with pytest.raises(SpecError, match=r"hold \[31, 9, 7\] and \[30\]"):
        fashion.images_in(folder, "t10k")


# ---- huggingface


def test_huggingface_without_its_packages_says_how_to_get_them(tmp_path):
    (tmp_path / "transformers.py").write_text("import no_such_package_here")
    done = evenstep("run", "huggingface", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 64, done.stderr
    assert "there is no package no_such_package_here" in done.stderr
    assert "pip install 'evenstep[huggingface]'" in done.stderr


@pytest.mark.slow
def test_huggingface_trains_a_model_of_transformers_on_a_table_of_datasets(tmp_path):
    pytest.importorskip("transformers", reason="an optional extra of the package")
    pytest.importorskip("datasets", reason="an optional extra of the package")
    words = ["length={steps: 40}", "test={}", "model.precision=bf16", "checkpoint={}"]
    done = evenstep("run", "huggingface", *words, "--processes", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "runs/huggingface/metrics.jsonl")
    assert rows[-1]["test/accuracy"] > 0.3
    assert rows[-1]["test/loss"] < 2.1


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("task_args.model=transformers:NoSuchModel", "transformers has no 'NoSuchModel'"),
        ("task_args.table=service.recipes.digits:load", "has no split"),
    ],
)
def test_huggingface_says_what_is_not_there(tmp_path, word, told):
    pytest.importorskip("transformers", reason="an optional extra of the package")
    done = evenstep("run", "huggingface", word, cwd=tmp_path)
    assert done.returncode == 64, done.stderr
    assert told in done.stderr
