"""The processes of one node: how they start, receive signals, and end.

From top to bottom; a room imports only from rooms below it:

* local: runs N processes on this machine and returns the exit code of the root cause.
* fork_server: imported only by the fork server, before torch: binds it to its launcher.
* warm_start: work that starts before the command is parsed, for an earlier first step.
* terminal: standard output and standard error that survive the loss of their reader.
* signals: records a request to stop from the start on, before torch, click or a spec is loaded.
* side_by_side: several commands at a time on this machine: each in its own process, stopped
  together.
* saving: finds the ranks of this machine that are writing a checkpoint, so that they may finish
  it.
* echo: copies the log files of the other ranks into the launcher's own output.
* agent: torch's elastic agent over processes that are forked from a warm server and end in
  bounded time.
"""
