"""Settings that all tests share."""

import os
import signal

import torch
from hypothesis import settings

settings.register_profile("lagcompile", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("lagcompile")
os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)  # tests run side by side
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and their children too
