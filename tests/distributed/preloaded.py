"""Imported by the server from which ranks are forked: what takes long and changes nothing."""

import gc
import importlib
import warnings

from nano_pretrain.platform.cpu import MODULES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in MODULES:
        importlib.import_module(name)
# A collection in a rank, of which saving makes several, need not look at all that again.
gc.freeze()
