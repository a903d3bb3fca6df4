"""The updates of torch.optim's optimizers once more, in NumPy, from their papers' formulas.

Each is `update(w, g, s, t, lr, **options)`: it changes the weights `w` in place by the gradient
`g`, with the state `s` (empty at first), at the t-th step, counted from 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any


def sgd(w, g, s, t, lr, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0):
    g = g + weight_decay * w
    if momentum:
        s["v"] = g if t == 1 else momentum * s["v"] + (1 - dampening) * g
        g = g + momentum * s["v"] if nesterov else s["v"]
    w -= lr * g


def asgd(w, g, s, t, lr, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0):
    g = g + weight_decay * w
    eta = s.get("eta", lr)
    w *= 1 - lambd * eta
    w -= eta * g
    mu = s.get("mu", 1.0)
    s["mean"] = w.copy() if mu == 1 else s["mean"] + mu * (w - s["mean"])
    s["eta"] = lr / (1 + lambd * lr * t) ** alpha
    s["mu"] = 1 / max(1, t - t0)


def adagrad(w, g, s, t, lr, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0, eps=1e-10):
    g = g + weight_decay * w
    s["sum"] = s.get("sum", initial_accumulator_value) + g * g
    w -= lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(s["sum"]) + eps)


def adadelta(w, g, s, t, lr, rho=0.9, eps=1e-6, weight_decay=0.0):
    g = g + weight_decay * w
    s["v"] = rho * s.get("v", 0) + (1 - rho) * g * g
    step = np.sqrt(s.get("d", 0) + eps) / np.sqrt(s["v"] + eps) * g
    s["d"] = rho * s.get("d", 0) + (1 - rho) * step * step
    w -= lr * step


def rmsprop(w, g, s, t, lr, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False):
    g = g + weight_decay * w
    s["v"] = alpha * s.get("v", 0) + (1 - alpha) * g * g
    v = s["v"]
    if centered:
        s["m"] = alpha * s.get("m", 0) + (1 - alpha) * g
        v = v - s["m"] ** 2
    step = g / (np.sqrt(v) + eps)
    if momentum:
        s["b"] = step = momentum * s.get("b", 0) + step
    w -= lr * step


def rprop(w, g, s, t, lr, etas=(0.5, 1.2), step_sizes=(1e-6, 50)):
    sign = np.sign(g * s.get("g", 0))
    factor = np.where(sign > 0, etas[1], np.where(sign < 0, etas[0], 1.0))
    s["size"] = np.clip(s.get("size", np.full_like(w, lr)) * factor, *step_sizes)
    g = np.where(sign < 0, 0, g)
    w -= np.sign(g) * s["size"]
    s["g"] = g


def _moments(g, s, t, betas):
    s["m"] = betas[0] * s.get("m", 0) + (1 - betas[0]) * g
    s["v"] = betas[1] * s.get("v", 0) + (1 - betas[1]) * g * g
    return s["m"], s["v"]


def adam(w, g, s, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False):
    m, v = _moments(g + weight_decay * w, s, t, betas)
    if amsgrad:
        s["max"] = v = np.maximum(s.get("max", 0), v)
    w -= lr * m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)


def adamw(w, g, s, t, lr, weight_decay=1e-2, **options):
    w *= 1 - lr * weight_decay
    adam(w, g, s, t, lr, **options)


def adamax(w, g, s, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    g = g + weight_decay * w
    s["m"] = betas[0] * s.get("m", 0) + (1 - betas[0]) * g
    s["u"] = np.maximum(betas[1] * s.get("u", 0), np.abs(g) + eps)
    w -= lr / (1 - betas[0] ** t) * s["m"] / s["u"]


def nadam(w, g, s, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum_decay=4e-3):
    g = g + weight_decay * w
    m, v = _moments(g, s, t, betas)
    now, then = (betas[0] * (1 - 0.5 * 0.96 ** (n * momentum_decay)) for n in (t, t + 1))
    s["product"] = s.get("product", 1.0) * now
    root = np.sqrt(v / (1 - betas[1] ** t)) + eps
    w -= lr * (1 - now) / (1 - s["product"]) * g / root
    w -= lr * then / (1 - s["product"] * then) * m / root


def radam(w, g, s, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    g = g + weight_decay * w
    m, v = _moments(g, s, t, betas)
    m = m / (1 - betas[0] ** t)
    longest = 2 / (1 - betas[1]) - 1
    length = longest - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
    if length > 5:
        top = (length - 4) * (length - 2) * longest
        rectified = np.sqrt(top / ((longest - 4) * (longest - 2) * length))
        m = m * rectified * np.sqrt(1 - betas[1] ** t) / (np.sqrt(v) + eps)
    w -= lr * m
