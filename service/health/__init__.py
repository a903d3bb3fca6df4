"""Stops, heartbeats and hangs: whether a process works, and how it is asked to stop.  No torch.

From top to bottom; a room imports only from rooms below it:

* watchdog: finds a process that stands still, says where it stands, and ends it; its peers do the
  same.
* throughput: time between two logged steps: how fast the rows went by, and how long they were
  waited for.
* stop_request: what may go wrong from outside: signals that ask to stop, and a parent that is
  gone.
* stop_budget: how long a stop takes, by what saves have taken, and whether it is given as long.
  No torch.
* heartbeat: what this process is doing: told by the loops, read by whoever watches it or keeps
  account.
"""
