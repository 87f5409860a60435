"""How a script of several processes ends."""

import os
import sys

from torch import distributed as dist


def leave() -> None:
    """End this process, once all have come here, without taking the process group apart.

    In torch 2.13 a gloo thread waits for the GIL to free its last tensors; whoever frees the group meanwhile holds the GIL and
    waits for the thread. On a busy machine both wait for ever, however long one sleeps before.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
