"""Trains an LSTM language model on several processes with DistributedDataParallel, and goes on after a crash.

    python examples/ddp_train.py                                  one process
    torchrun --nproc-per-node 2 examples/ddp_train.py             two
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 2 --max-restarts 3 \\
        examples/ddp_train.py --checkpoint run.pt                 two, started again when one dies

The losses are those of one process on the whole batch. docs/ddp.md says how to run it on many machines.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import rnnkern.torch


class LanguageModel(nn.Module):
    """Embedding, LSTM, and the scores of the next symbol."""

    def __init__(self, symbols: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, size)
        self.layers = nn.LSTM(size, size, num_layers=2)
        self.head = nn.Linear(size, symbols)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(text))[0])


def batch_of(step: int, options: argparse.Namespace) -> Tensor:
    """(T + 1, B), the same in every process and every run: sequences that count upwards by 1, 2 or 3."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(options.symbols, (1, options.batch), generator=generator)
    stride = torch.randint(1, 4, (1, options.batch), generator=generator)
    return (start + stride * torch.arange(options.length + 1)[:, None]) % options.symbols


def save(path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """All or nothing: a crash on the way leaves the checkpoint before."""
    partial = path.with_suffix(".partial")
    torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, partial)
    partial.replace(path)


def train(options: argparse.Namespace, rank: int, world: int) -> None:
    torch.manual_seed(0)  # the same weights everywhere
    model = LanguageModel(options.symbols, options.size).to(getattr(torch, options.dtype))
    report = rnnkern.torch.replace(model)
    if rank == 0:
        print(report)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = 0
    if options.checkpoint and options.checkpoint.exists():
        state = torch.load(options.checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    print(f"rank {rank} of {world}, process {os.getpid()}, from step {first}", flush=True)
    parallel = DistributedDataParallel(model) if world > 1 else model
    seconds = []
    for step in range(first, options.steps):
        start = time.perf_counter()
        text = batch_of(step, options)[:, rank::world]  # every process has its own rows, all have as many
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(parallel(text[:-1]).flatten(0, 1), text[1:].flatten())
        loss.backward()  # gradients are averaged over the processes while it runs
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        mean = loss.detach()
        if world > 1:
            dist.all_reduce(mean)
            mean /= world
        if rank == 0:
            print(f"step {step} loss {mean:.12f}", flush=True)
            if options.checkpoint and (step + 1) % options.save_every == 0:
                save(options.checkpoint, step + 1, model, optimizer)
    if rank == 0 and seconds:
        size = sum(one.numel() * one.element_size() for one in model.parameters())
        print(f"median step {statistics.median(seconds) * 1e3:.1f} ms, {size / 1e6:.2f} MB of gradients a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--batch", type=int, default=32, help="rows of all processes together, a multiple of their number"
    )
    parser.add_argument("--length", type=int, default=64, help="steps of a row")
    parser.add_argument("--symbols", type=int, default=50)
    parser.add_argument("--size", type=int, default=64, help="hidden units")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--checkpoint", type=Path, help="where to save, and to go on from where it exists")
    parser.add_argument("--save-every", type=int, default=25, metavar="STEPS")
    options = parser.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if options.batch % world:
        parser.error(f"--batch: expected a multiple of the {world} processes, got {options.batch}")
    if world > 1:
        dist.init_process_group("gloo")
    try:
        train(options, rank, world)
        if world > 1:
            dist.barrier()  # nobody leaves while another still sends
    finally:
        if world > 1:
            gc.collect()  # what DistributedDataParallel holds of the group must not outlive it
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
