"""The processes of one node: how they start, hear signals, and end.

From top to bottom; a room imports only from rooms below it:

* local: N processes on this machine through torch's elastic agent; the root cause's code comes
  out.
* fork_server: imported by the fork server alone, before torch: binds it to its launcher, and out
  of signals.
* warm_start: what is begun before the command is read, so that the first step comes sooner.
* terminal: standard output and error of every process: they outlive whoever reads them.
* signals: A request to stop, heard from the first moment on: before torch, click or a spec is
  loaded.
* echo: what the ranks beside the first write into files, in the launcher's own output as well.
* agent: torch's elastic agent over processes of our own: forked warm, bound to us, ended in time.
"""
