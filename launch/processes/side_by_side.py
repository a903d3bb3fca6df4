"""Several commands at a time on this machine: each in its own process, stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.basics.atomic_files import told_when_unwritten, without_link
from service.basics.errors import EvenstepError, Stopped
from service.health.stop_request import PARENT, StopRequest

_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Command:
    """The command to run, and the file for its output."""

    name: str
    words: Sequence[str]
    log: Path


@dataclass
class _Running:
    command: Command
    place: int
    process: subprocess.Popen[bytes]
    told: bool = False
    """Whether the request to stop was sent to it."""


def run_side_by_side(
    commands: Sequence[Command],
    *,
    places: Sequence[Mapping[str, str]],
    stop: StopRequest,
    began: Callable[[Command], None],
    ended: Callable[[Command, int], None],
    unstarted: Callable[[Command, EvenstepError], None],
) -> None:
    """Run every command, at most one per place at a time; a place is a part of the environment.

    A request to stop is sent to all running commands, and no other one is started. They die with
    this process, however it ends. When a command ends, the next one gets its place. A command
    that cannot be started is passed to `unstarted`, and the others go on.

    Raises:
        KeyboardInterrupt: a second Ctrl-C, after all commands have received it and ended.
    """
    waiting, running = list(commands), list[_Running]()
    free = list(range(len(places)))
    try:
        while running or (waiting and not stop.requested):
            while waiting and free and not stop.requested:
                command, place = waiting.pop(0), free.pop(0)
                began(command)
                try:
                    running.append(_Running(command, place, _started(command, places[place])))
                except EvenstepError as error:
                    free.append(place)
                    unstarted(command, error)
            if stop.requested:
                _hand_on(running)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                free.append(one.place)
                ended(one.command, _code_of(one))
            time.sleep(_LOOK_SECONDS)
    except KeyboardInterrupt:
        for one in running:
            one.process.send_signal(signal.SIGINT)
            one.process.wait()
        raise


def _started(command: Command, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the command.

    Raises:
        EvenstepError: its log cannot be written, or the system starts no process.
    """
    with told_when_unwritten(command.log):
        log = open(command.log, "wb", opener=without_link)  # noqa: SIM115  # closed below
    with log:
        try:
            return subprocess.Popen(
                command.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **variables, PARENT: str(os.getpid())},
                start_new_session=True,  # Ctrl-C on the terminal reaches it once, from here
            )
        except OSError as error:
            raise EvenstepError(f"this machine starts no process: {error.strerror}.") from error


def _hand_on(running: Sequence[_Running]) -> None:
    for one in running:
        if not one.told:
            one.process.send_signal(signal.SIGTERM)
            one.told = True


def _code_of(one: _Running) -> int:
    """As in a shell: 128 plus the number of the signal that ended it."""
    code = one.process.returncode
    if one.told and code == -signal.SIGTERM:  # it arrived before the command could handle it
        return Stopped.exit_code
    return code if code >= 0 else 128 - code
