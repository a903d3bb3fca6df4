"""The train loop, and the run around it.

From top to bottom; a room imports only from rooms below it:

* worker: trains and tests the run that a plan describes: build, restore, train, close.
* train_loop: the train loop. It contains no ranks: `world` is all processes as one.
* attempt: one attempt at a run: opens its directory, starts its records, and records its end.
* batch_size_finder: the batch-size finder (`batch.micro_batch: auto`), `loader.workers: auto`,
  and their defaults.
* setup: builds what a run trains, part by part, in the order that its random numbers need.
* own_train_step: one optimizer step of a task with its own step, with one optimizer or with
  several in turn.
* dry_run: the dry run: one forward and backward pass before the first step, to find errors.
* train_step: one optimizer step: its forward and backward passes, and the update.
* after_step: what happens after a step, as planned: test, log, save, and whether to stop.
* receipts: the receipt: for each step, a digest of the rows that its forward passes used.
* changed_spec: A run whose spec the user has changed: the effect on its state, and the messages.
"""
