"""The trainer: step, loop, callbacks, signals."""
