from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors
from trainer_support import LLAMA, PHI3, VICUNA, byte_tokenizer, conversation, write_json

from olaschema.errors import ConfigError, CorpusError
from olatrain.conversations import Conversations, SampleError, parse_conversation
from olatrain.losses import IGNORED
from olatrain.prompts import PromptBuilder
from olatrain.tokens import TaskTokens

TEMPLATES = {"llama": LLAMA, "phi3": PHI3, "vicuna": VICUNA}
ENDINGS = {"llama": "<|eot|>", "phi3": "<|eot|>", "vicuna": "</s>"}
IMAGE_LENGTH = 5


def builder(
    template: str = LLAMA,
    *,
    max_length: int = 4096,
    adds_bos: bool = False,
    task_in_template: bool = False,
    merges: Sequence[tuple[str, str]] = (),
) -> tuple[PromptBuilder, Any, TaskTokens]:
    tokenizer = byte_tokenizer(template, adds_bos=adds_bos, merges=merges)
    names = ["<ola_gen_0>", "<ola_gen_1>", "<ola_depth_0>", "<ola_depth_1>"]
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", *names]}, replace_extra_special_tokens=False)
    ids = tokenizer.convert_tokens_to_ids(["<image>", *names])
    tokens = TaskTokens(
        teachers=("gen", "depth"),
        tokens_per_teacher=2,
        ids={"gen": tuple(ids[1:3]), "depth": tuple(ids[3:])},
        image_id=ids[0],
        image_length=IMAGE_LENGTH,
        never_predicted=tuple(sorted(ids)),
    )
    if task_in_template:
        # as a composed student's template does: the task tokens come with the image
        tokenizer.chat_template = template.replace(
            "message['content'] | trim", f"message['content'] | replace('<image>', '<image>{''.join(names)}') | trim"
        )
    return PromptBuilder(tokenizer, tokens, max_length=max_length), tokenizer, tokens


def parsed(turns: list[tuple[str, str]], image: str | None = None) -> Any:
    entry: dict[str, Any] = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    return parse_conversation(entry | ({"image": image} if image else {}), 0)


TWO_TURNS = [("human", "what <image>\nis it?"), ("gpt", "A cat."), ("human", "sure?"), ("gpt", "Yes, it is: A cat.")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_supervised_text_is_the_answers_and_what_ends_them(name: str) -> None:
    prompts, tokenizer, _ = builder(TEMPLATES[name])
    prompt = prompts.build(parsed(TWO_TURNS, "a.png"))
    supervised = [token for token in prompt.labels if token != IGNORED]
    end = ENDINGS[name]
    assert tokenizer.decode(supervised) == f"A cat.{end}Yes, it is: A cat.{end}"
    # a label is the id at its own place, so nothing is shifted
    assert all(label in (IGNORED, token) for label, token in zip(prompt.labels, prompt.input_ids, strict=True))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("task_in_template", [False, True])
def test_image_comes_first_in_its_turn_with_the_task_tokens_behind(name: str, task_in_template: bool) -> None:
    prompts, tokenizer, tokens = builder(TEMPLATES[name], task_in_template=task_in_template)
    ids = prompts.build(parsed(TWO_TURNS, "a.png")).input_ids
    first = ids.index(tokens.image_id)
    block = [tokens.image_id] * IMAGE_LENGTH + list(tokens.flat)
    assert ids[first : first + len(block)] == block
    rest = [*ids[:first], *ids[first + len(block) :]]
    assert not {tokens.image_id, *tokens.flat} & set(rest)
    # apart from the block it is the template's own text, with the image moved to the front of its turn
    expected = {
        "llama": "<s><|start|>user<|sep|>\n\n\nwhat \nis it?<|eot|><|start|>assistant<|sep|>\n\nA cat.<|eot|>"
        "<|start|>user<|sep|>\n\nsure?<|eot|><|start|>assistant<|sep|>\n\nYes, it is: A cat.<|eot|>",
        "phi3": "<|start|>user\n\nwhat \nis it?<|eot|>\n<|start|>assistant\nA cat.<|eot|>\n"
        "<|start|>user\nsure?<|eot|>\n<|start|>assistant\nYes, it is: A cat.<|eot|>\n</s>",
        "vicuna": "USER: \n what \nis it? ASSISTANT: A cat.</s>USER: sure? ASSISTANT: Yes, it is: A cat.</s>",
    }
    assert tokenizer.decode(rest) == expected[name]


def test_text_only_has_no_image_or_task_tokens() -> None:
    prompts, tokenizer, tokens = builder()
    prompt = prompts.build(parsed([("system", "Be kind."), ("human", "hi"), ("gpt", "hello")]))
    assert not {tokens.image_id, *tokens.flat} & set(prompt.input_ids)
    assert tokenizer.decode([token for token in prompt.labels if token != IGNORED]) == "hello<|eot|>"
    assert "Be kind." in tokenizer.decode(prompt.input_ids)


def test_first_token_is_there_once() -> None:
    for template in (LLAMA, PHI3):  # one writes it, the other leaves it to the tokenizer
        prompts, tokenizer, _ = builder(template, adds_bos=True)
        ids = prompts.build(parsed([("human", "hi"), ("gpt", "hello")])).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_merged_tokens_at_the_edges_of_an_answer() -> None:
    # the space before the answer merges with its first letter; the answer repeats the header
    prompts, tokenizer, _ = builder(VICUNA, merges=[("Ġ", "A")])
    whole = prompts.build(parsed([("human", "hi"), ("gpt", "A: ASSISTANT: A")]))
    supervised = [token for token in whole.labels if token != IGNORED]
    assert tokenizer.convert_ids_to_tokens(supervised[:2]) == ["ĠA", ":"]
    assert tokenizer.decode(supervised) == " A: ASSISTANT: A</s>"


def test_long_samples_are_cut_after_the_image_or_refused() -> None:
    long = parsed([("human", "<image>" + "q" * 50), ("gpt", "a" * 500)], "a.png")
    whole = builder()[0].build(long)
    prompts, _, tokens = builder(max_length=100)
    cut = prompts.build(long)
    assert cut.input_ids == whole.input_ids[:100]
    assert cut.labels == whole.labels[:100]
    assert cut.cut == len(whole.input_ids) - 100
    end_of_block = len(whole.input_ids) - 1 - whole.input_ids[::-1].index(tokens.flat[-1]) + 1
    assert builder(max_length=end_of_block)[0].build(long).input_ids == whole.input_ids[:end_of_block]
    with pytest.raises(SampleError, match=f"end at {end_of_block}, max_length is {end_of_block - 1}") as caught:
        builder(max_length=end_of_block - 1)[0].build(long)
    assert caught.value.reason == "too-long"


@pytest.mark.parametrize("text", ["<ola_gen_0>", "see <image>"])
def test_reserved_text_is_refused(text: str) -> None:
    prompts, *_ = builder()
    entry = parsed([("human", "hi"), ("gpt", "hello")])
    forged = entry.__class__(0, (), (), (entry.turns[0].__class__("user", text), entry.turns[1]))
    with pytest.raises(SampleError, match="conversation 0: its text holds the name") as caught:
        prompts.build(forged)
    assert caught.value.reason == "reserved-text"


def test_a_template_that_hides_or_changes_turns_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither plain nor structured"):
        builder("{{ bos_token }}hello")
    prompts, *_ = builder(LLAMA.replace("| trim", "| trim | replace('hello', 'bye')"))
    with pytest.raises(ConfigError, match="does not give answer 1"):
        prompts.build(parsed([("human", "hi"), ("gpt", "hello")]))


BAD: dict[str, tuple[Any, str]] = {
    "not-an-object": ("text", "conversation 1 is not an object but str"),
    "no-turns": ({"id": 7, "conversations": []}, r"conversation 1 \(id 7\) has no turns"),
    "unknown-role": ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown role 'robot'"),
    "turn-order": ({"conversations": [{"from": "gpt", "value": "x"}]}, "but assistant"),
    "empty-answer": (conversation(None, "  "), "empty answer"),
    "image-mark": (conversation(None, "x") | {"image": "a.png"}, "one image and 0 times <image>"),
    "bad-image": (conversation("../a.png", "x"), "leads out of the image folder"),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_conversations_are_left_out_with_index_and_reason(reason: str, tmp_path: Path) -> None:
    entry, message = BAD[reason]
    found = Conversations.read(write_json(tmp_path / "c.json", [conversation(None, "fine"), entry]))
    assert len(found) == 1
    assert [(bad.index, bad.reason) for bad in found.bad] == [(1, reason)]
    with pytest.raises(SampleError, match=message):
        parse_conversation(entry, 1)
    assert f"1 {reason}" in found.problems()


@pytest.mark.parametrize(
    "entry",
    [
        conversation(None, "x", question="see <image>"),
        conversation("a.png", "x", question="<image>"),
        {"image": "a.png", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "<image>"}]},
    ],
    ids=["no image", "twice", "in an answer"],
)
def test_marks_must_match_images(entry: Any) -> None:
    with pytest.raises(SampleError) as caught:
        parse_conversation(entry, 0)
    assert caught.value.reason == "image-mark"


def test_several_images_stay_where_their_marks_are() -> None:
    prompts, tokenizer, tokens = builder()
    entry = {
        "image": ["a.png", "b/c.png", "a.png"],
        "conversations": [
            {"from": "human", "value": "is <image> left of <image>?"},
            {"from": "gpt", "value": "yes"},
            {"from": "human", "value": "<image>\nand here?"},
            {"from": "gpt", "value": "no"},
        ],
    }
    found = parse_conversation(entry, 0)
    assert found.keys == ("a.png", "b/c.png", "a.png")
    assert found.image_turns == (0, 0, 2)
    assert [turn.text for turn in found.turns] == ["is <image> left of <image>?", "yes", "and here?", "no"]
    blocks = [[tokens.image_id] * n for n in (3, 1, 2)]
    ids = prompts.build(found, blocks).input_ids
    starts = [place for place, id_ in enumerate(ids) if id_ == tokens.image_id and ids[place - 1] != tokens.image_id]
    for start, block in zip(starts, blocks, strict=True):
        wanted = [*block, *tokens.flat]
        assert ids[start : start + len(wanted)] == wanted
    between = ids[starts[0] + 3 + len(tokens.flat) : starts[1]]
    assert tokenizer.decode(between) == " left of "
    assert [tokenizer.decode(ids[s - 3 : s]) for s in starts[:1]] == ["is "]


def test_json_and_jsonl_read_the_same(tmp_path: Path) -> None:
    entries = [conversation("b/../a.png", "naïve ☃"), conversation(None, "two\nlines"), "bad"]
    listed = Conversations.read(write_json(tmp_path / "c.json", entries))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(entry) + "\n\n" for entry in entries), encoding="utf-8")
    lines = Conversations.read(tmp_path / "c.jsonl")
    assert list(listed) == list(lines)
    assert listed.digest == lines.digest
    assert listed.keys == [("a.png",), ()]
    assert listed[0].turns[1].text == "naïve ☃"
    assert listed[1].index == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("{}", "holds a dict, not a list"), ("[]", "no usable"), ('["x"]', "is not an object")],
)
def test_unusable_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CorpusError, match=message):
        Conversations.read(path)


@pytest.mark.parametrize("name", ["c.json", "c.JSONL"])
def test_a_byte_order_mark_and_an_extension_in_capitals_are_read(tmp_path: Path, name: str) -> None:
    text = json.dumps(conversation(None, "fine"))
    (tmp_path / name).write_text(text if "L" in name else f"[{text}]", encoding="utf-8-sig")
    assert len(Conversations.read(tmp_path / name)) == 1


@pytest.mark.parametrize("name", ["c.json", "c.jsonl"])
def test_nesting_without_end_is_an_error_of_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(CorpusError, match="not valid JSON"):
        Conversations.read(tmp_path / name)


def test_parquet_holds_what_json_does(tmp_path: Path) -> None:
    """Paths, several paths, none; and images inside, which are named as in a corpus of parquet files."""
    entries = [conversation("a.png", "one"), conversation(None, "two"), conversation("sub/c.png", "three")]
    several = conversation("a.png", "four") | {"image": ["a.png", "b.png"]}
    several["conversations"][0]["value"] = "<image> and <image>"
    single = Conversations.read(write_json(tmp_path / "c.json", entries))
    rows = [{"id": str(n), "image": None, **entry} for n, entry in enumerate(entries)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    found = Conversations.read(tmp_path / "c.parquet")
    assert (found.digest, found.keys) == (single.digest, [("a.png",), (), ("sub/c.png",)])
    pq.write_table(pa.Table.from_pylist([several, {**entries[1], "image": None}]), tmp_path / "many.parquet")
    assert Conversations.read(tmp_path / "many.parquet").keys == [("a.png", "b.png"), ()]
    for name, image in (("struct", {"bytes": b"x", "path": "x.png"}), ("plain", b"x"), ("bare", {"bytes": b"x"})):
        inside = [row | {"image": image if row["image"] else None} for row in rows]
        pq.write_table(pa.Table.from_pylist(inside), tmp_path / f"{name}.parquet")
        assert Conversations.read(tmp_path / f"{name}.parquet").keys == [
            (f"{name}.parquet/0",), (), (f"{name}.parquet/2",)
        ]  # fmt: skip
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(CorpusError, match="has no column conversations; its columns: text"):
        Conversations.read(tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "c.parquet").read_bytes()[:-9])
    with pytest.raises(CorpusError, match=r"cut\.parquet cannot be read"):
        Conversations.read(tmp_path / "cut.parquet")


def test_a_tokenizer_that_ends_every_text_ends_no_question() -> None:
    """Some add an end token after any text: behind a question it would be what the answer is generated from."""
    _, tokenizer, tokens = builder(VICUNA, adds_bos=True)
    plain = PromptBuilder(tokenizer, tokens, max_length=4096)
    ends = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    ending = PromptBuilder(tokenizer, tokens, max_length=4096)
    conversation = parsed(TWO_TURNS, "a.png")
    blocks = [[tokens.image_id] * IMAGE_LENGTH]
    assert ending.ask(conversation, blocks) == plain.ask(conversation, blocks)
    assert ending.build(conversation) == plain.build(conversation)
    assert plain.ask(conversation, blocks)[0] == 0
