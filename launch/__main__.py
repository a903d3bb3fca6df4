"""The `evenstep` command, `python -m launch` and `torchrun ... -m launch`: all the same."""

from launch.signals import listen


def main() -> None:
    """Listen for a request to stop first; what the command needs takes a while to load."""
    listen()
    from launch.cli import main as command

    command()


if __name__ == "__main__":
    main()
