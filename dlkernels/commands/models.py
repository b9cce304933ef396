"""``dlkernels models``: the networks, by family, with their sizes."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.table import Table

from .. import models, train
from ..train import networks
from . import wide_console

# For what a network has no default of.
SIZES = {
    "image_size": 32,
    "patch_size": 4,
    "num_layers": 6,
    "num_heads": 4,
    "hidden_dim": 128,
    "mlp_dim": 256,
    "tokens_mlp_dim": 64,
    "channels_mlp_dim": 256,
    "vocabulary_size": 10_000,
    "source_vocabulary_size": 10_000,
    "target_vocabulary_size": 10_000,
    "num_answers": 1_000,
}


def models_command(
    family: Annotated[str | None, typer.Argument(help="Only those of one file of dlkernels/models.")] = None,
) -> None:
    """List the networks that `train` knows: what each is, and how many parameters it has as it is built by default."""
    try:
        names = models.list_models(family)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    table = Table("network", "family", "is", "built with")
    table.add_column("parameters", justify="right")
    for name in names:
        builder = models.get_model_builder(name)
        arguments = {parameter: SIZES[parameter] for parameter in networks.required(builder)}
        with torch.device("meta"):
            network = builder(**arguments)
        count = sum(parameter.numel() for parameter in network.parameters())
        given = ", ".join(f"{parameter}={value}" for parameter, value in arguments.items())
        table.add_row(name, builder.__module__.rpartition(".")[2], train.task_for(name).title, given, f"{count:,}")
    wide_console().print(table)
