"""The generators that a person's code draws from without naming one: Python's, numpy's, torch's."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_generators(key: int) -> None:
    """Start Python's, numpy's and torch's (the CPU's) global generators at `key`, in [0, 2**63)."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)
