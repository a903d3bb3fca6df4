"""The options of every optimizer of torch.optim as data, so that checking needs no torch.

A test checks that this table equals the signatures of the pinned torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Known(NamedTuple):
    """One optimizer of torch.optim: its class name and the type of each option."""

    torch_name: str
    options: dict[str, Any]


_pair = tuple[float, float]
# Options that affect only the implementation; every other option changes the result.
_layout = {"foreach": bool, "capturable": bool, "differentiable": bool}

OPTIMIZERS: dict[str, Known] = {
    "sgd": Known(
        "SGD",
        {
            "momentum": float,
            "dampening": float,
            "weight_decay": float,
            "nesterov": bool,
            "maximize": bool,
            "foreach": bool,
            "differentiable": bool,
            "fused": bool,
        },
    ),
    "asgd": Known(
        "ASGD",
        {
            "lambd": float,
            "alpha": float,
            "t0": float,
            "weight_decay": float,
            "maximize": bool,
            **_layout,
        },
    ),
    "adagrad": Known(
        "Adagrad",
        {
            "lr_decay": float,
            "weight_decay": float,
            "initial_accumulator_value": float,
            "eps": float,
            "maximize": bool,
            "foreach": bool,
            "differentiable": bool,
            "fused": bool,
        },
    ),
    "adadelta": Known(
        "Adadelta",
        {"rho": float, "eps": float, "weight_decay": float, "maximize": bool, **_layout},
    ),
    "rmsprop": Known(
        "RMSprop",
        {
            "alpha": float,
            "eps": float,
            "weight_decay": float,
            "momentum": float,
            "centered": bool,
            "maximize": bool,
            **_layout,
        },
    ),
    "rprop": Known("Rprop", {"etas": _pair, "step_sizes": _pair, "maximize": bool, **_layout}),
    "adam": Known(
        "Adam",
        {
            "betas": _pair,
            "eps": float,
            "weight_decay": float,
            "amsgrad": bool,
            "decoupled_weight_decay": bool,
            "maximize": bool,
            "fused": bool,
            **_layout,
        },
    ),
    "adamw": Known(
        "AdamW",
        {
            "betas": _pair,
            "eps": float,
            "weight_decay": float,
            "amsgrad": bool,
            "maximize": bool,
            "fused": bool,
            **_layout,
        },
    ),
    "adamax": Known(
        "Adamax",
        {"betas": _pair, "eps": float, "weight_decay": float, "maximize": bool, **_layout},
    ),
    "nadam": Known(
        "NAdam",
        {
            "betas": _pair,
            "eps": float,
            "weight_decay": float,
            "momentum_decay": float,
            "decoupled_weight_decay": bool,
            "maximize": bool,
            **_layout,
        },
    ),
    "radam": Known(
        "RAdam",
        {
            "betas": _pair,
            "eps": float,
            "weight_decay": float,
            "decoupled_weight_decay": bool,
            "maximize": bool,
            **_layout,
        },
    ),
    "adafactor": Known(
        "Adafactor",
        {
            "beta2_decay": float,
            "eps": tuple[float | None, float],
            "d": float,
            "weight_decay": float,
            "foreach": bool,
            "maximize": bool,
        },
    ),
    "sparseadam": Known("SparseAdam", {"betas": _pair, "eps": float, "maximize": bool}),
    "muon": Known(
        "Muon",
        {
            "weight_decay": float,
            "momentum": float,
            "nesterov": bool,
            "ns_coefficients": tuple[float, float, float],
            "eps": float,
            "ns_steps": int,
            "adjust_lr_fn": str,
        },
    ),
    "lbfgs": Known(
        "LBFGS",
        {
            "max_iter": int,
            "max_eval": int,
            "tolerance_grad": float,
            "tolerance_change": float,
            "history_size": int,
            "line_search_fn": str,
        },
    ),
}

# The sources, for the reference page.
SOURCES: dict[str, str] = {
    "sgd": "Robbins & Monro 1951; momentum: Polyak 1964; Nesterov: Sutskever et al. 2013",
    "asgd": "Polyak & Juditsky 1992",
    "adagrad": "Duchi, Hazan & Singer 2011",
    "adadelta": "Zeiler, arXiv:1212.5701",
    "rmsprop": "Hinton 2012; centered: Graves, arXiv:1308.0850",
    "rprop": "Riedmiller & Braun 1993; meant for `global_batch: all`",
    "adam": "Kingma & Ba, arXiv:1412.6980; amsgrad: Reddi et al., arXiv:1904.09237",
    "adamw": "Loshchilov & Hutter, arXiv:1711.05101",
    "adamax": "Kingma & Ba, arXiv:1412.6980, section 7",
    "nadam": "Dozat 2016",
    "radam": "Liu et al., arXiv:1908.03265",
    "adafactor": "Shazeer & Stern, arXiv:1804.04235",
    "sparseadam": "Adam for sparse gradients; other parameters need a `companion`",
    "muon": "Jordan 2024; only matrices, other parameters need a `companion`",
    "lbfgs": "Liu & Nocedal 1989; evaluates a step several times, one group",
}
