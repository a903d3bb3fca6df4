"""What can be said of a job before it runs: its plan, and a check of it.

From top to bottom; a room imports only from rooms below it:

* plan: what `evenstep plan` shows: the plan of a job in words, with the table of its parameters.
* check: what `evenstep check` does: everything a run does, once and small, before it waits in a
  queue.
"""
