"""Stops, heartbeats and hangs: whether a process makes progress, and requests to stop.  No torch.

From top to bottom; a room imports only from rooms below it:

* watchdog: the watchdog: finds a process that makes no progress, reports where it is, and kills
  it.
* throughput: throughput between two logged steps: rows per second, and the time spent waiting for
  data.
* sentinel: the sentinel: a small process for each rank, which kills it when no thread of it can
  run.
* stop_request: signals that ask a run to stop, and the death of a parent process.
* stop_budget: how long a stop takes, from measured saves, and whether there is enough time. No
  torch.
* sentinel_process: the program of a sentinel: kills its parent after too long a silence.
* heartbeat: the heartbeat of a process: what it is doing now, and the seconds spent on each kind
  of work.
"""
