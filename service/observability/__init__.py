"""Where a run can be seen: the console, W&B and other trackers, the report.  No torch.

From top to bottom; a room imports only from rooms below it:

* wandb_writer: weights & Biases as a writer that cannot hurt the training: one thread owns all of
  wandb.
* report: one self-contained page about one or several runs: curves, facts, attempts, differences.
* other_writers: tensorBoard and trackio as writers: each in a thread of its own, like W&B, and no
  more harmful.
* console: what a person sees of a run: a live bar on a terminal, a greppable line per row
  elsewhere.
* charts: curves as inline SVG: pure functions from numbers to markup, the same text for the same
  numbers.
"""
