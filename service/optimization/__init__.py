"""From gradients to weights: optimizers, learning rates, precision, averages.

From top to bottom; a room imports only from rooms below it:

* updates: from gradients to weights: unscale, clip, decide, step; and what happens after a NaN.
* train_state: the state of training: the model, the optimizer, and the number of finished steps.
* precision: the arithmetic of a forward pass, and the loss scaler of fp16.
* optimizer_reference: the tables of the page on optimizers, generated from the code: run this
  module to write them.
* learning_rates: sets the optimizer's learning rates once per step, and keeps the state for this.
* optimizers: optimizers by name, and parameter groups by pattern: every parameter is in exactly
  one.
* moving_average: an exponential moving average of a model's weights, as a second model.
* activation_checkpointing: activation checkpointing: chosen modules recompute their activations
  in the backward pass.
* flops: floating-point operations: how many a pass takes, and how many a device can do.
* compilation: torch.compile of a model in place: the keys of its state dict do not change.
* buffers: buffers that the forward pass changes, besides BatchNorm's: codebooks, counters and
  others; and parameters that it changes itself, which several processes refuse.
"""
