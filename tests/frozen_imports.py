"""Imported last by the fork server of the tests: what is loaded by then is never looked at again.

A child that collects garbage among the imports copies their pages and takes three times as long to
start.
"""

import gc

gc.collect()
gc.freeze()
