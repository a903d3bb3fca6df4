"""Takes away and brings back the pods of an elastic Job at random, then compares with one pod.

python -m tests.chaos.pods [--minutes 10] [--seed 1] [--bitwise] [--processes]

The pods of the rendered Job are containers of the image (tests/pod_containers.py), or with
`--processes` plain processes in namespaces. A machine is lost (SIGKILL, without a word), drained
(SIGTERM and the grace period), or one container is killed; most often not that of index 0. The
controller creates the pod again, at another address, after 1 to 12 seconds, and later for one that
was killed often. With `--bitwise` there are two pods instead of three, and the bits must be equal.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
import containers
from elastic_pods import attempts_by_processes, elastic_job, lose, release, require_run_of_one_pod
from pod_containers import Podman
from pod_processes import Namespaces
from pods import Cluster

from chaos.options import asked_for

LEADER_OF_TEN = 2
"""In how many of ten cases it is the pod of index 0."""
STEPS_A_MINUTE = 400
"""More than are taken with the pauses in them."""


@dataclass
class Disturber:
    """Takes pods away until a time, and then lets the job come to its end."""

    chance: random.Random
    until: float
    seen: Counter[str] = field(default_factory=Counter)
    _next: float = 0.0

    def __call__(self, cluster: Cluster) -> None:
        now = time.monotonic()
        if now > self.until:
            release(cluster)
        elif now > self._next:
            if self._next and cluster.step():
                self._disturb(cluster)
            self._next = now + self.chance.uniform(2, 14)

    def _disturb(self, cluster: Cluster) -> None:
        others = sorted(cluster.running.keys() - {0})
        is_leader = not others or self.chance.randrange(10) < LEADER_OF_TEN
        index = 0 if is_leader else self.chance.choice(others)
        if index not in cluster.running:
            return
        kinds: dict[str, Callable[[], None]] = {
            "machine lost": lambda: lose(cluster, index),
            "drained": lambda: cluster.stop(index, disruption=True),
            "container killed": lambda: cluster.kill(index),
        }
        (kind,) = self.chance.choices(list(kinds), weights=[6, 3, 1])
        cluster.backoff = self.chance.uniform(0.1, 1.2)
        kinds[kind]()
        self.seen[f"{kind}, index {'0' if index == 0 else 'N'}"] += 1


def main() -> None:
    asked = asked_for(__doc__, "--processes")
    if not asked.processes:
        containers.built_image()
    engine = Namespaces if asked.processes else Podman
    steps, most = int(asked.minutes * STEPS_A_MINUTE), 2 if asked.bitwise else 3
    how = {"steps": steps, "bitwise": asked.bitwise}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        place.chmod(0o755)  # the pods' user must get to its volumes
        with elastic_job(place / "job", engine(), most=most, **how) as cluster:
            seconds = 60 * asked.minutes
            disturber = Disturber(random.Random(asked.seed), time.monotonic() + seconds)
            condition = cluster.run(seconds=2 * seconds + 600, each=disturber)
            assert condition == "Complete", f"{dict(disturber.seen)}\n{cluster.logs()}"
        require_run_of_one_pod(cluster, place / "alone", engine, **how)
        exits = Counter(f"{code} {action}" for _, code, action in cluster.ended)
        print(
            f"{dict(disturber.seen)}; {len(cluster.pods)} pods, ends: {dict(exits)}; "
            f"attempts by processes: {attempts_by_processes(cluster)}; equal to one pod"
        )


if __name__ == "__main__":
    main()
