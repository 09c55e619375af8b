"""Functions that ranks run."""

from __future__ import annotations

import os
import time


def rank() -> int:
    """This rank."""
    return int(os.environ["RANK"])


def sum_of_ranks(factor: int) -> float:
    """An all-reduce."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor(float(factor * rank()))
    dist.all_reduce(value)
    dist.destroy_process_group()
    return float(value)


def fails_on(bad: int) -> None:
    """One rank raises, the others wait for it in a collective."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if rank() == bad:
        print("last words")
        raise ValueError(f"the trouble of rank {bad}")
    dist.all_reduce(torch.ones(1))


def dies(bad: int) -> None:
    """One rank ends without a word, the others sleep."""
    if rank() == bad:
        os._exit(7)
    time.sleep(60)


def never_ends() -> None:
    """A rank that waits."""
    time.sleep(60)
