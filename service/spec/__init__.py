"""What the user wants: the spec, as a model, as a file, and as a page.  No torch.

From top to bottom; a room imports only from rooms below it:

* files: A spec as a file: read with the position of every mistake, written, described.
* models: the spec: what the user wants, as frozen and strict models. `files` reads one from a
  file.
* slurm: the section `slurm:`: what a job asks of Slurm, and how its script begins.
* optimizer: the sections `optimizer:` and `optimizers:`; one model for each optimizer of
  torch.optim.
* schedule: the section `schedule:`, one model for each shape of the learning rate.
* kubernetes: the section `kubernetes:`: where a job runs on a cluster.
* part: A section of a spec: frozen, strict, with the patterns that its fields share.
* page: the reference page of the spec, made from the schema that editors use. Pure.
* optimizer_options: the options of every optimizer of torch.optim as data, so that checking needs
  no torch.
* extending: specs that share: `extends`, files of overrides, `${env:NAME}`; which keys change no
  result.
* documents: A YAML, JSON or TOML file as plain values, with the position of each of them.
"""
