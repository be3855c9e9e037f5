"""The student against the bare model: what is written at the task tokens, what is tapped, and that nothing is kept."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from student_support import FAMILIES, HIDDEN, IMAGE_ID, LAYERS, PAD_ID, build, inputs, task_tokens, twin

from olaschema.errors import ConfigError
from olatrain.student import Student
from olatrain.tokens import TaskTokens, locate

TOKENS = task_tokens()
LATENTS = {"gen": 2, "depth": 6}


def student(family: str = "llava-llama", taps: tuple[int, ...] = (1, 2, LAYERS)) -> Student:
    return Student(build(family), TOKENS, latents=LATENTS, taps=taps, seed=3)


def group_means(made: Student) -> torch.Tensor:
    """Worked out by hand: gen has one vector per token, depth three per token, consecutive."""
    gen, depth = made.latents["gen"].detach(), made.latents["depth"].detach()
    return torch.stack((gen[0], gen[1], (depth[0] + depth[1] + depth[2]) / 3, (depth[3] + depth[4] + depth[5]) / 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_taps_and_logits_equal_those_of_the_bare_model_with_the_means_as_embeddings(family: str) -> None:
    bare = twin(build(family))
    made = student(family)
    batch = inputs(family, TOKENS)
    with torch.no_grad():
        bare.get_input_embeddings().weight[list(TOKENS.flat)] = group_means(made)  # type: ignore[operator]
        expected = bare(**batch, output_hidden_states=True, use_cache=False)
        output = made(batch)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert set(output.taps) == {1, 2, LAYERS}
    for layer, state in output.taps.items():
        # hidden_states[0] are the embeddings; the last entry is the final norm's output
        torch.testing.assert_close(state, expected.hidden_states[layer], rtol=1e-5, atol=1e-5)
        for other in {layer - 1, layer + 1} & set(range(LAYERS + 1)):
            assert (state - expected.hidden_states[other]).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_reaches_every_latent_and_the_projector(family: str) -> None:
    made = student(family)
    made(inputs(family, TOKENS)).taps[LAYERS].square().sum().backward()
    for teacher in TOKENS.teachers:
        gradient = made.latents[teacher].grad
        assert gradient is not None
        assert (gradient.abs().amax(dim=1) > 0).all()
    # a group's latents share their mean's gradient
    depth = made.latents["depth"].grad
    assert depth is not None
    torch.testing.assert_close(depth[0], depth[2])
    assert not torch.allclose(depth[2], depth[3])
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in made.projector.parameters())


def test_latents_are_standard_normal_and_a_function_of_the_seed() -> None:
    tokens = task_tokens(("depth",), 2)
    made = Student(build(), tokens, latents={"depth": 600}, taps=(1,), seed=5).latents["depth"].detach()
    again = Student(build(), tokens, latents={"depth": 600}, taps=(1,), seed=5).latents["depth"].detach()
    other = Student(build(), tokens, latents={"depth": 600}, taps=(1,), seed=6).latents["depth"].detach()
    assert made.shape == (600, HIDDEN)
    assert torch.equal(made, again)
    assert not torch.equal(made, other)
    assert abs(made.mean().item()) < 0.03
    assert abs(made.std().item() - 1) < 0.03


def test_only_the_asked_logits_are_computed() -> None:
    made = student()
    batch = inputs("llava-llama", TOKENS)
    keep = torch.tensor([4, 9])
    with torch.no_grad():
        assert torch.allclose(made(batch, keep=keep).logits, made(batch).logits[:, keep], atol=1e-6)


def test_stored_means_make_the_bare_model_compute_the_same() -> None:
    made = student()
    batch = inputs("llava-llama", TOKENS)
    bare = build()
    with torch.no_grad():
        expected = made(batch).logits
        assert not torch.allclose(bare(**batch).logits, expected, atol=1e-2)
        made.store_task_embeddings()
        bare.load_state_dict(made.model.state_dict())
        assert torch.allclose(bare(**batch).logits, expected, atol=1e-5)


def test_generation_sees_the_task_tokens_and_runs_outside_a_forward_pass() -> None:
    made = student()
    batch = inputs("llava-llama", TOKENS)
    bare = build()
    with torch.no_grad():
        bare.get_input_embeddings().weight[list(TOKENS.flat)] = group_means(made)  # type: ignore[operator]
    kwargs = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    assert torch.equal(made.model.generate(**batch, **kwargs), bare.generate(**batch, **kwargs))  # type: ignore[operator]


def test_nothing_of_a_call_outlives_it() -> None:
    made = student()
    output = made(inputs("llava-llama", TOKENS))
    kept = [weakref.ref(state) for state in output.taps.values()] + [weakref.ref(output.logits)]
    del output
    gc.collect()
    assert all(reference() is None for reference in kept)


def test_a_call_inside_a_call_has_taps_of_its_own() -> None:
    made = student()
    outer, inner = inputs("llava-llama", TOKENS, seed=1), inputs("llava-llama", TOKENS, seed=2, suffix=9)
    with torch.no_grad():
        expected_outer, expected_inner = made(outer).taps, made(inner).taps
        nested: dict[int, torch.Tensor] = {}

        def call_again(*_: object) -> None:
            if not nested:
                nested[0] = torch.empty(0)  # no third level
                nested.update(made(inner).taps)

        handle = made.layers[1].register_forward_hook(call_again)
        got = made(outer).taps
        handle.remove()
    for layer in made.taps:
        assert torch.equal(got[layer], expected_outer[layer])
        assert torch.equal(nested[layer], expected_inner[layer])


def test_an_error_inside_leaves_no_call_open() -> None:
    made = student()
    batch = inputs("llava-llama", TOKENS)
    with pytest.raises(ValueError, match=r"features|tokens"):
        made({**batch, "pixel_values": torch.zeros(2, 3, 28, 28)})
    hooked: list[int] = []
    made.layers[0].register_forward_hook(lambda *_: hooked.append(1))
    with torch.no_grad():
        assert set(made(batch).taps) == set(made.taps)
    assert hooked


def test_gradient_checkpointing_changes_no_gradient() -> None:
    batch = inputs("llava-llama", TOKENS)
    gradients = []
    for checkpointing in (False, True):
        made = student(taps=(2, 3)).train()
        if checkpointing:
            made.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        taps = made(batch).taps
        (taps[2].sin().sum() + taps[3].cos().sum()).backward()
        gradients.append(made.latents["depth"].grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_wrong_settings_are_refused_with_the_numbers() -> None:
    model = build()
    with pytest.raises(ConfigError, match=r"has 4 decoder layers; \[5\] cannot be tapped"):
        Student(model, TOKENS, latents=LATENTS, taps=(5,), seed=0)
    with pytest.raises(ConfigError, match=r"\[0\] cannot be tapped"):
        Student(model, TOKENS, latents=LATENTS, taps=(0,), seed=0)
    with pytest.raises(ConfigError, match="7 latents cannot be split into 2 equal groups"):
        Student(model, TOKENS, latents={"gen": 2, "depth": 7}, taps=(1,), seed=0)
    with pytest.raises(ConfigError, match=r"latents are given for \['gen'\]"):
        Student(model, TOKENS, latents={"gen": 2}, taps=(1,), seed=0)
    with pytest.raises(ConfigError, match="input embeddings of CLIPVisionModel are a Conv2d"):
        Student(build().model.vision_tower, TOKENS, latents=LATENTS, taps=(1,), seed=0)  # type: ignore[union-attr, arg-type]


# --- positions ---


def ids(*parts: int | list[int]) -> list[int]:
    return [i for part in parts for i in (part if isinstance(part, list) else [part])]


IMAGE = [IMAGE_ID] * 4
GEN, DEPTH = list(TOKENS.ids["gen"]), list(TOKENS.ids["depth"])


def batch_of(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return input_ids, mask


def places(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def test_positions_of_one_image_and_its_contexts() -> None:
    items = locate(TOKENS, *batch_of(ids(5, 6, IMAGE, GEN, DEPTH, 7, 8), ids(5, IMAGE, GEN, DEPTH, 7)))
    assert items.sample.tolist() == [0, 1]
    assert items.task.tolist() == [[[6, 7], [8, 9]], [[5, 6], [7, 8]]]
    assert places(items.context(0, "image")[0]) == [2, 3, 4, 5, 6, 7]
    assert places(items.context(1, "image")[0]) == [2, 3, 4, 5, 8, 9]
    assert places(items.context(1, "prompt")[0]) == [0, 1, 2, 3, 4, 5, 8, 9]
    assert places(items.context(1, "all")[0]) == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    assert places(items.context(1, "all")[1]) == [0, 1, 2, 3, 4, 7, 8, 9]
    assert places(items.context(1, "all", padding=True)[1]) == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]
    assert places(items.context(1, "prompt", padding=True)[1]) == [0, 1, 2, 3, 4, 7, 8]


def test_left_padding_moves_the_positions_along() -> None:
    row = ids(5, IMAGE, GEN, DEPTH, 7)
    input_ids = torch.tensor([[PAD_ID] * 3 + row])
    mask = torch.tensor([[0] * 3 + [1] * len(row)])
    items = locate(TOKENS, input_ids, mask)
    assert items.task.tolist() == [[[8, 9], [10, 11]]]
    assert places(items.context(0, "all")[0]) == [3, 4, 5, 6, 7, 8, 9, 12]


def test_each_of_several_images_has_its_own_item() -> None:
    items = locate(TOKENS, *batch_of(ids(IMAGE, GEN, DEPTH, 5, IMAGE, GEN, DEPTH, 6), ids(3, 4)))
    assert items.sample.tolist() == [0, 0]
    assert items.task.tolist() == [[[4, 5], [6, 7]], [[13, 14], [15, 16]]]
    assert places(items.context(0, "image")[1]) == [9, 10, 11, 12, 13, 14]
    assert places(items.context(0, "prompt")[1]) == [8, 9, 10, 11, 12, 13, 14]
    # neither the other image nor any other task token
    assert places(items.context(0, "all")[0]) == [0, 1, 2, 3, 4, 5, 8, 17]


def test_a_teachers_group_may_stand_elsewhere_and_tiles_are_one_image() -> None:
    tiles = ids(50, IMAGE, 51, IMAGE, 52)
    items = locate(TOKENS, *batch_of(ids(3, tiles, 7, DEPTH, GEN, 8)))
    assert items.task.tolist() == [[[15, 16], [13, 14]]]
    assert places(items.context(1, "image")[0]) == [*range(2, 11), 13, 14]


def test_without_task_tokens_images_are_runs_of_the_fixed_length() -> None:
    none = task_tokens(size=0)
    items = locate(none, *batch_of(ids(5, IMAGE, IMAGE, 6), ids(IMAGE, 7)))
    assert items.sample.tolist() == [0, 0, 1]
    assert items.task.shape == (3, 2, 0)
    assert [places(row) for row in items.image] == [[1, 2, 3, 4], [5, 6, 7, 8], [0, 1, 2, 3]]
    assert places(items.context(0, "all")[2]) == [0, 1, 2, 3, 4]
    free = task_tokens(size=0, image_length=None)
    tiles = ids(5, IMAGE, 51, IMAGE, 6)
    assert len(locate(free, *batch_of(tiles))) == 2
    assert len(locate(free, *batch_of(tiles), images=[1])) == 1


def test_a_batch_of_text_has_no_items() -> None:
    items = locate(TOKENS, *batch_of([3, 4], [5]))
    assert len(items) == 0
    assert items.context(0, "all").shape == (0, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ids(IMAGE, GEN, DEPTH[:1]), "depth at position 6 are not a whole group"),
        (ids(IMAGE, GEN[::-1], DEPTH), "gen at position 4 are not a whole group"),
        (ids(IMAGE, GEN[:1], 5, GEN[1:], DEPTH), "gen at position 4 are not a whole group"),
        (ids(IMAGE, GEN), "different numbers of task token groups"),
        (ids(IMAGE, 5), "an image without task tokens"),
        (ids(5, GEN, DEPTH), "task tokens without an image"),
        (ids(IMAGE, GEN, DEPTH, GEN, DEPTH), "no image stands between"),
        (ids(IMAGE, GEN, DEPTH, IMAGE, GEN, DEPTH, IMAGE), "its last image has no task tokens"),
    ],
)
def test_broken_groups_are_refused_by_sample(row: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        locate(TOKENS, *batch_of(ids(IMAGE, GEN, DEPTH), row))
    assert "sample 1" in str(caught.value)
    assert caught.value.remedy


def test_the_number_of_images_is_checked() -> None:
    with pytest.raises(ConfigError, match="has 2 images and the prompt has room for 1"):
        locate(TOKENS, *batch_of(ids(IMAGE, GEN, DEPTH)), images=[2])


EVERY = TaskTokens(
    teachers=("gen", "depth"),
    tokens_per_teacher=2,
    task_format="emb",
    ids={"gen": (60, 61), "depth": (62, 63, 64, 65, 66, 67)},
    image_id=IMAGE_ID,
    image_length=4,
    never_predicted=(),
)


def test_every_latent_stands_for_itself_in_the_format_emb() -> None:
    bare = twin(build())
    made = Student(build(), EVERY, latents=LATENTS, taps=(2,), seed=3)
    batch = inputs("llava-llama", EVERY)
    with torch.no_grad():
        rows = bare.get_input_embeddings().weight  # type: ignore[operator]
        rows[[60, 61]], rows[list(range(62, 68))] = made.latents["gen"], made.latents["depth"]
        expected = bare(**batch, use_cache=False).logits
    output = made(batch)
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-5)
    output.logits.square().sum().backward()
    depth = made.latents["depth"].grad
    assert depth is not None
    assert not torch.allclose(depth[0], depth[1])  # no longer a group's common gradient


def test_positions_where_teachers_have_different_numbers_of_tokens() -> None:
    depth = list(EVERY.ids["depth"])
    items = locate(EVERY, *batch_of(ids(5, IMAGE, GEN, depth, 7), ids(IMAGE, GEN, depth, IMAGE, GEN, depth)))
    assert items.task[0].tolist() == [[5, 6, 6, 6, 6, 6], [7, 8, 9, 10, 11, 12]]
    assert items.task[2, 1].tolist() == [18, 19, 20, 21, 22, 23]
    assert places(items.context(0, "image")[0]) == [1, 2, 3, 4, 5, 6]
    assert places(items.context(1, "image")[0]) == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert places(items.context(1, "all")[0]) == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13]
    with pytest.raises(ConfigError, match="depth at position 6 are not a whole group"):
        locate(EVERY, *batch_of(ids(IMAGE, GEN, depth[:2])))


def test_the_format_emb_wants_an_id_for_each_latent() -> None:
    with pytest.raises(ConfigError, match="depth: 12 latents are to be learned, the student's prompts hold 6"):
        Student(build(), EVERY, latents={"gen": 2, "depth": 12}, taps=(1,), seed=0)
    with pytest.raises(ValueError, match="depth has 6 ids, tokens_per_teacher is 2"):
        TaskTokens.model_validate(EVERY.model_dump() | {"task_format": "expand_emb"})
    with pytest.raises(ValueError, match="gen has 2 ids, tokens_per_teacher is 4"):
        TaskTokens.model_validate(EVERY.model_dump() | {"tokens_per_teacher": 4})


def test_the_record_survives_its_file_and_refuses_nonsense(tmp_path: Path) -> None:
    TOKENS.save(tmp_path)
    assert TaskTokens.load(tmp_path) == TOKENS
    with pytest.raises(ConfigError, match=r"ola\.json cannot be read"):
        TaskTokens.load(tmp_path / "nowhere")
    (tmp_path / "ola.json").write_text('{"format": 1}')
    with pytest.raises(ConfigError, match="teachers"):
        TaskTokens.load(tmp_path)
    with pytest.raises(ValueError, match="an id stands for two tokens"):
        TaskTokens(
            teachers=("a", "b"), tokens_per_teacher=1, ids={"a": (1,), "b": (1,)}, image_id=2, never_predicted=()
        )
