"""When a process started: with its number, what tells it from a later one of that number. No torch.

The kernel uses the number (PID) of a process again after it has ended.
"""

from __future__ import annotations

from pathlib import Path


def start_of(process: int) -> str | None:
    """When a process of this machine started, in clock ticks since the boot.

    None where there is no such process, where it has ended, or where the system does not say.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        return None
    after_name = text.rpartition(")")[2].split()
    return None if after_name[0] in "ZX" else after_name[19]
