"""A trainer to read in one sitting.

A step is: take the batch that belongs to it, compute the loss, follow the gradient. Everything random in a step depends
on the seed and the step's number only, so a run that was saved and loaded goes on exactly as one that never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minillm.errors import CheckpointError, ConfigError
from minillm.progress import progress as bar_of
from minillm.training.schedules import Schedule

STEPS_BETWEEN_SAVES = 500
Model = TypeVar("Model", bound=nn.Module)
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter's gradients: their running mean and the running mean of their squares."""


@runtime_checkable
class Batch(Protocol[Model]):
    """What a step learns from."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted."""

    def to(self, device: torch.device) -> Batch[Model]:
        """The same on a device."""

    def loss(self, model: Model, label_smoothing: float) -> Float[Tensor, ""]:
        """Mean loss of a predicted token."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The optimiser is AdamW (Loshchilov & Hutter 2019), by default with the betas of Vaswani §5.3.

    Attributes:
        steps: in all.
        learning_rate: the highest; `schedule` says what share of it a step uses.
        weight_decay: of matrices; norms and biases are never decayed.
        clip_norm: longest gradient (Pascanu et al. 2013, §3.2).
        autocast: dtype of matrix products, None for the model's own. bfloat16 helps where the device has it.
        seed: of dropout; the batches bring their own.

    Raises:
        ConfigError: when a value is outside its range.
    """

    steps: int
    learning_rate: float
    schedule: Schedule
    label_smoothing: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-9
    clip_norm: float = 1.0
    autocast: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "clip_norm", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("label_smoothing", "weight_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must be in [0, 1), not {self.betas}")


class Trainer(Generic[Model]):
    """A model, its optimiser, and the step that they have come to.

    Args:
        batch_at: the batch of each step.
    """

    def __init__(self, model: Model, batch_at: Callable[[int], Batch[Model]], config: TrainingConfig) -> None:
        self.model = model
        self.batch_at = batch_at
        self.config = config
        self.step = 0
        self.seconds = 0.0  # spent in steps, over all runs
        self.device = next(model.parameters()).device
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    def train(
        self, until: int | None = None, *, progress: bool = True, checkpoint: str | Path | None = None
    ) -> list[float]:
        """Go on to step `until` (the last when None); return the loss of each step taken.

        The model is in training mode meanwhile, and in evaluation mode afterwards.

        Args:
            checkpoint: a file to go on from, if it is there, and to save to every 500 steps and at the end.
        """
        checkpoint = None if checkpoint is None else Path(checkpoint)
        if checkpoint is not None and checkpoint.exists():
            self.load(checkpoint)
        until = self.config.steps if until is None else min(until, self.config.steps)
        losses: list[float] = []
        self.model.train()
        try:
            with bar_of(total=self.config.steps, initial=self.step, unit="step", show=progress) as bar:
                while self.step < until:
                    start = time.perf_counter()
                    batch = self.batch_at(self.step).to(self.device)
                    losses.append(self._take_step(batch))
                    seconds = time.perf_counter() - start
                    self.seconds += seconds
                    bar.set_postfix_str(
                        f"loss {losses[-1]:.3f}, {batch.num_tokens / seconds:,.0f} tokens/s", refresh=False
                    )
                    bar.update()
                    if checkpoint is not None and (self.step % STEPS_BETWEEN_SAVES == 0 or self.step == until):
                        self.save(checkpoint)
        finally:
            self.model.eval()
        return losses

    def _take_step(self, batch: Batch[Model]) -> float:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * config.schedule(self.step)
        with _randomness_of(self.device, config.seed, self.step), _autocast(self.device, config.autocast):
            loss = batch.loss(self.model, config.label_smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    @cached_property
    def fingerprint(self) -> str:
        """What decides this run beside its weights: its options, and its first batch."""
        config = self.config
        options = [getattr(config, field.name) for field in fields(config) if field.name != "schedule"]
        rates = [config.schedule(step) for step in (0, config.steps // 2, config.steps - 1)]
        batch = {name: torch.as_tensor(value).tolist() for name, value in vars(self.batch_at(0)).items()}
        return blake2b(repr((options, rates, batch)).encode(), digest_size=16).hexdigest()

    def save(self, path: str | Path) -> None:
        """Everything that training goes on from, in one safetensors file."""
        path = Path(path)
        tensors = {f"model.{name}": parameter for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for moment in MOMENTS if parameter in self.optimizer.state else ():
                tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        metadata = {"step": str(self.step), "seconds": str(self.seconds), "run": self.fingerprint}
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, metadata)
        partial.replace(path)  # an interrupted save leaves the last one

    @torch.no_grad()
    def load(self, path: str | Path) -> None:
        """Go on from where `save` was called.

        Raises:
            CheckpointError: the file cannot be read, or is of another model, other data or other options.
        """
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read as a training checkpoint: {error}") from error
        parameters = dict(self.model.named_parameters())
        step = int(metadata["step"]) if metadata.get("step", "").isdigit() else -1
        parts = ("model", *(MOMENTS if step else ()))
        expected = {f"{part}.{name}": parameter.shape for name, parameter in parameters.items() for part in parts}
        if {name: tensor.shape for name, tensor in saved.items()} != expected or step < 0:
            raise CheckpointError(f"{path} is not a training checkpoint of this model")
        if metadata.get("run") != self.fingerprint:
            raise CheckpointError(
                f"{path} is of a run with other options or other data: give them again as they were, or delete the file"
            )
        self.step, self.seconds = step, float(metadata.get("seconds", "nan"))
        for name, parameter in parameters.items():
            parameter.copy_(saved[f"model.{name}"])
            if step:
                state: dict[str, Any] = {moment: saved[f"{moment}.{name}"] for moment in MOMENTS}
                self.optimizer.state[parameter] = state | {"step": torch.tensor(float(step), device=self.device)}


@contextmanager
def _randomness_of(device: torch.device, seed: int, step: int) -> Iterator[None]:
    """The random numbers of one step, and of nobody else: the generators are put back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 1_000_003 + step)
        yield


def _autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Matrix products in `dtype`, sums and norms in float32 (Micikevicius et al. 2018, "Mixed Precision Training")."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
