"""The trainer: batches, losses, optimisers, and the state from which all of it goes on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data import DataSet
from ..data.sets import Columns
from ..models import load_weights
from . import distributed, generators
from .optimizers import Schedule, make_optimizer, optimizer_tensors, restore_optimizer
from .settings import Progress, Settings, TrainingError
from .state import State, check_like, check_memory, expected_memory
from .tasks import Player, Task

Tensors = dict[str, Tensor]


class Objective(torch.nn.Module):
    """A player's loss as a module whose forward is the loss: that is what DistributedDataParallel has to see."""

    def __init__(self, model: torch.nn.Module, player: Player) -> None:
        super().__init__()
        self.model = model
        self.player = player

    def forward(self, *batch: Tensor) -> Tensor:
        return self.player.loss(*batch)


class Turn:
    """One player in training: its loss, its weights and their optimiser."""

    def __init__(self, model: torch.nn.Module, player: Player, settings: Settings) -> None:
        self.name = player.name
        self.parameters = [p for p in player.weights.parameters() if p.requires_grad]
        own = {id(p) for p in self.parameters}
        self._others = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        self.optimizer = make_optimizer(self.parameters, settings)
        with self.alone():
            self.objective = distributed.parallel(Objective(model, player))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Only this player's weights have gradients."""
        for parameter in self._others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._others:
                parameter.requires_grad_(True)


class Trainer:
    """Trains a network. :meth:`run` takes the steps, :meth:`finish` gives the figures of the test part.

    A step does this, in this order:

    1. The batch's examples are the next ones of the epoch's order, which the seed and the epoch's number decide. Every
       rank takes an equal slice of them, in ``accumulate`` equal parts.
    2. For each player (one, but for a GAN): its learning rate is set and its gradients are cleared. Part by part the
       loss is computed, under autocast with ``amp``, and differentiated, weighted by the part's share of the batch's
       targets; while the last part is differentiated the ranks' gradients are summed. The gradient is then that of the
       mean over the whole batch. It is shortened to ``clip_norm``, and the optimiser takes its step.
    3. The moving average takes the new weights on.
    4. After an epoch's last batch the average, or the weights themselves, is measured on the validation part. The
       schedule and early stopping see the loss.

    Between two items of :meth:`run` :meth:`state` holds everything that decides how it goes on. The generators of
    Python, numpy and torch are part of it: a new trainer seeds them, and :meth:`load` sets them.

    Args:
        model: the network; trained in place.
        task: what it is trained for.
        data: what it is trained on.
        settings: how.
        device: where to compute.

    Raises:
        TrainingError: the settings do not fit the data, the task or the number of ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        task: Task,
        data: DataSet,
        settings: Settings,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.task = task
        self.data = data
        self.settings = settings
        self._check()
        self.steps_per_epoch = len(data.train[0]) // settings.batch_size
        self.steps = settings.epochs * self.steps_per_epoch
        self.turns = [Turn(model, player, settings) for player in task.players(model, data, settings)]
        self.average: AveragedModel | None = None
        if settings.ema is not None:
            update = get_ema_multi_avg_fn(settings.ema)
            self.average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        self.schedule = Schedule(settings.schedule, self.steps, settings.warmup)
        self.step = 0
        self.seconds = 0.0
        self.best_loss = math.inf
        self.best_step = 0  # of the best weights, 0 before there are any
        self.best_weights: Tensors | None = None  # kept where they are to be restored
        self._orders: dict[int, Tensor] = {}  # of the epoch that is under way
        self.stop_requested = False  # set from outside, in any rank
        self.stopping = False  # what all ranks have agreed on at the end of a step
        generators.seed_all(settings.seed, distributed.rank())

    def _check(self) -> None:
        settings, examples = self.settings, len(self.data.train[0])
        if settings.batch_size > examples:
            raise TrainingError(f"the batch size, {settings.batch_size}, is larger than the training set, {examples}")
        parts = settings.accumulate * distributed.size()
        if settings.batch_size % parts != 0:
            shape = f"{distributed.size()} processes times {settings.accumulate} accumulated parts"
            raise TrainingError(f"the batch size, {settings.batch_size}, is not a multiple of {parts}: {shape}")
        normed = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        together = {"batch norm": normed, "mixup": settings.mixup is not None, "cutmix": settings.cutmix is not None}
        for name, asked in together.items():
            if asked and settings.batch_size == parts:
                raise TrainingError(f"{name} needs two examples at once, but a batch of {parts} has {parts} parts")
        if settings.patience is not None and not self.task.has_validation_loss:
            raise TrainingError(f"{self.task.title} has no validation loss to stop early by; leave patience out")
        for name in ("label_smoothing", "mixup", "cutmix", "cutout"):
            if getattr(settings, name) and not self.task.has_classes:
                value = getattr(settings, name)
                raise TrainingError(f"{name}={value} is for classifiers, this is {self.task.title}; leave {name} out")

    @property
    def finished(self) -> bool:
        """Whether there is no step left, or early stopping has seen enough."""
        patience = self.settings.patience
        waited = (self.step - self.best_step) // self.steps_per_epoch
        return self.step >= self.steps or (patience is not None and waited >= patience)

    @property
    def evaluated(self) -> torch.nn.Module:
        """The network whose weights are measured and kept: the moving average where there is one."""
        return self.model if self.average is None else self.average.module

    def run(self) -> Iterator[Progress]:
        """Takes the steps that are left, one for each item.

        Raises:
            TrainingError: a loss is no longer finite.
        """
        self.model.train()
        while not self.finished:
            learning_rate = self.settings.peak_rate * self.schedule.factor(self.step)
            losses = self.take_step(learning_rate)
            yield Progress(
                step=self.step,
                steps=self.steps,
                epoch=(self.step - 1) // self.steps_per_epoch + 1,
                epochs=self.settings.epochs,
                losses=losses,
                learning_rate=learning_rate,
                seconds=self.seconds,
                examples=self.step * self.settings.batch_size,
                validation=self._validate() if self.step % self.steps_per_epoch == 0 else {},
            )

    def take_step(self, learning_rate: float) -> dict[str, float]:
        """One step (the first three points above); returns the losses.

        Raises:
            TrainingError: one is no longer finite.
        """
        start = time.perf_counter()
        epoch, position = divmod(self.step, self.steps_per_epoch)
        size = self.settings.batch_size
        losses = self._move_weights(self._order(epoch)[position * size : (position + 1) * size], learning_rate)
        self.step += 1
        self.seconds += time.perf_counter() - start
        for name, loss in losses.items():
            if not math.isfinite(loss):
                whose = "loss" if name == "loss" else f"{name}'s loss"
                raise TrainingError(f"the {whose} became {loss} at step {self.step}; try a smaller learning rate")
        return losses

    def finish(self) -> dict[str, float]:
        """Leaves the weights that count in the network; returns their figures on the test part.

        These are the best ones of early stopping, the moving average, or the last ones.
        """
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        elif self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        self.average = None
        return self.evaluate(self.data.test)

    @torch.no_grad()
    def evaluate(self, part: Columns) -> dict[str, float]:
        """Figures of the evaluated weights over a part of the data, the same in all ranks.

        Random numbers that the network draws are the same every time, and none of the training's are used up.
        """
        model = self.evaluated
        distributed.share_buffers(model)
        model.eval()
        rows = torch.arange(len(part[0])).split(self.settings.batch_size)
        totals = {"": 0.0}  # the weight of all, beside the figures times their weights
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._autocast():
            torch.manual_seed(self.settings.seed)
            for chosen in rows[distributed.rank() :: distributed.size()]:
                weight = self.task.count(part, chosen)
                totals[""] += weight
                for name, value in self.task.figures(model, *self._batch(part, chosen)).items():
                    totals[name] = totals.get(name, 0.0) + weight * value.item()
        model.train()
        return self.task.summary(_means([json.loads(text) for text in distributed.gather(json.dumps(totals))]))

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """What decides how the run goes on: tensors, and facts that JSON can hold. All ranks must call it together."""
        tensors = _prefixed("model", self.model.state_dict())
        if self.average is not None:
            tensors |= _prefixed("average", self.average.state_dict())
        for turn in self.turns:
            tensors |= _prefixed(f"optimizer.{turn.name}", optimizer_tensors(turn.optimizer))
        facts = {
            "step": self.step,
            "seconds": self.seconds,
            "schedule": self.schedule.state(),
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "generators": distributed.gather(generators.states()),
            "data": self._checksum,
        }
        return tensors, facts

    def load(self, tensors: Tensors, facts: dict[str, Any], best: Tensors | None = None) -> None:
        """Takes on a state of :meth:`state`, and the best weights until then.

        Raises:
            TrainingError: it is that of a run on other data or on another number of ranks.
            ValueError: it is none that this trainer can have; the message names the entry.
        """
        state = State.from_json(facts)
        if state.data != self._checksum:
            raise TrainingError("the training examples are not those that the checkpoint was made with")
        if len(state.generators) != distributed.size():
            counts = f"{len(state.generators)} processes, there are {distributed.size()}"
            raise TrainingError(f"the checkpoint was made by {counts}")
        if state.step > self.steps:
            raise ValueError(f"state: step must be at most {self.steps}, got {state.step}")
        self._load_tensors(tensors, state.step)
        self.step, self.seconds = state.step, state.seconds
        self.schedule.load(state.schedule)
        self.best_loss, self.best_step = state.best_loss, state.best_step
        self.best_weights = best if self.settings.patience is not None else None
        generators.restore(state.generators[distributed.rank()])

    def _load_tensors(self, tensors: Tensors, step: int) -> None:
        """Takes on the weights and what the optimisers remember after ``step`` steps."""
        parts = {f"optimizer.{turn.name}": turn.optimizer for turn in self.turns}
        known = ("model", *(["average"] if self.average is not None else []), *parts)
        for name in tensors:
            if not name.startswith(tuple(f"{part}." for part in known)):
                raise ValueError(f"{name!r} is nothing that this run has")
        weights = _without_prefix("model", tensors)
        load_weights(self.model, weights)
        check_like(weights, self.model.state_dict(), "model")
        if self.average is not None:
            average = _without_prefix("average", tensors)
            check_like(average, self.average.state_dict(), "average")
            self.average.load_state_dict(average)
        for part, optimizer in parts.items():
            memory = _without_prefix(part, tensors)
            check_memory(memory, expected_memory(optimizer) if step else {}, part, step)
            restore_optimizer(optimizer, memory)

    @cached_property
    def _checksum(self) -> int:
        return self.data.checksum()

    def _order(self, epoch: int) -> Tensor:
        """The examples of an epoch. What does not fill a last batch is left for another epoch's order."""
        if epoch not in self._orders:
            generator = np.random.default_rng((self.settings.seed, epoch))
            self._orders = {epoch: torch.from_numpy(generator.permutation(len(self.data.train[0])))}
        return self._orders[epoch]

    def _batch(self, part: Columns, rows: Tensor) -> Columns:
        return tuple(column.to(self.device) for column in self.task.inputs(self.data.batch(part, rows)))

    def _parts(self, rows: Tensor) -> list[tuple[Columns, float]]:
        """This rank's parts of a batch, each with its share of the batch's targets."""
        train, count = self.data.train, self.task.count
        own = rows.view(distributed.size(), self.settings.accumulate, -1)[distributed.rank()]
        if len(own) * distributed.size() == 1:
            return [(self._batch(train, rows), 1.0)]
        whole = count(train, rows)
        return [(self._batch(train, part), count(train, part) / whole) for part in own]

    def _move_weights(self, rows: Tensor, learning_rate: float) -> dict[str, float]:
        parts = self._parts(rows)
        losses = []
        for turn in self.turns:
            for group in turn.optimizer.param_groups:
                group["lr"] = learning_rate
            losses.append(self._gradients(turn, parts))
            if self.settings.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(turn.parameters, self.settings.clip_norm)
            turn.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        *losses, stopping = distributed.totals([*losses, float(self.stop_requested)], self.device)
        self.stopping = stopping > 0
        return {turn.name: loss for turn, loss in zip(self.turns, losses, strict=True)}

    def _gradients(self, turn: Turn, parts: list[tuple[Columns, float]]) -> float:
        """Puts the gradients of the whole batch's loss in place; returns this rank's part of the loss."""
        turn.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        with turn.alone():
            for number, (batch, share) in enumerate(parts, 1):
                # The ranks' gradients are averaged once, in the last backward; the loss is scaled so that it is a sum.
                with nullcontext() if number == len(parts) else distributed.not_yet(turn.objective):
                    with self._autocast():
                        loss = turn.objective(*batch)
                    scale = share * distributed.size()
                    (loss if scale == 1 else scale * loss).backward()
                total += share * loss.item()
        return total

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.settings.amp else nullcontext()

    def _validate(self) -> dict[str, float]:
        figures = self.evaluate(self.data.validation)
        loss = figures.get("loss")
        if loss is not None:
            self.schedule.observe(loss)
        if loss is None or loss < self.best_loss:
            self.best_loss = math.inf if loss is None else loss
            self.best_step = self.step
            if self.settings.patience is not None:
                self.best_weights = {name: tensor.clone() for name, tensor in self.evaluated.state_dict().items()}
        return figures


def _means(totals: list[dict[str, float]]) -> dict[str, float]:
    """Figures from the ranks' sums of weights (at ``""``) and of figures times their weights."""
    sums: dict[str, float] = {}
    for own in totals:
        for name, value in own.items():
            sums[name] = sums.get(name, 0.0) + value
    weight = sums.pop("")
    return {name: value / weight for name, value in sums.items()}


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _without_prefix(prefix: str, tensors: Tensors) -> Tensors:
    return {name[len(prefix) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}
