"""torch looks up the names of addresses, which must not take long where no name server answers."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from commands import CLEAN, DEADLINE_SECONDS, ROOT

# In a network of its own, where the name server takes each question and answers none.
SILENT = """
import fcntl, json, os, socket, struct, time

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    up = struct.pack("16sh", b"lo", 0x1 | 0x40)  # SIOCSIFFLAGS: IFF_UP, IFF_RUNNING
    fcntl.ioctl(any_socket, 0x8914, up)
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
server.setblocking(False)

from launch.rank.store import own_store

began = time.monotonic()
own_store("127.0.0.1")
seconds, asked = time.monotonic() - began, 0
while True:
    try:
        server.recv(512)
    except BlockingIOError:
        break
    asked += 1
print(json.dumps({"seconds": seconds, "asked": asked, "left": os.environ.get("RES_OPTIONS")}))
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs root and unshare, to have a network and a name server of its own",
)
@pytest.mark.parametrize(("options", "asked"), [(None, 1), ("timeout:1 attempts:2", 2)])
def test_a_store_waits_briefly_for_the_name_of_its_address(tmp_path, options, asked):
    """Twice five seconds, in which nothing could interrupt a process whose group was lost."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    hide = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
    apart = ["unshare", "--mount", "--net", "sh", "-c", hide, tmp_path / "resolv.conf"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody have a network of its own")
    environ = {key: value for key, value in CLEAN.items() if key != "RES_OPTIONS"}
    done = subprocess.run(
        [*apart, sys.executable, "-c", SILENT],
        cwd=ROOT,
        env=environ | ({} if options is None else {"RES_OPTIONS": options}),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    if not told["asked"]:
        pytest.skip("this torch, or this libc, asks nobody")
    assert (told["asked"], told["left"]) == (asked, options)
