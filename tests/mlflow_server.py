"""MLflow's own server on a database of its own: `python tests/mlflow_server.py PORT DIRECTORY`.

`mlflow server` would start it under gunicorn or uvicorn, with services of MLflow that need far more
packages. This is the application that these serve.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clients import free_port, get, listens
from commands import CLEAN, DEADLINE_SECONDS
from injuring import until


@contextmanager
def mlflow_server(place: Path) -> Iterator[str]:
    """The address of a server that keeps everything in this directory."""
    port = free_port()
    with (place / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(port), str(place)],
            env=CLEAN,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            until(lambda: process.poll() is not None or listens(port), "it listens")
            # The first question makes the database: on a slow disk longer than a run waits for it.
            for path in ("/health", "/api/2.0/mlflow/experiments/get?experiment_id=0"):
                assert get(port, path).status == 200, (place / "server.log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait(DEADLINE_SECONDS)


def serve(port: int, place: Path) -> None:
    os.environ |= {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{place}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(place / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    from mlflow.server import app
    from werkzeug.serving import run_simple

    run_simple("127.0.0.1", port, app, threaded=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
