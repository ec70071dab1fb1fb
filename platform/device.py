"""Where an actor or a replica computes: on a GPU that was asked for, else on the CPU."""

import torch


def choose_device(asked: bool) -> torch.device:
    """The GPU where a share of one was asked for and there is one, else the CPU.

    What there is does not decide it alone: Ray 2.60 shows an actor without a share all GPUs of its
    node, and whoever computed there unasked would be counted by nobody and have other bits than
    the same run elsewhere. GPUs that Ray only pretends to have (`--num-gpus`) are the CPU.

    Args:
        asked: whether the config gives this actor a GPU or a part of one.
    """
    return torch.device("cuda" if asked and torch.cuda.is_available() else "cpu")
