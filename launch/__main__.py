"""The `evenstep` command, `python -m launch` and `torchrun ... -m launch`: all the same."""

import os
import sys

from launch.processes.signals import listen
from launch.processes.terminal import open_descriptors, outlive_readers, require_reader
from launch.processes.warm_start import out_of_place, warm_up
from service.basics.errors import SpecError
from service.health.stop_request import die_with_follower


def main() -> None:
    """First register for requests to stop; importing the command takes a while."""
    listen()
    die_with_follower()
    open_descriptors()
    if sys.argv[1:2] in (["run"], ["sweep"]):
        outlive_readers("stdout", "stderr")
    else:  # the command's purpose is its output
        outlive_readers("stderr")
        require_reader()
    if (told := out_of_place(sys.argv[1:], os.environ)) is not None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # else all of torchrun's would print it
            print(f"error: {told}", file=sys.stderr)
        sys.exit(SpecError.exit_code)
    warm_up(sys.argv[1:], os.environ)
    from launch.cli import main as command

    command()


if __name__ == "__main__":
    main()
