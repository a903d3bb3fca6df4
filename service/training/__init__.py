"""The train loop and the test loop, what they count, and the run around them.

From top to bottom; a room imports only from rooms below it:

* worker: builds a run from its plan, in order, in one function; trains and tests; cleans up.
* loops: the train loop and the test loop.  No rank appears in them: `world` is all processes as
  one.
* receipts: the receipt: which rows the forward passes really consumed, as a digest for each step.
* batch_size_finder: what a spec leaves to the machine: `batch.micro_batch: auto` and
  `loader.workers: auto`.
* dry_run: one throw-away forward and backward pass before the first step, for what it brings to
  light.
"""
