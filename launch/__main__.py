"""The `evenstep` command, `python -m launch` and `torchrun ... -m launch`: all the same."""

import os
import sys

from launch.signals import listen
from launch.warming import warm_up


def main() -> None:
    """Listen for a request to stop first; what the command needs takes a while to load."""
    listen()
    warm_up(sys.argv[1:], os.environ)
    from launch.cli import main as command

    command()


if __name__ == "__main__":
    main()
