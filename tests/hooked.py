"""Tasks with hooks: one that is hostile, one that fails, one that takes too long."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import own_steps
import torch
from PIL import Image

from service.data.task import Task
from service.evaluation.hooks import HookContext


def plain() -> Task:
    return own_steps.two_tests()


def hostile() -> Task:
    """Hooks that change whatever they reach: the run must not notice."""

    def spoil(context: HookContext) -> None:
        torch.manual_seed(1)
        np.random.seed(2)
        random.seed(3)
        model = context.model.train().requires_grad_(True)
        with torch.enable_grad():
            model(torch.ones(4, 6).double()).sum().backward()
        for parameter in model.parameters():
            parameter.zero_()
            parameter.requires_grad = False
        for given in (context.measures, context.values):
            given.clear()  # type: ignore[attr-defined]  # as a careless hook would
        torch.set_default_dtype(torch.float16)
        torch.set_num_threads(1 + torch.get_num_threads())
        torch.set_float32_matmul_precision("medium")
        torch.set_grad_enabled(True)
        os.chdir("/")
        context.log("processes", 1)

    return own_steps.two_tests(after_test=spoil, after_epoch=spoil)


def seen() -> Task:
    """Hooks that log what they are told, and each kind of thing."""

    def after_test(context: HookContext) -> None:
        context.log("accuracy", context.measures["accuracy"])
        with torch.no_grad():
            _, test = own_steps.classified()
            rows = test.tensors if context.test == "val" else tuple(t[:11] for t in test.tensors)
            scale = 1 if context.test == "val" else 3
            right = context.model(rows[0] * scale).argmax(1) == rows[1]
        context.log("again", right.double().mean())
        context.log("keys", len(context.values))
        context.log_image("weights", context.model[0].weight.sigmoid())  # type: ignore[index]
        context.log_image("photo", Image.new("RGB", (3, 2), (255, 0, 7)))
        context.log_histogram("bias", context.model[0].bias, bins=4)  # type: ignore[index]

    def after_epoch(context: HookContext) -> None:
        context.log("epoch", context.epoch)
        context.log_text("said", f"<after step {context.step}>")
        context.log_file("code.py", __file__)

    return own_steps.two_tests(after_test=after_test, after_epoch=after_epoch)


def failing(marker: str = "") -> Task:
    """A hook that fails until a file of this name is there."""

    def after_test(context: HookContext) -> None:
        context.log("before", 1)
        if not (marker and Path(marker).exists()):
            raise ZeroDivisionError(f"no {context.test} today")

    return own_steps.two_tests(after_test=after_test)


def slow(seconds: float, stubborn: bool = False) -> Task:
    """A hook that sleeps; a stubborn one begins again when it is interrupted."""

    def after_epoch(context: HookContext) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                time.sleep(end - time.monotonic())
            except Exception:
                if not stubborn:
                    raise

    return own_steps.two_tests(after_epoch=after_epoch)


def once(**hooks: Any) -> Task:
    return own_steps.two_tests(**hooks)
