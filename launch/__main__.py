"""`python -m launch` and `torchrun ... -m launch`: the same as the `evenstep` command."""

from launch.cli import main

if __name__ == "__main__":
    main()
