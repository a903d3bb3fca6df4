"""The command line of the campaigns that disturb elastic jobs."""

from __future__ import annotations

import argparse


def asked_for(about: str | None, *switches: str) -> argparse.Namespace:
    """`--minutes`, `--seed`, `--bitwise`, and the switches of one campaign.

    Args:
        about: its docstring.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    for switch in ("--bitwise", *switches):
        parser.add_argument(switch, action="store_true")
    return parser.parse_args()
