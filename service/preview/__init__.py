"""Everything before a run: the plan of a job, and a check of it.

From top to bottom; a room imports only from rooms below it:

* plan: `evenstep plan`: the plan of a job in words, with the table of its parameters.
* check: `evenstep check`: every part of a run, once and with little data.
"""
