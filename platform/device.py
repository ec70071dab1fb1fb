"""Where this process computes: on the GPU that it was given, else on the CPU."""

import torch


def own_device() -> torch.device:
    """Ray shows an actor only the GPU of which it has a fraction, and none to the others."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
