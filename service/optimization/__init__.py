"""From gradients to weights: optimizers, learning rates, precision, averages.

From top to bottom; a room imports only from rooms below it:

* updates: from gradients to weights: unscale, clip, decide, step; and what is done about a NaN.
* train_state: what training changes: the model, the optimizer, and how many steps they have
  taken.
* precision: the arithmetic of a forward pass, and the scale that keeps fp16's gradients within
  range.
* optimizer_reference: the tables of the page of optimizers, made from the code: run this module
  to write them.
* optimizers: optimizers by name, and parameter groups by pattern: every parameter in exactly one.
* moving_average: an exponential moving average of a model's weights, as a second model of the
  same make.
* learning_rates: what sets the optimizer's learning rates, once per step, and what it remembers
  of it.
* flops: additions and multiplications: how many a pass takes, and how many a device could do.
* compilation: torch.compile of a model in place: the keys of its state dict stay what they are.
* buffers: buffers that move in the forward pass, besides BatchNorm's: codebooks, counters and
  such.
"""
