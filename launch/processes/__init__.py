"""The processes of one node: how they start, receive signals, and end.

From top to bottom; a room imports only from rooms below it:

* local: runs N processes on this machine and returns the exit code of the root cause.
* fork_server: imported only by the fork server, before torch: binds it to its launcher.
* warm_start: work that starts before the command is parsed, for an earlier first step.
* under_torchrun: a run in a store that torchrun has started: rank 0 trains in a child, and its
  parent uploads.
* terminal: standard output and standard error that survive the loss of their reader.
* in_store: A run that lives in an object store: what its launcher does before and after the
  processes.
* signals: records a request to stop from the start on, before torch, click or a spec is loaded.
* side_by_side: several commands at a time on this machine: each in its own process, stopped
  together.
* saving: finds the ranks of this machine that are writing a checkpoint, so that they may finish
  it.
* following: A further node of a run in a store: it brings what node 0 has published, and uploads
  nothing.
* echo: copies the log files of the other ranks into the launcher's own output.
* agent: torch's elastic agent over processes that are forked from a warm server and end in
  bounded time.
"""
