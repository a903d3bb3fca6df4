"""What `evenstep new` writes: a commented task and spec to begin with."""
