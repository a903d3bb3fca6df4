"""The systems that run jobs on a cluster: one package for each engine.

From top to bottom; a room imports only from rooms below it:

* kubernetes, slurm: the engines, each with an `engine` that keeps the contract.
* settings: the settings of a sweep, one for each run. Pure.
* contract: what every engine does: render, submit, status, logs and cancel, in the same words.
"""
