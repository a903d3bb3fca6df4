"""The one stand-in for the W&B server: what the real client asks for, answered over loopback."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

API_KEY = "local-" + "0" * 40


@dataclass
class ServerRun:
    """What the server knows of a run."""

    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where each piece of history was put, in the order of arrival."""
    exit_code: int | None = None
    preempting: bool = False
    stop_pressed: bool = False

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.history]


class WandBServer:
    """A W&B server on a port of its own, as long as the `with` block lasts."""

    def __init__(self) -> None:
        self.runs: dict[str, ServerRun] = {}
        self.mode: Literal["ok", "refusing key", "failing", "hanging"] = "ok"
        self.sweep_command: list[str] = []
        self.trials: deque[tuple[str, dict[str, Any]]] = deque()
        """Of the one sweep: ids of runs and their arguments, handed out one after the other."""
        self.changed = threading.Condition()
        self.closing = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self.netloc = f"127.0.0.1:{self._http.server_port}"
        self.url = f"http://{self.netloc}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def environment(self) -> dict[str, str]:
        """Variables that lead a client here, and make it send its rows every second."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": API_KEY,
            "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
        }

    def wait_until(self, condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
        """Return as soon as a request has made `condition` true."""
        with self.changed:
            assert self.changed.wait_for(condition, seconds), f"not within {seconds} s: {self.runs}"

    def answer_query(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found.group(1) if found else ""
        run_id = variables.get("name") or variables.get("runId") or ""
        if name == "Viewer":
            viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}"}
            return {"viewer": {**viewer, "teams": {"edges": []}}}
        if name == "UpsertBucket":
            return self._upsert(run_id, variables)
        if name == "RunResumeStatus":
            return {"model": {"id": "p", "bucket": self._resume_status(run_id)}}
        if name == "RunStoppedStatus":
            return {"project": {"run": {"stopped": self.runs[run_id].stop_pressed}}}
        if name == "SweepWithRuns":
            config = json.dumps({"command": self.sweep_command})  # YAML as well
            return {"project": {"sweep": {"config": config, "runs": {"edges": []}}}}
        if name == "CreateAgent":
            return {"createAgent": {"agent": {"id": "a"}}}
        if name == "Heartbeat":
            busy = any(json.loads(variables["runState"]).values())
            commands = [] if busy else [self._next_command()]
            return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(commands)}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def _next_command(self) -> dict[str, Any]:
        if not self.trials:
            return {"type": "exit"}
        run_id, arguments = self.trials.popleft()
        args = {key: {"value": value} for key, value in arguments.items()}
        return {"type": "run", "run_id": run_id, "program": "unused", "args": args}

    def _upsert(self, run_id: str, variables: dict[str, Any]) -> dict[str, Any]:
        is_new, project = run_id not in self.runs, variables.get("project")
        run = self.runs.setdefault(run_id, ServerRun())
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        bucket = {
            **_bucket(run_id, run),
            "description": "",
            "sweepName": None,
            "project": {"id": "p", "name": project, "entity": {"id": "e", "name": "me"}},
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _resume_status(self, run_id: str) -> dict[str, Any] | None:
        if run_id not in self.runs:
            return None
        run = self.runs[run_id]
        last = json.dumps(run.history[-1] if run.history else {})
        return {
            **_bucket(run_id, run),
            "summaryMetrics": last,
            "historyTail": json.dumps([last]),
            "eventsTail": json.dumps(["{}"]),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }

    def take_stream(self, run_id: str, content: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[run_id]
        if piece := (content.get("files") or {}).get("wandb-history.jsonl"):
            run.offsets.append(piece["offset"])
            run.history[piece["offset"] :] = [json.loads(line) for line in piece["content"]]
        run.preempting = run.preempting or bool(content.get("preempting"))
        if content.get("complete"):
            run.exit_code = content["exitcode"]
        return {"limits": {}, "stopped": run.stop_pressed}


def _bucket(run_id: str, run: ServerRun) -> dict[str, Any]:
    return {
        "id": f"b-{run_id}",
        "name": run_id,
        "displayName": run_id,
        "config": json.dumps(run.config),
        "historyLineCount": len(run.history),
    }


def _handler(server: WandBServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer waits 40 ms for the client

        def handle(self) -> None:
            with suppress(ConnectionError):  # a client that is killed hangs up
                super().handle()

        def do_POST(self) -> None:
            content = self._content()
            if server.mode == "hanging":
                server.closing.wait()
                self.close_connection = True
            elif server.mode == "failing":
                self._answer({"error": "try again"}, code=500)
            elif server.mode == "refusing key":
                self._answer({"errors": [{"message": "who are you?"}]}, code=401)
            else:
                with server.changed:
                    answer = self._answer_to(json.loads(content or b"{}"))
                    server.changed.notify_all()
                self._answer(answer)

        def do_PUT(self) -> None:
            self._content()
            self._answer({})

        def do_GET(self) -> None:
            self._answer({})

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _answer_to(self, content: dict[str, Any]) -> dict[str, Any]:
            if self.path == "/graphql":
                variables = content.get("variables") or {}
                return {"data": server.answer_query(content["query"], variables)}
            if self.path.endswith("/file_stream"):
                return server.take_stream(self.path.split("/")[-2], content)
            return {}

        def _content(self) -> bytes:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            is_packed = self.headers.get("Content-Encoding") == "gzip"
            return gzip.decompress(content) if is_packed else content

        def _answer(self, answer: dict[str, Any], *, code: int = 200) -> None:
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
