"""Settings of a training run: frozen, unknown keys refused, contradictions found before any work starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from olaschema.cache import CacheSettings
from olaschema.config import StoreUrl
from olaschema.errors import ConfigError
from olaschema.images import DEFAULT_MAX_PIXELS
from olaschema.manifest import Fingerprint, Frozen
from olatrain.losses import Regression
from olatrain.presets import Preset, with_preset
from olatrain.tokens import Context

Tracker = Literal["tensorboard", "wandb", "mlflow"]
Group = Literal["projector", "predictors", "task_tokens", "llm", "vision", "feed"]
_TRAINED: tuple[Group, ...] = ("projector", "predictors", "task_tokens")

_CACHE_LIMIT = 64 << 30

PUBLISHED_LAYERS: dict[str, tuple[int, ...]] = {"depth": (18, 20), "seg": (10, 18), "gen": (12, 20)}
"""Decoder blocks supervised in OLA-VLM (arXiv 2412.09585), counted from 1."""


class TeacherTraining(Frozen):
    """How one teacher's features supervise the student."""

    layers: tuple[int, ...] = Field(min_length=1)
    """Decoder blocks, counted from 1; the last one is taken after the final norm."""
    weight: float = Field(default=0.5, ge=0.0)
    """Weight of each layer's embedding loss beside the next-token loss; 0 keeps the task tokens without a loss."""
    layer_weights: dict[int, float] = Field(default_factory=dict)
    """Factors on `weight` by layer; 1 for those not named, 0 for a layer that is only measured."""
    regression: Regression = "smooth_l1"
    """Distance of prediction and target beside the contrastive term."""
    contrastive: float | None = Field(default=None, ge=0.0)
    """This teacher's weight of the contrastive term, where it is not the run's."""

    @field_validator("layers")
    @classmethod
    def _layers(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if min(layers) < 1 or len(set(layers)) != len(layers):
            raise ValueError("layers are counted from 1, each named once")
        return layers

    @model_validator(mode="after")
    def _weights(self) -> TeacherTraining:
        unknown = sorted(self.layer_weights.keys() - set(self.layers))
        if unknown:
            raise ValueError(f"layer_weights name layers {unknown}, which are not supervised")
        if any(weight < 0 for weight in self.layer_weights.values()):
            raise ValueError("layer_weights are 0 or more")
        return self

    @property
    def trains(self) -> bool:
        """Whether any of its losses has a weight."""
        return self.weight > 0 and any(self.layer_weights.get(layer, 1.0) > 0 for layer in self.layers)


class Lora(Frozen):
    """Low-rank adapters in the language model's linear layers, trained in place of its weights (through peft)."""

    rank: int = Field(default=16, gt=0)
    """Of the adapters' two matrices."""
    alpha: int = Field(default=32, gt=0)
    """The adapters' product is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of linear layers inside a decoder block, such as `q_proj`; none named: all of them."""


class Evaluation(Frozen):
    """Samples held out of the training, whose embedding losses are measured now and then."""

    conversations: Path | None = None
    """About images of the run's `images`, or of its packed set."""
    store: StoreUrl | None = None
    """Or a packed training set of the samples held out."""
    every: int = Field(default=500, gt=0)
    """Steps between evaluations; there is one before the first step and one after the last."""

    @model_validator(mode="after")
    def _one(self) -> Evaluation:
        if (self.conversations is None) == (self.store is None):
            raise ValueError("evaluation takes conversations, or a packed set as store: one of the two")
        return self


class PredictionSamples(Frozen):
    """Predictions that a run keeps, to be drawn beside the targets (`olapipe preview --predictions`)."""

    every: int = Field(default=1000, ge=0)
    """Steps between them; 0: never."""
    images: int = Field(default=4, gt=0)
    """How many, held-out ones where there are any; whole samples, so perhaps a few more."""


class SourceSettings(Frozen):
    """One source of a mixture; its settings are those of the run of the same names."""

    store: StoreUrl | None = None
    """Feature store, or packed training set."""
    conversations: Path | None = None
    """Beside a feature store, or without any; not beside a packed set."""
    images: Path | None = None
    """Beside conversations."""
    repeats: int = Field(default=1, gt=0)
    """How often its samples are seen in an epoch."""

    @model_validator(mode="after")
    def _whole(self) -> SourceSettings:
        if (self.conversations is None) != (self.images is None):
            raise ValueError("conversations and images of a source go together: one of them is missing")
        if self.conversations is None and self.store is None:
            raise ValueError("a source has conversations and images, or a packed training set as store")
        return self


ProbeStart = Literal["mean", "random"]


class Probe(Frozen):
    """Probing a frozen student instead of training it (`olatrain probe`)."""

    held_out: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the images on which the probes are scored; which ones depends on their keys and the seed."""
    start: ProbeStart = "mean"
    """What a probe predicts before it has learnt: its teacher's mean map, or, as published, what random weights give.
    """


class TrainConfig(Frozen):
    """Everything that defines a run. Paths are as given; a relative one is relative to the working directory."""

    preset: Preset | None = None
    """Settings of a published stage, under the ones that are given."""
    student: Path
    """Folder that `olatrain compose`, `prepare`, `import-ola` or `export` wrote; a stage starts from the export of the
    last."""
    store: StoreUrl | None = None
    """Feature store that `olapipe extract` wrote, or packed training set of `olapipe pack`: a folder, or an address
    such as `s3://bucket/prefix`; none where no teacher is named."""
    conversations: Path | None = None
    """LLaVA-style JSON, JSONL or parquet; not beside a packed set, which holds its own, and so does it the images."""
    images: Path | None = None
    """Folder that the images of the conversations are relative to."""
    sources: tuple[SourceSettings, ...] = ()
    """In place of `store`, `conversations` and `images`: several of them, mixed."""
    out: Path
    """Folder of the run: checkpoints, metrics.jsonl, and what else it writes."""
    teachers: dict[str, TeacherTraining] = Field(default_factory=dict)
    """Teachers whose features are losses; none in a stage of next tokens alone, whose predictors are left out."""
    feed: tuple[str, ...] = ()
    """Teachers whose features are inputs at the places of their task tokens (`olatrain.feed`): the multi-encoder
    baseline, which needs features where it is used, too."""
    fingerprints: dict[str, Fingerprint] = Field(default_factory=dict)
    """What the features must mean. Filled in from the store at the first start and saved with the run."""

    init: Literal["student", "fresh"] = "student"
    """Where latents, predictors and logit scales start: from the student's `ola.safetensors` as far as it has them
    (an imported or exported student), or from random values."""
    epochs: int | None = Field(default=None, gt=0)
    """How often each sample is seen; or `steps`."""
    steps: int | None = Field(default=None, gt=0)
    """Either epochs (default: 1) or steps."""
    stop_after: int | None = Field(default=None, gt=0)
    """Save and stop at this step; the learning rate still follows the whole run, and a rerun goes on."""
    batch: int = Field(default=256, gt=0)
    """Samples of a step over all ranks."""
    micro_batch: int | None = Field(default=None, gt=0)
    """Samples of one forward pass on a rank; None: all of the rank's. Changes memory, not results."""
    lr: float = Field(default=1e-3, gt=0.0)
    """Peak learning rate."""
    warmup: float = Field(default=0.03, ge=0.0, lt=1.0)
    """Share of the steps in which the learning rate rises linearly; a cosine to 0 follows."""
    lrs: dict[Group, float] = Field(default_factory=dict)
    """Peak learning rate of a group of parameters, where it is not `lr`."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """That of AdamW."""
    weight_decays: dict[Group, float] = Field(default_factory=dict)
    """Weight decay of a group of parameters, where it is not `weight_decay`."""
    clip: float = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: autocast; weights and losses stay float32."""
    gradient_checkpointing: bool = False
    """Recompute each decoder block in the backward pass instead of keeping what it computed."""
    text: float = Field(default=1.0, ge=0.0)
    """Weight of the next-token loss."""
    contrastive: float = Field(default=0.3, ge=0.0)
    """Weight of the contrastive term relative to the regression."""
    negatives: Literal["world", "node", "rank"] = "world"
    """Whose targets the contrastive term sees; but for `world` the result depends on the number of ranks."""
    embedding_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the weights of the embedding losses fall over the run, from the given ones to `embedding_end` of them."""
    embedding_end: float = Field(default=0.0, ge=0.0)
    """Share of the embedding losses' weights at the end of a schedule that is not constant."""
    normalise: Literal["none", "channel"] = "none"
    """`channel`: targets minus the store's mean of each channel, over its deviation; saved with the predictors."""
    train: tuple[Group, ...] = Field(default=_TRAINED, min_length=1)
    """What is trained. With `lora`, `llm` stands for its adapters. Where teachers are fed, `feed` is part of the
    default and of the presets'."""
    lora: Lora | None = None
    context: Context = "all"
    """What the predictors may read: the image, the prompt before it as well, or all (the published setting)."""
    compat: Literal["none", "ola"] = "none"
    """`ola` lets padding into the predictors, as the public OLA-VLM code does."""
    target_control: Literal["none", "shuffle", "mean", "self"] = "none"
    """Control arms of an experiment, while training: every image gets another image's features (`shuffle`), or the
    mean of the training images' (`mean`), from which nothing about an image can be learned; or what the student's own
    initial vision tower gives for it (`self`, in evaluations too; `olatrain.tower`), which it sees already."""
    order: Literal["mixed", "grouped"] = "mixed"
    """`grouped`: a batch is of text alone or of images alone, but for those at an epoch's ends and at most one more."""
    allow_view_mismatch: bool = False
    """Train where teachers saw another part of the images than the student does, as the published recipe needs."""
    cache_dir: Path | None = None
    """Folder on a local disk that files of a store in a bucket are kept in, by all ranks and workers together."""
    cache_limit: ByteSize | None = None
    """Most bytes in it, such as `200GiB` (by default 64 GiB); it should hold the files of `window` shards."""

    max_length: int = Field(default=4096, gt=0)
    """Tokens of a sample: the text of longer ones is cut."""
    max_pixels: int = Field(default=DEFAULT_MAX_PIXELS, gt=0)
    """Samples with larger images are skipped."""
    window: int = Field(default=8, gt=0)
    """Shards among which rows are shuffled."""
    seed: int = Field(default=0, ge=0)
    """Of first weights and of the order of samples."""

    evaluation: Evaluation | None = None
    probe: Probe | None = None
    predictions: PredictionSamples = PredictionSamples()
    mean_map_rows: int = Field(default=2048, gt=0)
    """Training images that the mean target map is computed from; evenly spaced where there are more."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    nproc: int = Field(default=1, gt=0)
    """Ranks to start on this machine."""
    workers: int = Field(default=2, ge=0)
    """Loader processes of each rank."""
    keep_samples: ByteSize | None = None
    """Memory, such as `4GiB`, in which each loader process (with `workers` 0 each rank) keeps samples as they go into
    batches, for epochs after the first: no file is opened again for these, nor checked. Changes no result."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints. One of 1 GiB or more is written while the training goes on, until the next is due."""
    keep_last: int = Field(default=2, gt=0)
    """Checkpoints that stay."""
    log_every: int = Field(default=10, gt=0)
    """Steps between printed lines; metrics.jsonl gets every step."""
    look_every: int = Field(default=50, ge=0)
    """Steps between closer looks (retrieval, effective rank, gradients at the projector), which cost a backward pass of
    the text loss; the first step has one. 0: never."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Where figures go besides metrics.jsonl; wandb and mlflow must be installed."""

    @model_validator(mode="before")
    @classmethod
    def _published(cls, data: Any) -> Any:
        """Fill in the preset, and the published layers for a teacher that is named without any."""
        if isinstance(data, dict):
            chosen = "train" in data
            data = with_preset(data)
            if isinstance(data.get("feed"), str):
                data = {**data, "feed": [name.strip() for name in data["feed"].split(",")]}
            if data.get("feed") and not chosen:
                data = {**data, "train": [*data.get("train", _TRAINED), "feed"]}
        if not isinstance(data, dict) or not isinstance(data.get("teachers"), dict):
            return data
        teachers = {}
        for name, teacher in data["teachers"].items():
            given = teacher if teacher is not None else {}
            if isinstance(given, dict) and "layers" not in given and name in PUBLISHED_LAYERS:
                given = {"layers": PUBLISHED_LAYERS[name], **given}
            if isinstance(given, dict) and "layers" not in given:
                raise ValueError(
                    f"teachers.{name}.layers is missing: only {', '.join(PUBLISHED_LAYERS)} have published ones; name "
                    f"decoder blocks, counted from 1 (--set 'teachers.{name}.layers=[18,20]'); `olatrain probe` "
                    "suggests some"
                )
            teachers[name] = given
        return {**data, "teachers": teachers}

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        if self.batch < self.nproc:
            raise ValueError(f"a batch of {self.batch} cannot be split over {self.nproc} ranks")
        if self.stop_after is not None and self.steps is not None and self.stop_after > self.steps:
            raise ValueError(f"stop_after = {self.stop_after} lies beyond the {self.steps} steps of the run")
        if self.stop_after is not None and self.probe is not None:
            raise ValueError("stop_after would end a probe before it is scored: set steps")
        unknown = sorted(self.fingerprints.keys() - set(self.reads))
        if unknown:
            raise ValueError(f"fingerprints name {', '.join(unknown)}, which teachers and feed do not")
        self._consistent_stage()
        self._consistent_losses()
        self._consistent_probe()
        if self.compat == "ola" and self.context != "all":
            raise ValueError("compat = ola is about context = all: only there the public code lets padding in")
        if not any(teacher.trains for teacher in self.teachers.values()) and self.train == ("predictors",):
            raise ValueError("only the predictors train, and every teacher's weight is 0: nothing would change")
        return self

    def _consistent_stage(self) -> None:
        """Refuse what contradicts itself about losses and groups of parameters."""
        if self.sources:
            self._consistent_sources()
        elif self.reads and self.store is None:
            raise ValueError("teachers are named, but the setting store is missing")
        self._consistent_feed()
        if (self.conversations is None) != (self.images is None):
            raise ValueError("conversations and images go together: one of them is missing")
        if self.conversations is None and self.store is None and not self.sources:
            raise ValueError("conversations and images are missing, or a packed training set as store")
        if self.store is not None and self.conversations is not None and not self.reads:
            raise ValueError(
                "a store is given, but teachers names none to learn from, such as --set 'teachers.depth.layers=[18,20]'"
            )
        if not self.text and not any(teacher.trains for teacher in self.teachers.values()):
            raise ValueError("text is 0 and no teacher has a weight: there is no loss")
        if self.cache_limit is not None and self.cache_dir is None:
            raise ValueError("cache_limit is given, but not cache_dir")
        stores = [self.store, *(source.store for source in self.sources)]
        stores += [self.evaluation.store if self.evaluation is not None else None]
        if self.cache_dir is not None and not any(store is not None and "://" in store for store in stores):
            raise ValueError("cache_dir keeps files of stores in buckets, and there is none: leave it out")
        if len(set(self.train)) != len(self.train):
            raise ValueError("train names a group twice")
        for name, named in (("lrs", self.lrs), ("weight_decays", self.weight_decays)):
            unknown = sorted(named.keys() - set(self.train))
            if unknown:
                raise ValueError(f"{name} names {', '.join(unknown)}, which train does not")
            if any(value < 0 for value in named.values()):
                raise ValueError(f"{name} are 0 or more")
        if self.lora is not None and "llm" not in self.train:
            raise ValueError("lora is given, but train does not name llm")
        if self.target_control != "none" and not self.teachers:
            raise ValueError("target_control changes targets, and no teacher is named")
        if self.target_control == "self" and (self.normalise != "none" or self.probe is not None):
            raise ValueError("target_control = self: a store's statistics and probes are not of a tower's features")

    def _consistent_losses(self) -> None:
        """Refuse embedding losses that could be nothing but 0, and weights that nothing follows."""
        if self.embedding_end and self.embedding_schedule == "constant":
            raise ValueError("embedding_end is given, but embedding_schedule is constant")
        for name, teacher in self.teachers.items():
            if not teacher.trains or teacher.regression != "none":
                continue
            if not (self.contrastive if teacher.contrastive is None else teacher.contrastive):
                raise ValueError(f"{name} has no regression and contrastive is 0: that is no loss, weight 0 says so")
            if self.batch == 1 or (self.negatives == "rank" and self.batch <= self.nproc):
                raise ValueError(
                    f"{name} has no regression, and a batch of one image has no negatives: that is no loss"
                )

    def _consistent_probe(self) -> None:
        if self.probe is None:
            return
        if self.normalise != "none":
            raise ValueError("probes are scored on the features as they are: leave normalise at none")
        if self.train != ("predictors",) or self.evaluation is not None:
            raise ValueError("a probe trains the predictors alone and chooses its own held-out images")
        if self.text:
            raise ValueError("the student of a probe is frozen: leave text at 0")
        if self.compat != "none":
            raise ValueError("compat = ola is about predictors that train a student: leave it out of a probe")

    def _consistent_feed(self) -> None:
        if len(set(self.feed)) != len(self.feed):
            raise ValueError("feed names a teacher twice")
        both = sorted(set(self.feed) & set(self.teachers))
        if both and self.probe is None:
            raise ValueError(f"{', '.join(both)} is fed and predicted: the answer would stand in the question")
        if "feed" in self.train and not self.feed:
            raise ValueError("train names feed, but no teacher is fed")

    def _consistent_sources(self) -> None:
        if self.store is not None or self.conversations is not None or self.images is not None:
            raise ValueError("sources stand in place of store, conversations and images: give one or the other")
        if self.reads and any(source.store is None for source in self.sources):
            raise ValueError("teachers are named, but a source has no store")
        if not self.reads and any(source.store and source.conversations for source in self.sources):
            raise ValueError("a source has a feature store, but teachers names none to learn from")
        if self.evaluation is not None and self.evaluation.store is None:
            raise ValueError("evaluation beside sources takes a packed set as evaluation.store")

    @property
    def reads(self) -> tuple[str, ...]:
        """Teachers whose features are read: those that are losses, then those that are only inputs."""
        return (*self.teachers, *(name for name in self.feed if name not in self.teachers))

    @property
    def cache(self) -> CacheSettings | None:
        """The cache of remote files, where there is one."""
        if self.cache_dir is None:
            return None
        return CacheSettings(folder=self.cache_dir, limit=self.cache_limit or _CACHE_LIMIT)

    def require_inputs(self) -> None:
        """Raise ConfigError naming the first input that is not there, before anything is loaded."""
        folders = {"student": self.student}
        if self.images is not None:
            folders["images"] = self.images
        # what an address holds is seen when it is opened
        if self.store is not None and "://" not in self.store:
            folders["store"] = Path(self.store)
        files = {"conversations": self.conversations} if self.conversations is not None else {}
        for number, source in enumerate(self.sources):
            if source.store is not None and "://" not in source.store:
                folders[f"sources[{number}].store"] = Path(source.store)
            if source.images is not None:
                folders[f"sources[{number}].images"] = source.images
            if source.conversations is not None:
                files[f"sources[{number}].conversations"] = source.conversations
        if self.evaluation is not None and self.evaluation.conversations is not None:
            files["evaluation.conversations"] = self.evaluation.conversations
        for name, path in folders.items():
            if not path.is_dir():
                raise ConfigError(f"{name} = {path}: no such folder", f"Give an existing folder as {name}.")
        for name, path in files.items():
            if not path.is_file():
                raise ConfigError(f"{name} = {path}: no such file", f"Give an existing file as {name}.")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"out = {self.out} is a file", "Give a folder, new or of the run to continue.")


# What may differ between a run and its continuation: where things are, how fast they are read, what is reported.
_FREE = frozenset(
    ("preset", "student", "store", "images", "conversations", "sources", "out", "device", "nproc", "workers",
     "keep_samples", "micro_batch", "cache_dir", "cache_limit",
     "gradient_checkpointing", "stop_after", "checkpoint_every", "keep_last", "log_every", "look_every", "trackers",
     "evaluation", "predictions",
     "mean_map_rows", "fingerprints")
)  # fmt: skip


def changed_settings(before: TrainConfig, now: TrainConfig) -> list[str]:
    """Describe each setting whose change would make the continuation another run, `name: old → new`."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    # what the mean map is made of is only reported, unless it is what is learned
    free = _FREE - {"mean_map_rows"} if now.target_control == "mean" else _FREE
    return [f"{name}: {old[name]!r} → {new[name]!r}" for name in old if name not in free and old[name] != new[name]]
