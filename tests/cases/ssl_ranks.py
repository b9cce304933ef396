"""Losses that several processes compute together, for ``test_ssl_distributed.py``: what each rank found goes to a file.

Every network is without batch norm, and views are no random ones: two processes compute what one does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dlkernels import nn, ssl
from dlkernels.ssl import distributed

from .self_supervision import linear_encoder

ROWS, STEPS = 6, 3  # of the whole batch, which the processes share


def augment() -> Callable[[Tensor], Tensor]:
    """Views that differ in turns."""
    calls = [0]

    def view(images: Tensor) -> Tensor:
        calls[0] += 1
        return images.roll(calls[0], 3) + 0.1 * images.square()

    return view


CASES: dict[str, Callable[[], torch.nn.Module]] = {
    "simclr": lambda: ssl.SimCLR(linear_encoder(6), 6, augment(), 5, 0.3),
    "moco": lambda: ssl.moco_v2(linear_encoder(6), 6, augment(), 5, 10, 0.9),
    "dino": lambda: ssl.DINO(
        linear_encoder(6), ssl.DINOHead(6, 9, 8, 5), augment(), augment(), 1, 10, 0.9, center_momentum=0.5
    ),
    "cpc": lambda: ssl.CPC(nn.Linear(4, 6), 6, 5, steps=2),
    "clip": lambda: ssl.CLIP(linear_encoder(6), 6, nn.Linear(4, 5), 5, 7),
}


def batches(case: str) -> list[tuple[Tensor, ...]]:
    """What the model takes at each step, whole."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(ROWS, *shape, dtype=torch.float64, generator=generator)

    shapes: tuple[tuple[int, ...], ...] = {"cpc": ((5, 4),), "clip": ((1, 3, 4), (4,))}.get(case, ((1, 3, 4),))
    return [tuple(random(*shape) for shape in shapes) for _ in range(STEPS)]


class Loss(torch.nn.Module):
    """A module whose forward is the loss, as DistributedDataParallel wants it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *batch: Tensor) -> Tensor:
        return self.model.loss(*batch)


def found(case: str) -> dict[str, Tensor]:
    """Losses, gradients of the first step, and the state after a few steps, on this process's share of each batch."""
    torch.manual_seed(0)
    model = CASES[case]().double()
    loss: torch.nn.Module = Loss(model)
    if distributed.size() > 1:
        loss = DistributedDataParallel(loss)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    results = {}
    for step, batch in enumerate(batches(case)):
        value = loss(*(x.chunk(distributed.size())[distributed.rank()] for x in batch))
        optimizer.zero_grad()
        value.backward()
        if step == 0:
            results |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        results[f"loss {step}"] = distributed.mean(value.detach())
        optimizer.step()
        if hasattr(model, "update"):
            model.update()
    return results | model.state_dict()


def shuffled() -> dict[str, Tensor]:
    """Rows before, as a function saw them, and after it doubled them."""
    rows = torch.arange(8.0).chunk(2)[distributed.rank()]
    seen: list[Tensor] = []

    def double(x: Tensor) -> Tensor:
        seen.append(x)
        return 2 * x

    torch.manual_seed(distributed.rank())  # so that the processes must agree on the order
    doubled = distributed.shuffled(double, rows)
    return {"rows": rows, "seen": seen[0], "doubled": doubled}


def error_of_unequal_shares() -> str:
    """What is said where rank 1 has one row more."""
    try:
        distributed.gathered(torch.ones(3 + distributed.rank(), 2))
    except ValueError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {case: found(case) for case in CASES} | {"shuffled": shuffled()}
    (folder / f"{distributed.rank()}.txt").write_text(error_of_unequal_shares())
    torch.save(results, folder / f"{distributed.rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
