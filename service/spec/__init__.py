"""The user's settings: the spec, as a model, as a file, and as a page.  No torch.

From top to bottom; a room imports only from rooms below it:

* files: A spec as a file: read with the position of every error, written, described.
* models: the spec: the user's settings, as frozen and strict models. `files` reads one from a
  file.
* slurm: the section `slurm:`: the resources of a Slurm job, and the start of its script.
* optimizer: the sections `optimizer:` and `optimizers:`; one model for each optimizer of
  torch.optim.
* schedule: the section `schedule:`, one model for each shape of the learning rate.
* kubernetes: the section `kubernetes:`: where a job runs on a cluster.
* part: A section of a spec: frozen, strict, with the patterns that fields share.
* page: the reference page of the spec, generated from the JSON Schema for editors. Pure.
* optimizer_options: the options of every optimizer of torch.optim as data, so that checking needs
  no torch.
* extending: specs that share values: `extends`, override files, `${env:NAME}`; keys free to
  change.
* documents: A YAML, JSON or TOML file as plain values, with the position of each of them.
"""
