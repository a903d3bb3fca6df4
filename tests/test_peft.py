"""Adapters of the package peft: trained alone, exported as adapters and merged into their base."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import difference, spec_of, train_in_process, weights
from safetensors.torch import load_file
from torch import nn

from service.checkpoints.pretrained import export_merged, export_pretrained
from service.runs.checkpoint_files import checkpoints_in
from service.runs.export import export_weights
from service.spec.files import load_spec
from service.task import Task, custom, own_loss

# Both are imported where they are used: that takes seconds, and every worker loads all tests.
pytestmark = [
    pytest.mark.skipif(find_spec(name) is None, reason=f"needs the package {name}")
    for name in ("transformers", "peft")
]
# What peft asks of transformers has a newer name there.
pytestmark += [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")]
STEPS = 6


def base() -> nn.Module:
    """A small BERT in float64, with the same weights each time."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=17, intermediate_size=24, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config).double()


def adapted() -> nn.Module:
    import peft

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(base(), config)
    return model.double()


def words() -> torch.Tensor:
    return torch.randint(0, 17, (71, 6), generator=torch.Generator().manual_seed(1))


def task() -> Task:
    rows = [{"input_ids": text, "labels": text[0] % 3} for text in words()]
    return custom(
        step=own_loss,
        model=adapted,
        train=rows[:50],
        test=rows[50:],
        measures={"accuracy": lambda outputs, labels: outputs.logits.argmax(-1) == labels},
        merged=lambda model: model.merge_and_unload(),
    )


def job() -> dict[str, Any]:
    return spec_of("") | {
        "task": "test_peft:task",
        "batch": {"global_batch": 20, "micro_batch": 5},
        "length": {"steps": STEPS},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "test": {"every_steps": 3},
    }


def test_adapters_are_trained_resumed_and_exported(processes, tmp_path):
    processes(1).run(train_in_process, job(), tmp_path / "1")
    for stop_at in (3, None):
        processes(2).run(train_in_process, job(), tmp_path / "2", stop_at)
    assert difference(tmp_path / "1", tmp_path / "2", STEPS) < 1e-12
    first, last = adapted().state_dict(), weights(tmp_path / "1", STEPS)
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed
    assert all("lora_" in name or "modules_to_save" in name for name in changed)

    trained = adapted()
    trained.load_state_dict(last)
    text = words()
    with torch.no_grad():
        wanted = trained.eval()(input_ids=text).logits
        for model in exported(tmp_path / "1/job"):
            found = model.eval()(input_ids=text).logits
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def exported(run: Path) -> list[Any]:
    """The model again, from what the three exports write."""
    import peft
    import transformers

    newest, spec = checkpoints_in(run / "checkpoints")[-1], load_spec(run / "spec.yaml")
    assert export_pretrained(newest, run / "adapters", spec=spec).startswith("Peft")
    export_pretrained(newest, run / "merged", spec=spec, merged=True)
    export_merged(newest, run / "merged.safetensors", spec=spec)
    export_weights(newest, run / "trained.safetensors", trained=True)
    names = sorted(path.name for path in (run / "adapters").iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names)
    assert (run / "adapters/adapter_model.safetensors").stat().st_size < 20_000
    return [
        peft.PeftModel.from_pretrained(base(), run / "adapters").double(),
        transformers.AutoModelForSequenceClassification.from_pretrained(
            run / "merged", dtype=torch.float64
        ),
        with_weights(base(), run / "merged.safetensors"),
        with_weights(adapted(), run / "trained.safetensors", strict=False),
    ]


def with_weights(model: nn.Module, file: Path, strict: bool = True) -> nn.Module:
    model.load_state_dict(load_file(file), strict=strict)
    return model
