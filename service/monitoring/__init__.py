"""Runs that are watched while they run, from processes beside them.  No torch.

From top to bottom; a room imports only from rooms below it:

* live_report: `report --serve`: the report's page, live, on loopback; and a list where there are
  many runs.
* watch: A live table of runs for a terminal, or plain lines elsewhere. No torch.
* exporter: the program of a metrics endpoint: serves /metrics and /healthz beside a launcher, or
  sends them.
* otlp: sends the metrics of a launcher by OTLP over HTTP, through OpenTelemetry's own exporter.
* metrics: the metrics of a launcher: their names, what they mean, and their values in a snapshot.
* liveness: whether the hang watch of each rank still works, for a liveness probe. No torch.
* live_runs: runs that are looked at again and again; a look reads only what has changed. No
  torch.
* endpoint: starts the process that serves or sends the metrics of a launcher; it hurts nothing.
  No torch.
* snapshot: what the files of a run say at this moment: heartbeats, the latest values, attempts.
  No torch.
* probe: A liveness probe: `python -m service.monitoring.probe PORT`. No package, no torch.
* http_server: A small HTTP server that only reads, and that no client can make slow, large or
  forgetful.
"""
