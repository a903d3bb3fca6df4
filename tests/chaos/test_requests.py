"""A run in a store that is killed at a request, and resumed on an empty disk: a few of them."""

from pathlib import Path

import pytest
from stores import BUCKET, s3_server

from chaos.at_requests import killed_at, undisturbed
from service.storage.address import Address

pytest.importorskip("moto", reason="needs moto, flask and flask-cors")
pytest.importorskip("botocore", reason="needs botocore")


def test_a_run_that_is_killed_at_a_request_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed(tmp_path)
    with s3_server() as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        # In the first upload, and in a later one. All: chaos/at_requests.py.
        for number, done in ((18, True), (40, False)):
            kill = killed_at(
                number,
                done=done,
                server=server,
                place=tmp_path,
                address=Address("s3", f"{BUCKET}/{number}"),
                scratch=tmp_path / f"{number}",
            )
            assert kill.request
