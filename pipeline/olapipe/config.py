"""Settings of `olapipe extract`."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from olapipe.teachers.base import ComputeDtype, Preset
from olaschema.config import StoreUrl
from olaschema.manifest import Precision, Scalar


class ExtractConfig(BaseModel):
    """What to extract, from what, into what, and how. Frozen; unknown settings are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: Path
    """A folder of images, or a .json or .jsonl file of LLaVA-style conversations."""
    images: Path | None = None
    """The folder that the `image` paths of conversations start from."""
    out: StoreUrl
    """The feature store, or packed set: made if missing, else continued."""
    format: Literal["zarr", "webdataset"] = "zarr"
    """A feature store, or a packed training set at once: that one gets no further images or teachers later."""
    teachers: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names, as `olapipe teachers` lists them."""
    checkpoints: dict[str, str] = Field(default_factory=dict)
    """Per teacher a local folder or a hub id; the published id where none is given."""
    options: dict[str, dict[str, Scalar]] = Field(default_factory=dict)
    """Per teacher the options that differ from the preset, e.g. `depth: {pooling: last}`."""
    preset: Preset = "default"
    precision: Precision | Literal["auto"] = "float16"
    """`auto`: for each new teacher the smallest that stays within `max_gradient_error` on a sample of the corpus."""
    max_gradient_error: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    """For `auto` and `klt`: 1 − cosine of the gradients from exact and stored targets; see `olapipe fidelity`."""
    fit_images: Annotated[int, Field(ge=8)] = 256
    """For `auto` and `klt`: at most so many images, evenly spaced in the corpus, are measured and fitted on."""
    shard_size: PositiveInt | None = None
    """Rows per shard; by default that of the store, 256 for a new one."""
    batch_size: PositiveInt = 8
    """Images of a teacher's forward pass: another number gives other bits."""
    workers: PositiveInt | None = None
    """Worker processes; by default one per GPU, else one per CPU."""
    threads: PositiveInt = 1
    """CPU threads of a worker's forward pass: another number gives other bits."""
    decoders: PositiveInt = 2
    """Threads of a worker that read, decode and preprocess images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_dtype: ComputeDtype = "float32"
    compile: bool = False
    """Run the teachers through torch.compile: faster after a slow start; gives other bits, which receipts record."""
    max_megapixels: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    """Larger images are recorded as failed."""
    address: str | None = None
    """A running Ray cluster: `auto`, `HOST:PORT` or, from outside, `ray://HOST:PORT`; by default Ray starts here."""
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of a GPU that one worker takes: 0.5 puts two workers on each."""
    max_failures: Annotated[str, Field(pattern=r"^(\d+|\d+(\.\d+)?%)$", coerce_numbers_to_str=True)] | None = None
    """A number of images, or a share of those this run has to do as `5%`: with more failures the run stops."""
    retry_failed: bool = False
    """Encode shards that hold failed images again."""

    @field_validator("corpus", "images", mode="before")
    @classmethod
    def _local(cls, value: object) -> object:
        if isinstance(value, str) and "://" in value:
            raise ValueError("buckets and other addresses are not supported yet: give a local or mounted folder")
        return value

    @field_validator("address")
    @classmethod
    def _of_a_cluster(cls, value: str | None) -> str | None:
        # Ray takes other words too: `local` starts one with its own settings, a scheme it does not know it imports
        if value is not None and not re.fullmatch(r"auto|(ray://)?(\[[0-9a-fA-F:.]+\]|[^\s:/@]+):[0-9]{1,5}", value):
            raise ValueError(
                f"{value!r} is not the address of a Ray cluster: give auto, HOST:6379 or ray://HOST:10001, with the "
                "ports that it was started with (an http address is for `ray job submit`)"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ExtractConfig:
        if len(set(self.teachers)) != len(self.teachers):
            raise ValueError(f"a teacher is named twice: {', '.join(self.teachers)}")
        if self.max_failures is not None and self.max_failures.endswith("%") and float(self.max_failures[:-1]) > 100:
            raise ValueError(f"max_failures={self.max_failures}: a share is at most 100%; leave it out for any number")
        if self.retry_failed and self.format == "webdataset":
            raise ValueError("retry_failed needs a feature store: the features of a packed set's images are packed")
        for setting, names in (("checkpoints", self.checkpoints), ("options", self.options)):
            stray = sorted(set(names) - set(self.teachers))
            if stray:
                raise ValueError(
                    f"{setting} names {', '.join(stray)}, which is not among the teachers ({', '.join(self.teachers)})"
                )
        if self.format == "webdataset" and self.precision in ("auto", "klt"):
            raise ValueError(
                f"format=webdataset has no place for the basis of precision={self.precision}: name another"
            )
        stray = sorted({"max_gradient_error", "fit_images"} & self.model_fields_set)
        if stray and self.precision not in ("auto", "klt"):
            raise ValueError(f"{' and '.join(stray)}: only --precision auto and klt are fitted, not {self.precision}")
        return self

    def most_failures(self, images: int) -> int | None:
        """Return how many images may fail of the `images` that a run has to do; None means any number."""
        if self.max_failures is None:
            return None
        if self.max_failures.endswith("%"):
            return int(Decimal(self.max_failures[:-1]) * images / 100)
        return int(self.max_failures)

    @property
    def max_pixels(self) -> int:
        """Images with more pixels are refused."""
        return int(self.max_megapixels * 1_000_000)
