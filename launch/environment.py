"""Which process of how many this one is, read once from the environment.  No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from service.errors import SpecError


@dataclass(frozen=True)
class Environment:
    """One process's place in its job, as torchrun or our own launcher set it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1


def launched(variables: Mapping[str, str] | None = None) -> Environment | None:
    """The place torchrun gave this process, or None where no launcher started it.

    Raises:
        SpecError: the variables contradict each other.
    """
    variables = os.environ if variables is None else variables
    if "RANK" not in variables and "WORLD_SIZE" not in variables:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    missing = [name for name in names if name not in variables]
    if missing:
        raise SpecError(
            f"The environment sets {'RANK' if 'RANK' in variables else 'WORLD_SIZE'} but not "
            f"{', '.join(missing)}. Start the job with torchrun, which sets all of them, or "
            "unset them to run alone."
        )
    try:
        rank, world_size, local_rank, local_world_size = (int(variables[n]) for n in names)
    except ValueError as error:
        raise SpecError(f"{', '.join(names)} must be whole numbers ({error}).") from error
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise SpecError(
            f"RANK={rank} of WORLD_SIZE={world_size} and LOCAL_RANK={local_rank} of "
            f"LOCAL_WORLD_SIZE={local_world_size} cannot all be true. Start the job with torchrun."
        )
    return Environment(rank, world_size, local_rank, local_world_size)
