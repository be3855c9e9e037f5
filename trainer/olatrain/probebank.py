"""Probes: resamplers with queries of their own on every layer of a frozen student, trained jointly.

As published with OLA-VLM (arXiv 2412.09585), but held to what the image's own states say unless told otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from olaschema.errors import ConfigError, CorpusError
from olaschema.manifest import Fingerprint
from olatrain.config import TrainConfig
from olatrain.join import Listing
from olatrain.learner import Learner, load_model, loss_config
from olatrain.predictors import Predictions, PredictorBank, PredictorConfig, few_channels, for_few_channels
from olatrain.sidecar import Sidecar
from olatrain.student import Student
from olatrain.tokens import Items, TaskTokens

_FEWEST_IMAGES = 3
"""One held out, two to train on."""


class ProbeBank(PredictorBank):
    """Predictors that own their queries and never see a task token, so that any two students are asked the same.

    After `start_from` a probe predicts its teacher's mean map and learns what to add: its score is what is read from
    the student, however short it is trained. A published probe has to learn the map from random weights first.
    `context` `image`: the image's states alone; `prompt`: the text before it as well; `all`: all text, as published.
    """

    def __init__(self, config: TrainConfig, fingerprints: Mapping[str, Fingerprint], hidden_size: int) -> None:
        probes = {
            name: _probe(name, fingerprints[name].shape, teacher.layers, hidden_size)
            for name, teacher in config.teachers.items()
        }
        nobody = TaskTokens(
            teachers=tuple(probes), tokens_per_teacher=0, ids=dict.fromkeys(probes, ()), image_id=0, never_predicted=()
        )
        super().__init__(probes, nobody, hidden_size=hidden_size, seed=config.seed, context=config.context)
        for name, probe in probes.items():
            self.register_buffer(_mean(name), torch.zeros(probe.shape))

    @torch.no_grad()
    def start_from(self, means: Mapping[str, Tensor]) -> None:
        """Let every probe predict its teacher's mean map (`config.shape`, float32) and nothing else."""
        for name, probe in self.configs.items():
            self.get_buffer(_mean(name)).copy_(means[name])
            for layer in probe.layers:
                resampler = self.head(name, layer).projector
                for last in (resampler.norm_out if probe.norm else resampler.proj_out).parameters():
                    nn.init.zeros_(last)

    def forward(self, taps: Mapping[int, Tensor], items: Items, latents: Mapping[str, Tensor]) -> Predictions:
        """Predict as `PredictorBank`; the student's task tokens and latents are left out."""
        bare = items.task.new_zeros(len(items), len(self.configs), 0)
        added = super().forward(taps, replace(items, task=bare), {})
        return {(name, layer): self.get_buffer(_mean(name)) + found for (name, layer), found in added.items()}


def _probe(teacher: str, shape: tuple[int, ...], layers: tuple[int, ...], hidden_size: int) -> PredictorConfig:
    if few_channels(teacher, shape):
        return for_few_channels(shape, layers, hidden_size=hidden_size)
    return PredictorConfig(shape=shape, layers=layers, width=shape[-1])


def _mean(teacher: str) -> str:
    return f"mean_{teacher}"


def build_probe(
    config: TrainConfig, fingerprints: Mapping[str, Fingerprint], tokens: TaskTokens, device: torch.device
) -> Learner:
    """Load the student as it is, frozen, with its task tokens from their embedding rows, and fresh probes beside it.

    A student that is fed features goes on being fed: raises ConfigError where `config.feed` leaves a teacher out, or
    names one that the student does not know.
    """
    model = load_model(config)
    embeddings = model.get_input_embeddings().weight
    bank = ProbeBank(config, fingerprints, int(embeddings.shape[1]))
    learned = [teacher for teacher in tokens.teachers if teacher not in config.feed]
    counts = {teacher: tokens.count(teacher) for teacher in learned} if tokens.flat else {}
    feeds = {name: fingerprints[name].shape for name in config.feed}
    student = Student(model, tokens, latents=counts, taps=bank.taps, seed=0, feeds=feeds)
    sidecar = Sidecar.load(config.student)
    unknown = sorted(set(config.feed) - set(sidecar.record.feeds if sidecar is not None else ()))
    if unknown:
        raise ConfigError(
            f"the student was never fed features of {', '.join(unknown)}", "Probe it as it is: leave feed out."
        )
    if sidecar is not None:
        sidecar.require_feeds({name: fingerprints[name] for name in config.feed})
        sidecar.fill_feeds(student.feeds)
    with torch.no_grad():
        for teacher, latents in student.latents.items():
            latents.copy_(embeddings[list(tokens.ids[teacher])])
    student.requires_grad_(False)
    return Learner(student, bank, loss_config(config)).to(device).eval()


def split_by_image(
    listing: Listing, *, held_out: float, seed: int, same: Mapping[int, int] | None = None
) -> tuple[Listing, Listing]:
    """Split into training and held-out samples: one of each image, and each image in one part only.

    `same` has by row the first one of the same bytes (`controls.same_images`): several keys may be of one image. Which
    images are held out depends on their keys and `seed` alone. Raises CorpusError for fewer than three images: the mean
    map of a single one to train on is that one's feature, and there would be nothing to learn.
    """
    first: dict[str, int] = {}
    seen: set[int] = set()
    for place, keys in enumerate(listing.conversations.keys):
        # a sample of several images could tie one that is held out to one that is not
        if len(keys) == 1 and (row := int(listing.rows[place])) >= 0:
            image = row if same is None else same[row]
            if image not in seen:
                seen.add(image)
                first[keys[0]] = place
    if len(first) < _FEWEST_IMAGES:
        raise CorpusError(
            f"{listing.conversations.path}: {len(first)} of its images are in the store, "
            f"a probe needs {_FEWEST_IMAGES}",
            "Give conversations about the images that features were extracted from.",
        )
    ranked = sorted(first, key=lambda key: hashlib.sha256(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest())
    count = min(max(1, round(held_out * len(first))), len(first) - (_FEWEST_IMAGES - 1))
    chosen = set(ranked[:count])
    places = {held: [place for key, place in first.items() if (key in chosen) is held] for held in (False, True)}
    return listing.select(np.asarray(places[False])), listing.select(np.asarray(places[True]))
