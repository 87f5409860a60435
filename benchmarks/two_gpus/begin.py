"""How a measurement on several processes begins: its arguments, its device and its group."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import distributed as dist


def begin(about: str | None) -> tuple[argparse.Namespace, torch.device]:
    """The command line (a folder; --quick for a try on the CPU) and this process's device, in a group of all: NCCL, or gloo without a GPU."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--quick", type=int, default=0)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return arguments, device
