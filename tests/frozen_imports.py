"""Imported last by the fork server of the tests: what is loaded by then is never looked at again.

A child that collects garbage among the imports copies their pages and takes three times as long to
start.
"""

import gc

from service.recipes import find_recipe
from service.spec.files import load_spec

load_spec(find_recipe("digits"))  # builds the validator of a spec, once for all
gc.collect()
gc.freeze()
