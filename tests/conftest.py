"""Settings that all tests share."""

import os

import torch
from hypothesis import settings

settings.register_profile("lagcompile", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("lagcompile")
os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)  # tests run side by side
