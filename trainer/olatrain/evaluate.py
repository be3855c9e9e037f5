"""`olatrain eval`: a student answers the multiple-choice questions of a benchmark."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from olaschema.errors import ConfigError, CorpusError
from olaschema.images import DEFAULT_MAX_PIXELS, decode_image
from olaschema.manifest import canonical_json
from olatrain.compose import load_processor
from olatrain.conversations import IMAGE_MARK, parse_conversation
from olatrain.cvbench import SOURCES, SUFFIX, Answer, Question, parse_letter, read_questions, score
from olatrain.families import Vision, open_vision
from olatrain.feed import Fed, joined
from olatrain.feedstore import open_feeds
from olatrain.learner import load_student
from olatrain.prompts import PromptBuilder
from olatrain.sidecar import Sidecar
from olatrain.tokens import TaskTokens
from olatrain.views import student_exif

Method = Literal["generate", "likelihood"]
_MOST_TOKENS = 16


class Examinee:
    """A student that is asked questions; its task tokens are read from the embedding rows, as exported.

    One that is fed features takes them from `store`, by the bytes of each image (`olatrain.feedstore`).
    """

    def __init__(
        self, student: Path, device: torch.device, *, store: str | None = None, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> None:
        self._tokens = TaskTokens.load(student)
        processor = load_processor(student)
        self._tokenizer = processor.tokenizer
        template = processor.chat_template if isinstance(processor.chat_template, str) else None
        self._prompts = PromptBuilder(self._tokenizer, self._tokens, max_length=1 << 20, template=template)
        self._vision: Vision = open_vision(processor, self._tokens)
        self._model = load_student(student).to(device).eval()
        self._feeds, self._features = open_feeds(student, self._tokens, self._model, store)
        self._feeds.to(device)
        self._device = device
        self._max_pixels = max_pixels
        sidecar = Sidecar.load(student)
        self._exif = student_exif(sidecar.fingerprints if sidecar is not None else ())
        filler = self._tokenizer.pad_token_id
        self._filler = filler if filler is not None else self._tokenizer.eos_token_id

    def answers(self, questions: Sequence[Question], method: Method) -> list[Answer]:
        """Answer questions in one pass: in words, from which letters are read, or with the likeliest letters.

        A question is answered as it is alone, up to rounding.
        """
        return self.likeliest(questions) if method == "likelihood" else self.spoken(questions)

    @torch.no_grad()
    def spoken(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer questions greedily in words, at most 16 tokens each, from which the letters are read."""
        # padding is on the left, so that what is generated follows each question; positions come from the mask
        inputs = self._inputs(questions, padding_side="left")
        with self._feeds.given(self._fed(questions)):
            out = self._model.generate(
                **inputs, do_sample=False, max_new_tokens=_MOST_TOKENS, pad_token_id=self._filler
            )
        generated = out[:, inputs["input_ids"].shape[1] :]
        said = [self._tokenizer.decode(row, skip_special_tokens=True) for row in generated]
        return [
            Answer(question, words, parse_letter(words, question.choices))
            for question, words in zip(questions, said, strict=True)
        ]

    def likeliest(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer questions in one pass, each with the likeliest of its letters."""
        answers = []
        for question, scores in zip(questions, self.letter_scores(questions), strict=True):
            letter = chr(ord("A") + scores.index(max(scores)))
            answers.append(Answer(question, letter, letter))
        return answers

    @torch.no_grad()
    def letter_scores(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return of each question its letters' log-likelihoods as the first word of the answer."""
        inputs = self._inputs(questions)
        # padding is on the right, where no position of a causal model that counts looks
        ends = inputs["attention_mask"].sum(dim=1) - 1
        kept = torch.tensor(sorted(set(ends.tolist())), device=ends.device)
        place = torch.searchsorted(kept, ends)
        with self._feeds.given(self._fed(questions)):
            logits = self._model(**inputs, use_cache=False, logits_to_keep=kept).logits
        last = logits[torch.arange(len(questions)), place].float().log_softmax(dim=1).cpu()
        return [
            [max(float(row[id_]) for id_ in self._first_ids(chr(ord("A") + n))) for n in range(len(question.choices))]
            for row, question in zip(last, questions, strict=True)
        ]

    @property
    def fed(self) -> dict[str, dict[str, int]]:
        """By fed teacher, questions whose image had a feature and questions whose had none; empty without any."""
        return self._features.counts

    def _first_ids(self, letter: str) -> set[int]:
        """Ids that an answer of that letter may be, after a space or not."""
        return {self._tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in (letter, f" {letter}")}

    def _fed(self, questions: Sequence[Question]) -> dict[str, Fed]:
        return joined([self._features.find(question.image, self._device) for question in questions])

    def _inputs(
        self, questions: Sequence[Question], *, padding_side: Literal["left", "right"] = "right"
    ) -> dict[str, Tensor]:
        shown, rows = [], []
        for question in questions:
            image = decode_image(question.image, name=question.name, max_pixels=self._max_pixels).oriented(
                exif=self._exif
            )
            shown.append(self._vision.show(image))
            asked = {"image": "image", "conversations": [
                {"from": "human", "value": f"{IMAGE_MARK}\n{question.prompt}{SUFFIX}"}, {"from": "gpt", "value": "?"},
            ]}  # fmt: skip
            rows.append(torch.tensor(self._prompts.ask(parse_conversation(asked, 0), [shown[-1].block])))
        ids = pad_sequence(rows, batch_first=True, padding_value=self._filler, padding_side=padding_side)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=padding_side)
        inputs = {"input_ids": ids, "attention_mask": mask}
        inputs |= self._vision.sequence(ids) | self._vision.collate(shown)
        return {name: value.to(self._device) for name, value in inputs.items()}


def evaluate_cv_bench(
    student: Path,
    folder: Path,
    *,
    method: Method,
    device: torch.device,
    out: Path | None,
    store: str | None = None,
    batch: int = 8,
    tick: Any = None,
) -> dict[str, Any]:
    """Score a student on CV-Bench (`cvbench.score`); with `out`, result and every answer are written there as JSON.

    `store` holds features of the questions' images for a student that is fed some, and is for no other. `batch`
    questions are answered in one pass. `tick` is called after each pass with the number of answers so far. Raises
    CorpusError for a folder that is not CV-Bench or has no question, ImageError naming an image that cannot be decoded,
    ConfigError for a student that cannot be loaded.
    """
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"--out {out} cannot be written", "Give a file in a folder that exists.")
    examinee = Examinee(student, device, store=store)
    answers: list[Answer] = []
    rest = read_questions(folder)
    while questions := list(itertools.islice(rest, batch)):
        answers += examinee.answers(questions, method)
        if tick is not None:
            tick(len(answers))
    if not answers:
        raise CorpusError(f"{folder} holds no question", "Copy CV-Bench again: its test files are empty.")
    result = {"benchmark": "CV-Bench", "student": student.resolve().name, "method": method, **score(answers)}
    if examinee.fed:
        result["fed"] = examinee.fed
    if out is not None:
        out.write_bytes(canonical_json({**result, "answers": [_record(answer) for answer in answers]}))
    return result


def table(result: dict[str, Any]) -> Table:
    """Draw a result: a row for the whole, each type, source and task."""
    made = Table(title=f"CV-Bench: {result['student']}, {result['questions']} questions, by {result['method']}")
    made.add_column("")
    for name in ("accuracy", "95 % interval", "chance", "questions"):
        made.add_column(name, justify="right")
    rows = {name: result[name] for name in ("overall", "2D", "3D")} | result["sources"] | result["tasks"]
    for name, found in rows.items():
        if found is not None:
            low, high = found["interval"]
            numbers = (f"{100 * found['accuracy']:.1f}", f"{100 * low:.1f} – {100 * high:.1f}",
                       f"{100 * found['chance']:.1f}", str(found["questions"]))  # fmt: skip
            made.add_row(name, *numbers)
    return made


def _record(answer: Answer) -> dict[str, Any]:
    question = answer.question
    return {
        "question": question.name, "task": question.task, "source": question.source, "said": answer.said,
        "chosen": answer.chosen, "answer": question.answer, "right": answer.right,
    }  # fmt: skip


def remarks(result: dict[str, Any]) -> Sequence[str]:
    """What to know beside the scores: of what they are averages, answers without a letter, questions with features."""
    count = result["unreadable"]
    parts = [f"{kind} = mean of {', '.join(names)}" for kind, names in result["averaged"].items() if names]
    ours = {kind: set(names) for kind, names in result["averaged"].items()}
    if ours == {kind: set(names) for kind, names in SOURCES.items()}:
        parts.append("as published")
    else:
        published = ", ".join(f"{kind}: {' and '.join(names)}" for kind, names in SOURCES.items())
        parts.append(f"not CV-Bench's own sources ({published}), so no figure to compare with published ones")
    lines = ["; ".join(parts)]
    lines += [f"{count} of {result['questions']} answers name no choice; they count as wrong"] if count else []
    for teacher, found in result.get("fed", {}).items():
        lines.append(f"fed features of {teacher} for {found['images']} questions, none for {found['missing']}")
    return lines
