"""``dlkernels models``: the networks, by family, with their sizes."""

from __future__ import annotations

import inspect
from typing import Annotated

import torch
import typer
from rich.table import Table

from .. import models, train
from . import wide_console

# For networks that are built for a vocabulary, and have none of their own.
STAND_INS = {
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
    table = Table()
    table.add_column("network")
    table.add_column("family")
    table.add_column("is", no_wrap=True)
    table.add_column("parameters", justify="right")
    for name in names:
        family_of_it = models.get_model_builder(name).__module__.rpartition(".")[2]
        table.add_row(name, family_of_it, train.task_for(name).title, f"{count_parameters(name):,}")
    console = wide_console()
    console.print(table)
    console.print("where one is needed, the vocabulary has 10,000 symbols; there are 1,000 answers", highlight=False)


def count_parameters(name: str) -> int:
    """Of the network called ``name`` as it is built by default, without any memory for them."""
    builder = models.get_model_builder(name)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [
        parameter.name
        for parameter in inspect.signature(builder).parameters.values()
        if parameter.default is inspect.Parameter.empty and parameter.kind in named
    ]
    with torch.device("meta"):
        network = builder(**{parameter: STAND_INS[parameter] for parameter in needed})
    return sum(parameter.numel() for parameter in network.parameters())
