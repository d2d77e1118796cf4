# SPDX-License-Identifier: Apache-2.0
"""Two processes on one GPU, each with an NCCL group, taking turns with most of its memory. Needs torch."""

from __future__ import annotations

import os
from typing import Any

import torch

from gpu_check.stage import GIB, Figures, need_cuda

SHARE = 0.7


def worker(port: int, pipe: Any) -> None:
    """Takes memory, multiplies, reduces and gives back whenever it is asked to; answers with free GiB after each."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl")
    torch.distributed.all_reduce(torch.ones(1, device="cuda"))
    pipe.send(torch.cuda.mem_get_info()[0] / GIB)
    while pipe.recv():
        taken = torch.ones(int(SHARE * torch.cuda.mem_get_info()[1] / 2), dtype=torch.bfloat16, device="cuda")
        torch.distributed.all_reduce(taken[:1024])
        during = torch.cuda.mem_get_info()[0] / GIB
        del taken
        torch.cuda.empty_cache()
        pipe.send((during, torch.cuda.mem_get_info()[0] / GIB))
    torch.distributed.destroy_process_group()


def run(device: str, figures: Figures) -> None:
    """The stage."""
    need_cuda(device)
    torch.zeros(1, device="cuda")
    from embedrl_verl.platforms.ports import free_port

    context = torch.multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for number in range(2):
        mine, other = context.Pipe()
        process = context.Process(target=worker, args=(free_port(), other))
        process.start()
        other.close()  # so that reading ends when the process does
        pipes.append(mine)
        processes.append(process)
        figures.values[f"free after the start of {number + 1}, GiB"] = mine.recv()
    idle = figures.values["free after the start of 2, GiB"]
    for turn in range(4):
        pipe = pipes[turn % 2]
        pipe.send(True)
        during, after = pipe.recv()
        figures.keep(f"turn {turn}: taken, GiB", idle - during, at_least=SHARE * torch.cuda.mem_get_info()[1] / GIB - 1)
        figures.keep(f"turn {turn}: not given back, GiB", idle - after, at_most=0.5)
    total = torch.cuda.mem_get_info()[1] / GIB
    # The plan counts 1.5 GiB a process (plan_memory.CONTEXT), of two here and this one.
    figures.keep("contexts of three processes, two with NCCL, GiB", total - idle, at_most=3 * 1.5)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        process.join(30)
