"""Composing a student: what is in the folder, what its prompts look like, which view its processor shows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from olaschema.errors import ConfigError, ViewError
from olaschema.manifest import View
from olatrain.compose import compose, load_processor, student_view
from olatrain.student import Student
from olatrain.tokens import TaskTokens, locate

LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|head|>' + m['role'] + '\\n\\n' + m['content'] | trim + '<|eot|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|head|>assistant\\n\\n' }}{%- endif %}"
)
BLOCK = "<image>" + "".join(f"<ola_{t}_{n}>" for t in ("gen", "depth") for n in range(2))


def make_llm(
    folder: Path, *, tied: bool = False, phi3: bool = False, template: str | None = None, pad: bool = False
) -> Path:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    model = Phi3ForCausalLM(Phi3Config(**sizes)) if phi3 else LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(folder)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>", *(["<unused>"] if pad else [])]
    core.train_from_iterator(
        ["what is in this picture"] * 3,
        trainers.BpeTrainer(vocab_size=290, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=specials[0], eos_token=specials[1])
    if pad:
        tokenizer.pad_token = specials[2]
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def make_vision(folder: Path) -> Path:
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    make_llm(root / "llm")
    make_vision(root / "vision")
    return root


@pytest.fixture(scope="module")
def student(parts: Path) -> Path:
    compose(parts / "llm", parts / "vision", parts / "student", teachers=("gen", "depth"), tokens_per_teacher=2, seed=4)
    return parts / "student"


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def test_transformers_alone_loads_it_and_generates_without_task_tokens(student: Path) -> None:
    model, report = LlavaForConditionalGeneration.from_pretrained(student, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = load_processor(student)
    assert isinstance(processor.image_processor, CLIPImageProcessorPil)
    text = processor.apply_chat_template([{"role": "user", "content": "<image> what?"}], add_generation_prompt=True)
    batch = processor(images=picture(), text=text, return_tensors="pt")
    with torch.no_grad():  # make the hidden tokens the likeliest by far: they must still not come out
        model.lm_head.weight[list(TaskTokens.load(student).never_predicted)] *= 100
        model.lm_head.weight[list(TaskTokens.load(student).never_predicted[::2])] *= -1
    out = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert len(out) == 8
    assert not set(out.tolist()) & set(TaskTokens.load(student).never_predicted)


def test_weights_come_from_both_models_and_new_rows_are_the_mean(parts: Path, student: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(student)
    llm = LlamaForCausalLM.from_pretrained(parts / "llm")
    tower = CLIPVisionModel.from_pretrained(parts / "vision")
    tokens = TaskTokens.load(student)
    made = model.state_dict()
    for name, value in llm.model.state_dict().items():
        if name != "embed_tokens.weight":
            assert torch.equal(made[f"model.language_model.{name}"], value), name
    for name, value in tower.state_dict().items():
        assert torch.equal(made[f"model.vision_tower.{name}"], value), name
    new = list(tokens.never_predicted)
    old = [i for i in range(300) if i not in new]
    for ours, theirs in ((model.get_input_embeddings(), llm.model.embed_tokens), (model.lm_head, llm.lm_head)):
        assert torch.equal(ours.weight[old], theirs.weight[old])
        torch.testing.assert_close(ours.weight[new], theirs.weight.mean(dim=0).expand(len(new), -1))
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-2, "default")
    assert model.model.multi_modal_projector.linear_1.weight.std() > 0


def test_text_is_answered_as_the_language_model_answers_it(parts: Path, student: Path) -> None:
    ids = torch.tensor([[5, 9, 77, 100]])
    model = LlavaForConditionalGeneration.from_pretrained(student)
    llm = LlamaForCausalLM.from_pretrained(parts / "llm")
    kept = [i for i in range(300) if i not in TaskTokens.load(student).never_predicted]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., kept], llm(ids).logits[..., kept])


@pytest.mark.parametrize("phi3", [False, True])
def test_tied_embeddings_stay_tied(parts: Path, tmp_path: Path, phi3: bool) -> None:
    compose(
        make_llm(tmp_path / "llm", tied=True, phi3=phi3),
        parts / "vision",
        tmp_path / "out",
        tokens_per_teacher=8,
        seed=0,
    )
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    tokens = TaskTokens.load(tmp_path / "out")
    assert model.lm_head.weight.shape[0] == max(tokens.never_predicted) + 1
    llm = (Phi3ForCausalLM if phi3 else LlamaForCausalLM).from_pretrained(tmp_path / "llm")
    torch.testing.assert_close(
        model.lm_head.weight[: min(tokens.never_predicted)], llm.lm_head.weight[: min(tokens.never_predicted)]
    )
    made = Student(model, tokens, latents=dict.fromkeys(tokens.teachers, 8), taps=(1,), seed=0)
    batch = {"input_ids": torch.tensor([[3, *tokens.flat, 4]])}
    with torch.no_grad():
        expected = made(batch).logits[..., : min(tokens.never_predicted)]
        made.store_task_embeddings()
        fresh = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(
            fresh(**batch).logits[..., : min(tokens.never_predicted)], expected, rtol=1e-4, atol=1e-4
        )


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_equal_seeds_give_equal_bytes_and_no_path_is_kept(parts: Path, student: Path, tmp_path: Path) -> None:
    for name, seed in (("again", 4), ("other", 5)):
        compose(
            parts / "llm", parts / "vision", tmp_path / name, teachers=("gen", "depth"), tokens_per_teacher=2, seed=seed
        )
    assert digests(student) == digests(tmp_path / "again")
    other = digests(tmp_path / "other")
    assert {n for n, d in digests(student).items() if d != other[n]} == {"model.safetensors"}
    for path in student.iterdir():
        assert str(parts).encode() not in path.read_bytes(), path.name
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_chat_template_that_cannot_be_parsed_is_refused(tmp_path: Path) -> None:
    llm = make_llm(tmp_path / "llm", template="{% for message in %}")
    vision = make_vision(tmp_path / "vision")
    with pytest.raises(ConfigError, match="the chat template cannot be parsed") as caught:
        compose(llm, vision, tmp_path / "out", seed=0)
    assert "remove it" in caught.value.remedy
    assert not (tmp_path / "out").exists()


# --- prompts ---

USER = "USER: "


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<image>\nwhat is this?", f"{BLOCK}\nwhat is this?"),
        ("what is this?\n<image>", f"{BLOCK}\nwhat is this?"),
        ("what is <image>this?", f"{BLOCK}\nwhat is this?"),
        ("<image>\n<image>\nwhich?", f"{BLOCK}\n{BLOCK}\nwhich?"),
        ("is <image> left of <image>?", f"is {BLOCK} left of {BLOCK}?"),
        ("no picture", "no picture"),
        ([{"type": "text", "text": "what?"}, {"type": "image"}], f"{BLOCK}\nwhat?"),
        ([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which?"}], f"{BLOCK}\n{BLOCK}\nwhich?"),
        ([{"type": "text", "text": "no picture"}], "no picture"),
    ],
)
def test_one_image_comes_first_several_stay_in_place_and_task_tokens_follow_each(
    student: Path, content: object, expected: str
) -> None:
    processor = load_processor(student)
    chat = [{"role": "user", "content": content}]
    for renderer in (processor, processor.tokenizer, AutoTokenizer.from_pretrained(student)):
        text = renderer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert text == f"<s>USER: {expected} ASSISTANT:"


def test_the_record_and_the_tokenizer_agree(student: Path) -> None:
    tokens = TaskTokens.load(student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    assert tokens.teachers == ("gen", "depth")
    assert tokens.chat_template == "plain"
    names = [f"<ola_{t}_{n}>" for t in ("gen", "depth") for n in range(2)]
    assert tokenizer.convert_tokens_to_ids(names) == list(tokens.flat)
    assert tokenizer.convert_tokens_to_ids("<image>") == tokens.image_id
    assert set(tokens.never_predicted) == {*tokens.flat, tokens.image_id, tokenizer.pad_token_id}
    assert tokenizer.decode([*tokens.flat, tokens.image_id], skip_special_tokens=True) == ""
    assert tokens.image_length == 4


def test_the_processor_gives_sequences_whose_positions_are_found(student: Path) -> None:
    tokens, processor = TaskTokens.load(student), load_processor(student)
    text = processor.apply_chat_template([{"role": "user", "content": "<image>\n<image>\nwhich?"}])
    batch = processor(images=[picture(), picture()], text=text, return_tensors="pt")
    items = locate(tokens, batch["input_ids"], batch["attention_mask"], images=[2])
    assert items.image.sum(dim=1).tolist() == [4, 4]
    first = batch["input_ids"][0].tolist().index(tokens.image_id)
    assert items.task[0].flatten().tolist() == [first + 4, first + 5, first + 6, first + 7]


def test_an_own_template_is_kept_and_fed_rewritten_turns(parts: Path, tmp_path: Path) -> None:
    llm = make_llm(tmp_path / "llm", template=LLAMA3, pad=True)
    tokens = compose(llm, parts / "vision", tmp_path / "out", teachers=("gen", "depth"), tokens_per_teacher=2, seed=0)
    assert tokens.chat_template == "adapted"
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]},
        {"role": "assistant", "content": "an <image> tag"},
        {"role": "user", "content": "and <image> this?"},
    ]
    rewritten = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": f"{BLOCK}\nwhat?"},
        {"role": "assistant", "content": "an <image> tag"},
        {"role": "user", "content": f"{BLOCK}\nand  this?"},
    ]
    own = AutoTokenizer.from_pretrained(llm)
    expected = own.apply_chat_template(rewritten, add_generation_prompt=True, tokenize=False)
    processor = load_processor(tmp_path / "out")
    assert processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == expected
    # the padding token it had is still its own, and may be predicted as before
    assert processor.tokenizer.pad_token == own.pad_token == own.convert_ids_to_tokens(2)
    assert processor.tokenizer.pad_token_id not in tokens.never_predicted


def test_the_plain_template_marks_the_answers(student: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student)
    chat = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "this"}]
    out = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    answer = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(answer).strip() == "this</s>"


# --- views ---


@pytest.mark.parametrize(
    ("view", "expected"),
    [("squash", View(kind="squash")), ("crop", View(kind="crop")), ("pad", View(kind="pad"))],
)
def test_the_saved_processor_shows_the_view_it_is_said_to(
    parts: Path, tmp_path: Path, view: str, expected: View
) -> None:
    compose(parts / "llm", parts / "vision", tmp_path / "out", view=view, seed=0)  # type: ignore[arg-type]
    processor = load_processor(tmp_path / "out")
    assert student_view(processor) == expected
    # three equal vertical bands, red, green, blue, three times as wide as high
    bands = np.repeat(np.eye(3, dtype=np.uint8)[None] * 255, 28, axis=0).repeat(28, axis=1)
    pixels = processor.image_processor(Image.fromarray(bands), return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 28, 28)
    brightest = pixels.argmax(dim=0)
    middle = brightest[14].tolist()
    if view == "crop":
        assert set(middle) == {1}
    else:
        assert [middle[4], middle[14], middle[24]] == [0, 1, 2]
    flat = pixels[:, 2, 4]
    assert (flat.abs().max() < 0.05) == (view == "pad")  # the bar above the bands has the mean colour: 0


def test_views_of_other_processors() -> None:
    square = {"height": 24, "width": 24}
    crop = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
    assert student_view(crop) == View(kind="crop", fraction=0.75)
    assert student_view(LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 24}, crop_size=square)) == View(
        kind="pad"
    )
    strange = [
        CLIPImageProcessorPil(size={"shortest_edge": 24}, do_center_crop=False),
        CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=square),
        CLIPImageProcessorPil(size={"height": 30, "width": 24}, do_center_crop=False),
        CLIPImageProcessorPil(do_resize=False, crop_size=square),
        CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size=square),
        LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 32}, crop_size=square),
        SiglipImageProcessorPil(),
    ]
    for processor in strange:
        with pytest.raises(ViewError, match=type(processor).__name__):
            student_view(processor)


# --- refusals ---


def test_bad_folders_are_refused_before_anything_is_written(parts: Path, tmp_path: Path) -> None:
    llm, vision, out = parts / "llm", parts / "vision", tmp_path / "out"
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20)
    ).save_pretrained(tmp_path / "bert")
    bare = tmp_path / "bare"
    LlamaForCausalLM.from_pretrained(llm).save_pretrained(bare)
    broken = tmp_path / "broken"
    make_llm(broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    partial = make_llm(tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    odd = make_llm(tmp_path / "odd")
    config = (odd / "config.json").read_text()
    (odd / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": "a"'))
    garbled = tmp_path / "garbled"
    garbled.mkdir()
    (garbled / "config.json").write_text("{")
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    cases = [
        (tmp_path / "nowhere", vision, out, "no model folder"),
        (llm, tmp_path / "nowhere", out, "no model folder"),
        (tmp_path / "bert", vision, out, "model of type bert"),
        (llm, tmp_path / "bert", out, "model of type bert"),
        (vision, vision, out, "model of type clip_vision_model"),
        (bare, vision, out, "no tokenizer"),
        (broken, vision, out, "cannot be loaded"),
        (partial, vision, out, "1 weights are missing, the first is model.layers.1.mlp.up_proj.weight"),
        (odd, vision, out, "cannot be loaded: Validation error for field 'hidden_size'"),
        (garbled, vision, out, "cannot be loaded"),
        (llm, vision, full, "exists and is not empty"),
        (llm, vision, full / "x", "cannot be used"),
    ]
    for llm_folder, vision_folder, target, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            compose(llm_folder, vision_folder, target, seed=0)
        assert caught.value.remedy
    assert not out.exists()


def test_bad_requests_are_refused(parts: Path, student: Path, tmp_path: Path) -> None:
    llm, vision, out = parts / "llm", parts / "vision", tmp_path / "out"
    for teachers in ((), ("gen", "gen"), ("a>b",)):
        with pytest.raises(ConfigError, match="names must be different"):
            compose(llm, vision, out, teachers=teachers, seed=0)
    with pytest.raises(ConfigError, match="view 'tilt' is unknown"):
        compose(llm, vision, out, view="tilt", seed=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="-1 task tokens"):
        compose(llm, vision, out, tokens_per_teacher=-1, seed=0)
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "twice")
    LlamaForCausalLM.from_pretrained(llm).save_pretrained(tmp_path / "twice")
    with pytest.raises(ConfigError, match="already has <ola_gen_0>"):
        compose(tmp_path / "twice", vision, out, seed=0)


def test_without_task_tokens(parts: Path, tmp_path: Path) -> None:
    tokens = compose(parts / "llm", parts / "vision", tmp_path / "out", tokens_per_teacher=0, seed=0)
    assert tokens.flat == ()
    processor = load_processor(tmp_path / "out")
    text = processor.apply_chat_template([{"role": "user", "content": "<image>\nwhat?"}])
    assert text == "<s>USER: <image>\nwhat? "
