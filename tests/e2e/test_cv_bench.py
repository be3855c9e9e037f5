"""`olatrain eval --cv-bench` on a tiny data set in the published layout, against scores worked out here."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from olaschema.errors import CorpusError
from olatrain.cli import app
from olatrain.compose import load_processor
from olatrain.cvbench import SUFFIX, Answer, Question, parse_letter, read_questions, score
from olatrain.evaluate import remarks

SHAPE = {"ADE20K": ("2D", ("Count", "Relation")), "COCO": ("2D", ("Count",)), "Omni3D": ("3D", ("Depth", "Distance"))}


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (18, 22, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def rows() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for source, (kind, tasks) in SHAPE.items():
        for number in range(5 if source == "ADE20K" else 3):
            choices = [str(n) for n in range(2, 6)] if kind == "2D" else ["the cup", "the lamp"]
            marks = " ".join(f"({'ABCD'[n]}) {choice}" for n, choice in enumerate(choices))
            made.append(
                {
                    "idx": len(made), "type": kind, "task": tasks[number % len(tasks)], "source": source,
                    "question": "What?", "choices": choices, "answer": f"({'ABCD'[number % len(choices)]})",
                    "prompt": f"What? Select from the following choices.\n{marks}", "filename": f"{len(made)}.png",
                    "image": {"bytes": picture(len(made)), "path": None},
                }
            )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    for kind in ("2D", "3D"):
        chosen = [row for row in rows() if row["type"] == kind]
        pq.write_table(pa.Table.from_pylist(chosen), folder / f"test_{kind.lower()}.parquet")
    return folder


@pytest.mark.parametrize("method", ["generate", "likelihood"])
def test_scores_are_those_of_the_students_own_answers(method: str, student: Path, bench: Path, tmp_path: Path) -> None:
    """The answers come from transformers and the processor; the formula is the published one."""
    model = AutoModelForImageTextToText.from_pretrained(student).eval()
    processor = load_processor(student)
    with torch.no_grad():  # or no letter would ever be generated
        for letter in "ABCD":
            id_ = processor.tokenizer.convert_tokens_to_ids(letter)
            model.lm_head.weight[id_] *= 6
        model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "model/ola.json").write_bytes((student / "ola.json").read_bytes())
    right: dict[str, list[bool]] = {}
    said: list[str] = []
    for row in rows():
        chat = [{"role": "user", "content": f"<image>\n{row['prompt']}{SUFFIX}"}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        inputs = processor(images=image, text=text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            if method == "likelihood":
                logits = model(**inputs).logits[0, -1]
                ids = [processor.tokenizer.convert_tokens_to_ids("ABCD"[n]) for n in range(len(row["choices"]))]
                letter = "ABCD"[int(logits[ids].argmax())]
            else:
                out = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
                letter = processor.tokenizer.decode(out, skip_special_tokens=True)
        said.append(letter)
        for name in (row["source"], row["task"]):
            right.setdefault(name, []).append(f"({letter})" == row["answer"])
    out = tmp_path / "scores.json"
    flags = ["--student", str(tmp_path / "model"), "--cv-bench", str(bench), "--method", method, "--out", str(out)]
    result = CliRunner().invoke(app, ["eval", *flags])
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(out.read_text())
    mean = {name: sum(values) / len(values) for name, values in right.items()}
    if method == "likelihood":
        for source in SHAPE:
            assert found["sources"][source]["accuracy"] == pytest.approx(mean[source])
        two = (mean["ADE20K"] + mean["COCO"]) / 2
        assert found["overall"]["accuracy"] == pytest.approx((two + mean["Omni3D"]) / 2)
        assert found["unreadable"] == 0
    for task in ("Count", "Relation", "Depth", "Distance"):
        assert found["tasks"][task]["questions"] == len(right[task])
    assert found["overall"]["chance"] == pytest.approx((0.25 + 0.5) / 2)
    assert len(found["answers"]) == found["questions"] == 11
    assert [answer["said"] for answer in found["answers"]] == said
    for answer, row in zip(found["answers"], rows(), strict=True):
        assert answer["answer"] == row["answer"].strip("()")
        assert answer["right"] == (answer["chosen"] == answer["answer"])
    assert "chance" in result.output


def answers(pattern: dict[str, list[bool]]) -> list[Answer]:
    made = []
    for source, values in pattern.items():
        kind, tasks = SHAPE[source]
        choices = ("a", "b", "c", "d") if kind == "2D" else ("a", "b")
        for number, right in enumerate(values):
            question = Question("x", kind, tasks[number % len(tasks)], source, "?", choices, "A", b"")
            made.append(Answer(question, "", "A" if right else None))
    return made


def test_the_published_average_and_its_interval() -> None:
    pattern = {"ADE20K": [True] * 30 + [False] * 10, "COCO": [True] * 5 + [False] * 15, "Omni3D": [True, False] * 25}
    found = score(answers(pattern), resamples=20000)
    assert found["overall"]["accuracy"] == pytest.approx(0.5 * (0.5 * (0.75 + 0.25) + 0.5))
    assert found["2D"]["accuracy"] == pytest.approx(0.5)
    assert found["unreadable"] == 10 + 15 + 25
    rng = np.random.default_rng(1)
    drawn = [
        0.5 * (0.5 * (mean(rng, pattern["ADE20K"]) + mean(rng, pattern["COCO"])) + mean(rng, pattern["Omni3D"]))
        for _ in range(4000)
    ]
    assert found["overall"]["interval"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.012)
    assert found["averaged"] == {"2D": ["ADE20K", "COCO"], "3D": ["Omni3D"]}
    assert "as published" in said(found)
    without = score(answers({"COCO": [True, False, False, False]}))
    assert (without["overall"], without["3D"]) == (None, None)
    assert without["2D"]["accuracy"] == 0.25
    assert without["averaged"] == {"2D": ["COCO"], "3D": []}
    assert "2D = mean of COCO; not CV-Bench's own sources (2D: ADE20K and COCO, 3D: Omni3D)" in said(without)


def test_a_copy_with_other_sources_is_averaged_over_those() -> None:
    """Of four sources of unequal size, two to a type; by hand. A mean over questions would be another number."""
    pattern = {"ADE20K": [True] * 6, "COCO": [True, False], "Omni3D": [False] * 10}
    made = answers(pattern)
    others = {"ADE20K": "VOC", "COCO": "LVIS", "Omni3D": "KITTI"}
    made = [replace(a, question=replace(a.question, source=others[a.question.source])) for a in made]
    made += [replace(a, question=replace(a.question, source="SUNRGBD")) for a in answers({"Omni3D": [True]})]
    found = score(made)
    assert found["2D"]["accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert found["3D"]["accuracy"] == pytest.approx((0 + 1) / 2)
    assert found["overall"]["accuracy"] == pytest.approx(0.625)
    assert found["averaged"] == {"2D": ["LVIS", "VOC"], "3D": ["KITTI", "SUNRGBD"]}
    assert {name: group["questions"] for name, group in found["sources"].items()} == {
        "LVIS": 2, "VOC": 6, "KITTI": 10, "SUNRGBD": 1
    }  # fmt: skip
    assert "no figure to compare with published ones" in said(found)
    both = [replace(a, question=replace(a.question, source="ARKit")) for a in answers(pattern)]
    assert score(both)["sources"].keys() == {"ARKit 2D", "ARKit 3D"}


def said(found: dict[str, Any]) -> str:
    return "\n".join(remarks(found))


def mean(rng: np.random.Generator, values: list[bool]) -> float:
    return float(np.mean(rng.choice(values, len(values))))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(B)", "B"), ("B", "B"), (" B.", "B"), ("B) the lamp", "B"), ("B: the lamp", "B"),
        ("The answer is (A).", "A"), ("The correct answer is B", "B"), ("the lamp", "B"), ("It is the cup.", "A"),
        ("(A) or (B)", None), ("(A) the cup (B) the lamp", None), ("A, B", None), ("B, as A is the cup", "B"),
        ("either (A) or (B)", None), ("Both are", None), ("", None),
        ("the cup and the lamp", None), ("C", None), ("A lamp", None), ("B the lamp", "B"), ("Bananas", None),
        ("The answer is a lamp, the lamp", "B"), ("the answer is b.", "B"), ("Answer: A", "A"),
    ],
)  # fmt: skip
def test_letters_are_read_from_answers(text: str, letter: str | None) -> None:
    assert parse_letter(text, ("the cup", "the lamp")) == letter


def test_the_other_layout_and_what_is_refused(tmp_path: Path, bench: Path) -> None:
    folder = tmp_path / "jsonl"
    (folder / "img").mkdir(parents=True)
    lines = []
    for row in rows():
        (folder / "img" / row["filename"]).write_bytes(row["image"]["bytes"])
        lines.append(json.dumps({k: v for k, v in row.items() if k != "image"}))
    (folder / "test_2d.jsonl").write_text("\n".join(lines))
    lines[0] = lines[0].replace('"idx"', '"image": {"bytes": "no bytes", "path": null}, "idx"')
    (folder / "test_2d.jsonl").write_text("\n".join(lines))
    ours = [(q.prompt, q.answer, q.image) for q in read_questions(folder)]
    assert ours == [(q.prompt, q.answer, q.image) for q in read_questions(bench)]
    (folder / "img/3.png").unlink()
    with pytest.raises(CorpusError, match=r"test_2d\.jsonl:3: its image cannot be read"):
        list(read_questions(folder))
    for changes, message in (
        ({"filename": "../../x.png"}, "leads out"),
        ({"answer": "(E)"}, "4 choices and the answer"),
        ({"type": "4D"}, "is none of 2D, 3D"),
        ({"prompt": None}, "has no prompt"),
        ({"choices": "two"}, "its choices are no list but 'two'"),
    ):
        (folder / "test_2d.jsonl").write_text(
            json.dumps({k: v for k, v in (rows()[0] | changes).items() if k != "image"})
        )
        with pytest.raises(CorpusError, match=message):
            list(read_questions(folder))
    with pytest.raises(CorpusError, match="holds no test"):
        list(read_questions(tmp_path))


def test_files_without_a_question_give_no_score(student: Path, tmp_path: Path) -> None:
    (tmp_path / "test_2d.jsonl").write_text("\n")
    result = CliRunner().invoke(app, ["eval", "--student", str(student), "--cv-bench", str(tmp_path)])
    assert isinstance(result.exception, CorpusError)
    assert "holds no question" in str(result.exception)
