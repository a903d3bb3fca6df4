"""The train loop and the test loop, what they count, and the run around them.

From top to bottom; a room imports only from rooms below it:

* worker: trains and tests the run that a plan describes: every part of it, in order, and its end.
* train_loop: the train loop.  No rank appears in it: `world` is all processes as one.
* train_step: one optimizer step: its forward and backward passes, and what becomes of their
  gradients.
* attempt: one attempt at a run: its directory opened by one, its records begun, and its end
  entered.
* setup: what a run trains, built part by part in the order that its random numbers have.
* after_step: what happens after a step, as the plan has it: test, log, save, and whether to stop.
* receipts: the receipt: which rows the forward passes really consumed, as a digest for each step.
* batch_size_finder: what a spec leaves to the machine: `batch.micro_batch: auto` and
  `loader.workers: auto`.
* dry_run: one throw-away forward and backward pass before the first step, for what it brings to
  light.
"""
