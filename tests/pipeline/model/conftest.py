"""Tiny models: a second thread costs more than it brings, and far more on a busy machine."""

import torch

torch.set_num_threads(1)
