"""Trackers: TensorBoard, Weights & Biases, MLflow. Each is imported only where a run asks for it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from olaschema.errors import ConfigError
from olatrain.config import TrainConfig

PROJECT = "ola-distill"
_IDENTITY = "trackers.json"


class Tracker(Protocol):
    """Something that keeps figures by name and step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep the figures of a step."""

    def close(self) -> None:
        """Hand over what is still in memory."""


def open_trackers(config: TrainConfig, *, start: int) -> list[Tracker]:
    """Open the trackers of a run that goes on from step `start`; a rerun goes on in the same place.

    Raises ConfigError where one is not installed.
    """
    kinds: dict[str, Callable[[TrainConfig, int], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _Wandb,
        "mlflow": _Mlflow,
    }
    opened: list[Tracker] = []
    for name in config.trackers:
        try:
            opened.append(kinds[name](config, start))
        except ImportError as error:
            raise ConfigError(
                f"trackers: {name} is not installed", f"pip install {name}, or take it out of trackers."
            ) from error
    return opened


class _TensorBoard:
    def __init__(self, config: TrainConfig, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = str(config.out / "tensorboard")
        self._writer: Any = SummaryWriter(folder, purge_step=start + 1 if start else 0)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Where to and under which account is wandb's own business: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY …"""

    def __init__(self, config: TrainConfig, start: int) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=None if _set("WANDB_PROJECT") else PROJECT,
            name=config.out.resolve().name,
            id=_identity(config.out, "wandb", uuid.uuid4().hex[:8]),
            resume="allow",
            dir=str(config.out),
            config=config.model_dump(mode="json"),
        )
        # steps since the last checkpoint are done again, and wandb's own counter cannot go back
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """MLFLOW_TRACKING_URI says where to; without it a database in the run's folder."""

    def __init__(self, config: TrainConfig, start: int) -> None:
        from mlflow import MlflowClient

        out = config.out.resolve()
        uri = None if _set("MLFLOW_TRACKING_URI") else f"sqlite:///{out / 'mlflow.db'}"
        self._client: Any = MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(PROJECT)
        self._id = _identity(out, "mlflow", "")
        if not self._id:
            self._id = self._client.create_run(experiment, run_name=out.name).info.run_id
            _remember(out, "mlflow", self._id)
            for name, value in config.model_dump(mode="json", exclude={"fingerprints"}).items():
                self._client.log_param(self._id, name, json.dumps(value)[:500])
        self._client.update_run(self._id, status="RUNNING")

    def log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, 0, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _set(name: str) -> bool:
    import os

    return bool(os.environ.get(name))


def _identity(out: Path, tracker: str, fresh: str) -> str:
    """The tracker's name of this run: as remembered in the run's folder, else `fresh`, then remembered."""
    path = out / _IDENTITY
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if tracker not in known and fresh:
        _remember(out, tracker, fresh)
    return known.get(tracker, fresh)


def _remember(out: Path, tracker: str, identity: str) -> None:
    path = out / _IDENTITY
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, tracker: identity}) + "\n", encoding="utf-8")
