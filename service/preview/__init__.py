"""What can be said of a job before it runs: its plan, and a check of it.

From top to bottom; a room imports only from rooms below it:

* plan: `evenstep plan`: the plan of a job in words, with the table of its parameters.
* check: `evenstep check`: everything that a run does, once and small.
"""
