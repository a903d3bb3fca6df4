"""Where a run can be seen: the console, W&B and other trackers, the report.  No torch.

From top to bottom; a room imports only from rooms below it:

* wandb_writer: weights & Biases as a background writer: one thread owns all of wandb.
* report: the report: one self-contained page about one or several runs.
* other_writers: tensorBoard and trackio as background writers, each in a thread of its own.
* console: the console: a live bar on a terminal, one plain line for each row elsewhere.
* charts: curves as inline SVG: pure functions, the same text for the same numbers.
"""
