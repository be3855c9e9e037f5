"""Students with a CLIP-ConvNeXT tower, imported or composed afresh, against a forward pass written here from timm's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from import_support import HERE, published
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from store_support import record
from torch import Tensor
from torch.nn import functional
from trainer_support import Corpus, make_corpus, make_student, metrics, settings
from transformers import AutoModelForImageTextToText, FastVlmForConditionalGeneration
from typer.testing import CliRunner

from olaschema.config import load_config
from olaschema.errors import ConfigError
from olatrain.cli import app
from olatrain.compose import compose, load_processor, student_view
from olatrain.config import TrainConfig
from olatrain.convnext import convnext_config, image_settings
from olatrain.cvbench import Question
from olatrain.evaluate import Examinee
from olatrain.importing import import_student
from olatrain.tokens import TaskTokens
from olatrain.tower import Tower
from olatrain.train import train

NAME = "laion/CLIP-convnext_xxlarge-laion2B-toy-res64"
WIDTHS, DEPTHS = (4, 8, 12, 16), (1, 2, 3, 1)


def timm_trunk() -> dict[str, Tensor]:
    """timm's tensors, so small that variances in the layer norms are of the order of their ε of 1e-5."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale + offset

    found = {"stem.0.weight": drawn(WIDTHS[0], 3, 4, 4, scale=5e-4), "stem.0.bias": drawn(WIDTHS[0], scale=2e-3)}
    found |= {"stem.1.weight": drawn(WIDTHS[0], scale=2e-3, offset=5e-3), "stem.1.bias": drawn(WIDTHS[0], scale=2e-3)}
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        here = f"stages.{stage}"
        if stage:
            before = WIDTHS[stage - 1]
            found |= {
                f"{here}.downsample.0.weight": drawn(before, offset=1),
                f"{here}.downsample.0.bias": drawn(before),
            }
            found[f"{here}.downsample.1.weight"] = drawn(width, before, 2, 2, scale=2e-3)
            found[f"{here}.downsample.1.bias"] = drawn(width, scale=2e-3)
        for number in range(depth):
            block = f"{here}.blocks.{number}"
            found |= {f"{block}.gamma": drawn(width, scale=3e-3), f"{block}.conv_dw.bias": drawn(width, scale=3e-3)}
            found[f"{block}.conv_dw.weight"] = drawn(width, 1, 7, 7, scale=0.2)
            found |= {f"{block}.norm.weight": drawn(width, offset=1), f"{block}.norm.bias": drawn(width)}
            found |= {f"{block}.mlp.fc1.weight": drawn(4 * width, width), f"{block}.mlp.fc1.bias": drawn(4 * width)}
            found |= {f"{block}.mlp.fc2.weight": drawn(width, 4 * width), f"{block}.mlp.fc2.bias": drawn(width)}
    return found | {"head.norm.weight": drawn(WIDTHS[-1]), "head.norm.bias": drawn(WIDTHS[-1])}


def timm_forward(weights: dict[str, Tensor], pixels: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """timm/models/convnext.py, `convnext_xxlarge`: stem and stages in float64, (I, C, h, w)."""
    w = {name: value.double() for name, value in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:  # over channels, which come second
        mean = x.mean(dim=1, keepdim=True)
        scaled = (x - mean) / torch.sqrt(((x - mean) ** 2).mean(dim=1, keepdim=True) + epsilon)
        return scaled * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    x = norm(functional.conv2d(pixels.double(), w["stem.0.weight"], w["stem.0.bias"], stride=4), "stem.1")
    for stage, depth in enumerate(DEPTHS):
        here = f"stages.{stage}"
        if stage:
            x = norm(x, f"{here}.downsample.0")
            x = functional.conv2d(x, w[f"{here}.downsample.1.weight"], w[f"{here}.downsample.1.bias"], stride=2)
        for block in (f"{here}.blocks.{number}" for number in range(depth)):
            weight = w[f"{block}.conv_dw.weight"]
            y = functional.conv2d(x, weight, w[f"{block}.conv_dw.bias"], padding=3, groups=len(weight))
            y = torch.einsum("nchw,dc->ndhw", norm(y, f"{block}.norm"), w[f"{block}.mlp.fc1.weight"])
            y = y + w[f"{block}.mlp.fc1.bias"][:, None, None]
            y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
            y = torch.einsum("nchw,dc->ndhw", y, w[f"{block}.mlp.fc2.weight"])
            x = x + w[f"{block}.gamma"][:, None, None] * (y + w[f"{block}.mlp.fc2.bias"][:, None, None])
    return x


def checkpoint(target: Path, *, inside: bool) -> Path:
    """The golden case with this tower; its weights in the checkpoint, or in a folder as OpenCLIP publishes it."""
    folder = published(HERE, target)
    settings = json.loads((folder / "config.json").read_text()) | {"mm_vision_tower": NAME}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = {n: t for n, t in load_file(folder / "model.safetensors").items() if "vision_tower" not in n}
    hidden = settings["hidden_size"]
    weights["model.mm_projector.0.weight"] = torch.randn(hidden, WIDTHS[-1], generator=torch.Generator().manual_seed(1))
    if inside:
        weights |= {f"model.vision_tower.vision_tower.{n}": t for n, t in timm_trunk().items()}
    else:
        open_clip(target / "tower")
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("convnext")
    made = checkpoint(root / "published", inside=True)
    result = CliRunner().invoke(app, ["import-ola", str(made), "--out", str(root / "student")])
    assert result.exit_code == 0, (result.output, result.exception)
    return root / "student"


def test_transformers_alone_computes_what_timm_does(student: Path, tmp_path: Path) -> None:
    """The map in float64 is the same to its last digits, so ε is timm's; with transformers' it would be off by far."""
    model, report = FastVlmForConditionalGeneration.from_pretrained(student, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    weights = timm_trunk()
    expected = timm_forward(weights, pixels)
    wrong = timm_forward(weights, pixels, epsilon=1e-6)
    assert ((wrong - expected).norm() / expected.norm()).item() > 1e-2
    with torch.no_grad():
        found = model.double().get_image_features(pixels.double())
        assert ((found.last_hidden_state - expected).norm() / expected.norm()).item() < 1e-6
        published_weights = load_file(student.parent / "published/model.safetensors")
        vectors = expected.flatten(2).permute(0, 2, 1)  # row by row
        hidden = vectors @ published_weights["model.mm_projector.0.weight"].double().t()
        hidden = functional.gelu(hidden + published_weights["model.mm_projector.0.bias"].double())
        hidden = hidden @ published_weights["model.mm_projector.2.weight"].double().t()
        hidden = hidden + published_weights["model.mm_projector.2.bias"].double()
        torch.testing.assert_close(found.pooler_output, hidden, rtol=1e-4, atol=1e-6)
        # the control whose targets are the tower's own
        own = Tower(model, TaskTokens.load(student), frozen_copy=False)(pixels.double())
    torch.testing.assert_close(own.double(), expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-6)
    assert own.shape == (2, 2, 2, WIDTHS[-1])


def test_openclips_own_folder_gives_the_same_student_with_its_own_mean(student: Path, tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "published", inside=False)
    with pytest.raises(ConfigError, match="neither it nor"):
        import_student(made, tmp_path / "student")
    import_student(made, tmp_path / "student", vision=made / "tower")
    assert (tmp_path / "student/model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    image = load_processor(tmp_path / "student").image_processor
    assert list(image.image_mean) == [0.1, 0.2, 0.3]
    assert list(image.image_std) == [0.5, 0.6, 0.7]
    usual = load_processor(student).image_processor  # OpenAI's, bicubic
    assert list(usual.image_mean) == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert int(usual.resample) == Image.Resampling.BICUBIC
    (made / "tower/open_clip_config.json").write_text(json.dumps({"preprocess_cfg": {"interpolation": "bilinear"}}))
    with pytest.raises(ConfigError, match="interpolation is bilinear"):
        image_settings(made / "tower")


def test_the_published_size_is_24_by_24_vectors_of_3072() -> None:
    widths, depths = (384, 768, 1536, 3072), (3, 4, 30, 3)
    with torch.device("meta"):
        weights = {"stem.0.weight": torch.empty(384, 3, 4, 4)}
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            weights |= {f"stages.{stage}.blocks.{n}.conv_dw.bias": torch.empty(width) for n in range(depth)}
    for name in ("CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup", "x/CLIP-convnext_xxlarge-soup-res768"):
        config = convnext_config(name, weights, Path("x"))
        assert (config.image_size, config.hidden_size, tuple(config.depths)) == (768, 3072, depths)
        assert config.layer_norm_eps == 1e-5
        assert config.image_size // (config.patch_size * 8) == 24
    assert convnext_config("CLIP-convnext_large_d_320-soup-res512", weights, Path("x")).layer_norm_eps == 1e-6
    for name in (
        "CLIP-convnext_base-soup",
        "CLIP-convnext_xxlarge-res768-interp576",
        "CLIP-convnext_xxlarge-multi-stage",
    ):
        with pytest.raises(ConfigError, match="no ConvNeXT that this version knows"):
            convnext_config(name, weights, Path("x"))
    with pytest.raises(ConfigError, match="no whole number"):
        convnext_config("CLIP-convnext_xxlarge-res100", weights, Path("x"))


def test_a_tower_that_is_no_such_convnext_is_refused(tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "published", inside=True)
    weights = load_file(made / "model.safetensors")
    prefix = "model.vision_tower.vision_tower.stages.0.blocks.0."
    save_file(weights | {f"{prefix}mlp.grn.weight": torch.ones(16)}, made / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no place in our student, the first is stages.0.blocks.0.mlp.grn.weight"):
        import_student(made, tmp_path / "student")
    del weights[f"{prefix}gamma"]
    save_file(weights, made / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no tensor stages.0.blocks.0.gamma"):
        import_student(made, tmp_path / "student")


def open_clip(folder: Path) -> Path:
    """The tower's folder as OpenCLIP publishes it."""
    folder.mkdir(parents=True)
    visual = {f"visual.trunk.{n}": t for n, t in timm_trunk().items()}
    torch.save(visual | {"token_embedding.weight": torch.ones(3)}, folder / "open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": preprocess}))
    return folder


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh student: a tiny language model and the tower, through the command."""
    root = tmp_path_factory.mktemp("composed")
    make_student(root / "clip")
    tower = open_clip(root / NAME.rpartition("/")[2])
    flags = ["--llm", str(root / "clip/llm"), "--vision", str(tower), "--out", str(root / "student")]
    result = CliRunner().invoke(
        app, ["compose", *flags, "--task-tokens", "2", "--teacher", "gen", "--teacher", "depth"]
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert "4 tokens per image, view squash" in result.output
    return root / "student"


def test_a_fresh_student_is_composed_of_it(composed: Path, tmp_path: Path) -> None:
    """What the tower computes is timm's, its mean is its own, and the language model stays as it was."""
    model, report = FastVlmForConditionalGeneration.from_pretrained(composed, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    expected = timm_forward(timm_trunk(), pixels)
    with torch.no_grad():
        found = model.double().get_image_features(pixels.double())
    assert ((found.last_hidden_state - expected).norm() / expected.norm()).item() < 1e-6
    assert list(load_processor(composed).image_processor.image_mean) == [0.1, 0.2, 0.3]
    llm = load_file(composed.parent / "clip/llm/model.safetensors")["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(model.model.language_model.layers[2].mlp.up_proj.weight, llm.double())


def test_a_fresh_student_trains_and_generates(composed: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", images=6, texts=1)
    train(load_config(TrainConfig, flags=settings(corpus, composed, tmp_path / "run", steps=14, lr=2e-2, batch=7)),
          Console(quiet=True))  # fmt: skip
    lines = metrics(tmp_path / "run")
    for teacher, layer in (("depth", "2"), ("gen", "1"), ("gen", "3")):
        first, last = (line["teachers"][teacher]["layers"][layer]["loss"] for line in (lines[0], lines[-1]))
        assert last < 0.95 * first, (teacher, layer)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    assert result.exit_code == 0, (result.output, result.exception)
    question = Question("x", "2D", "Count", "COCO", "how many?", ("1", "2"), "A", picture(corpus))
    (answer,) = Examinee(tmp_path / "model", torch.device("cpu")).answers([question], "generate")
    assert answer.said


def picture(corpus: Corpus) -> bytes:
    return (corpus.images / corpus.keys[0]).read_bytes()


def test_a_tower_that_cannot_be_composed_is_refused(composed: Path, tmp_path: Path) -> None:
    whole = open_clip(tmp_path / NAME.rpartition("/")[2])
    for folder, change, message in (
        ("CLIP-convnext_base-soup", {}, "no ConvNeXT that this version knows"),
        ("CLIP-convnext_xxlarge-a-res64", {"stages.0.blocks.0.gamma": None}, "has no tensor stages.0.blocks.0.gamma"),
        ("CLIP-convnext_xxlarge-b-res64", {"stages.0.blocks.0.mlp.grn.weight": torch.ones(4)}, "has no place in the"),
        (
            "CLIP-convnext_xxlarge-c-res64",
            {"stages.1.blocks.0.gamma": torch.ones(3)},
            "cannot be loaded: size mismatch",
        ),
        ("CLIP-convnext_xxlarge-d-res100", {}, "no whole number"),
    ):
        other = tmp_path / folder
        other.mkdir()
        weights = torch.load(whole / "open_clip_pytorch_model.bin")
        weights |= {f"visual.trunk.{name}": value for name, value in change.items()}
        torch.save({n: t for n, t in weights.items() if t is not None}, other / "open_clip_pytorch_model.bin")
        with pytest.raises(ConfigError, match=message):
            compose(composed.parent / "clip/llm", other, tmp_path / "out", seed=0)


def test_it_trains_and_is_exported_and_generates(student: Path, tmp_path: Path) -> None:
    teachers = {
        "depth": record("float16", teacher="depth", grid=(4, 4), channels=24, view="crop"),
        "seg": record("float16", teacher="seg", grid=(4, 4), channels=40, view="crop"),
        "gen": record("float32", teacher="gen", grid=None, channels=16, view="crop"),
    }
    corpus = make_corpus(tmp_path / "corpus", images=3, texts=1, teachers=teachers)
    flags: dict[str, Any] = {"--student": student, "--config": student / "published.json", "--store": corpus.store}
    flags |= {"--images": corpus.images, "--conversations": corpus.conversations, "--out": tmp_path / "run"}
    flags |= {"--steps": 2, "--batch": 4, "--workers": 0}
    arguments = [text for flag, value in flags.items() for text in (flag, str(value))]
    result = CliRunner().invoke(app, ["run", *arguments, "--set", "device=cpu", "--set", "trackers=[]"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")])
    assert result.exit_code == 0, (result.output, result.exception)
    model, before = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (tmp_path / "model", student))
    assert type(model) is FastVlmForConditionalGeneration
    assert not torch.equal(
        model.model.multi_modal_projector.linear_1.weight, before.model.multi_modal_projector.linear_1.weight
    )
    theirs = before.model.vision_tower.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.model.vision_tower.state_dict().items())
    processor, tokens = load_processor(tmp_path / "model"), TaskTokens.load(tmp_path / "model")
    assert student_view(processor).kind == "crop"
    picture = Image.open(corpus.images / corpus.keys[0])
    text = processor.apply_chat_template([{"role": "user", "content": "<image>\nso?"}], add_generation_prompt=True)
    batch = processor(images=picture, text=text, return_tensors="pt")
    ids = batch["input_ids"][0].tolist()
    start = ids.index(tokens.image_id)
    assert ids[start : start + 4 + len(tokens.flat)] == [tokens.image_id] * 4 + list(tokens.flat)
    out = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0, len(ids) :]
    assert len(out) == 3
    assert not set(out.tolist()) & set(tokens.never_predicted)
