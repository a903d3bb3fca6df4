"""Containers without a registry: podman and buildah with settings and a store of their own.

The image is built from our Dockerfile, on a base that debootstrap makes of this machine's own
Debian, with wheels that pip fetches here, where it knows its index. All of it is kept in a
cache (`PLACE`), so a machine pays for it once; nothing under /etc is read or written.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

from commands import ROOT

PLACE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "evenstep-containers"
NEEDED = ("podman", "buildah", "runc", "debootstrap", "iptables", "apt-get")
_TAG = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
IMAGE = f"localhost/evenstep:{_TAG}"
"""The image of this source tree."""
SETTINGS = {
    "CONTAINERS_STORAGE_CONF": str(PLACE / "storage.conf"),
    "CONTAINERS_CONF": str(PLACE / "containers.conf"),
}
"""What podman and buildah must find in their environment."""

_STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{place}/store"
runroot = "{place}/run"
[storage.options.overlay]
skip_mount_home = "true"
"""
# Podman's own limits need CAP_SYS_RESOURCE, which root in a container may lack.
_ENGINE = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
tmp_dir = "{place}/tmp"
[network]
network_backend = "netavark"
network_config_dir = "{place}/networks"
"""


class NotHere(Exception):
    """No image can be had, or no container run: there is no network, or no right to it."""


@cache
def why_not() -> str | None:
    """Why containers cannot be built and run here, or None."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if os.geteuid() != 0:
        return "needs root, to make a base and networks"
    tried = podman("info", check=False)
    return (
        None if tried.returncode == 0 else f"podman does not run here: {_last_line(tried.stderr)}"
    )


def podman(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`podman WORDS`, with its output caught."""
    return _engine("podman", *words, check=check)


def built_image() -> str:
    """The name of the image, built of the tree as it is now; layers that have not changed stay.

    A machine without a cache takes about five minutes for it.

    Raises:
        NotHere: it has no cache, and no packages are to be had; or no container starts.
    """
    base = _base()
    _try(base)
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*facts["project"]["dependencies"], *facts["build-system"]["requires"]]
    wanted += facts["project"]["optional-dependencies"]["metrics"]
    wheels = wheels_of("evenstep", wanted, python=_python_of(base))
    build(ROOT, IMAGE, wheels=wheels, words=("--build-arg", f"BASE_IMAGE={base}"))
    podman("image", "prune", "--force", "--filter", "until=24h")  # layers of an older tree
    return IMAGE


def left_behind() -> list[str]:
    """Containers and networks that this process has made, and that are still there."""
    own = f"evenstep-{os.getpid()}-"
    names = podman("ps", "--all", "--format", "{{.Names}}").stdout.split()
    names += podman("network", "ls", "--format", "{{.Name}}").stdout.split()
    return [name for name in names if name.startswith(own)]


def build(context: Path, name: str, *, wheels: Path, words: tuple[str, ...] = ()) -> None:
    """Build the Dockerfile of a directory; its pip finds these wheels and nothing else."""
    settings = PLACE / "pip.conf"
    settings.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    _engine(
        *("buildah", "build", "--isolation", "chroot", "--layers", "--tag", name),
        *("--volume", f"{wheels}:/wheels:ro", "--secret", f"id=pip,src={settings}"),
        *(*words, context),
    )


def wheels_of(name: str, wanted: list[str], *, python: str) -> Path:
    """What is wanted and all that it needs, as wheels; fetched again when that has changed.

    Args:
        python: of which version they must be.
    """
    constraints = ROOT / "constraints.txt"
    text = "\n".join([python, *wanted, constraints.read_text()])
    place = PLACE / f"wheels-{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not place.exists():
        for old in PLACE.glob(f"wheels-{name}-*"):
            shutil.rmtree(old)
        partial = PLACE / f"partial-{os.getpid()}"
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:")
        words = ("--dest", partial, "--constraint", constraints, "--python-version", python)
        _run(*pip, *words, *wanted)
        partial.rename(place)
    return place


def _base() -> str:
    """A minimal Debian with Python, as the machine's own sources have it."""
    mirror, suite = _debian()
    name = f"localhost/evenstep-base:{suite}"
    if podman("image", "exists", name, check=False).returncode == 0:
        return name
    container = _engine("buildah", "from", "scratch").stdout.strip()
    try:
        root = _engine("buildah", "mount", container).stdout.strip()
        packages = "--include=ca-certificates,python3,python3-venv"
        made = _ran("debootstrap", "--variant=minbase", packages, suite, root, mirror)
        if made.returncode:
            raise NotHere(f"debootstrap {suite} {mirror}: {_last_line(made.stdout)}")
        for rest in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(Path(root, rest))
        _engine("buildah", "umount", container)
        _engine("buildah", "config", "--env", "LANG=C.UTF-8", container)
        _engine("buildah", "commit", "--quiet", container, name)
    finally:
        _engine("buildah", "rm", container)
    return name


def _try(base: str) -> None:
    """Run nothing, in a network of its own."""
    network = f"evenstep-{os.getpid()}-trial"
    for words in (
        ("network", "create", "--internal", network),
        ("run", "--rm", f"--network={network}", base, "true"),
        ("network", "rm", network),
    ):
        tried = podman(*words, check=False)
        if tried.returncode:
            podman("network", "rm", "--force", network, check=False)
            raise NotHere(f"podman {' '.join(words)}: {_last_line(tried.stderr)}")


def _debian() -> tuple[str, str]:
    """Where this machine gets its packages from, and the name of its release."""
    words = ("--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages")
    own = re.search(r"(?m)^VERSION_CODENAME=(\S+)", Path("/etc/os-release").read_text())
    assert own is not None, "a Debian without a name"
    for line in _run("apt-get", "indextargets", *words).splitlines():
        mirror, suite = line.split()
        if suite == own[1]:
            return mirror, suite
    raise NotHere(f"apt has no source for {own[1]}: run apt-get update")


def _python_of(base: str) -> str:
    words = ("import sys; print('%d.%d' % sys.version_info[:2])",)
    return podman("run", "--rm", "--network=none", base, "python3", "-c", *words).stdout.strip()


def _engine(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command of podman or buildah, under our settings."""
    PLACE.mkdir(parents=True, exist_ok=True)
    for name, text in (("storage.conf", _STORAGE), ("containers.conf", _ENGINE)):
        (PLACE / name).write_text(text.format(place=PLACE))
    done = subprocess.run(
        [str(word) for word in words],
        env=os.environ | SETTINGS,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr}"
    return done


def _run(*words: object) -> str:
    done = _ran(*words)
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stdout}{done.stderr}"
    return done.stdout


def _ran(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
