"""Prompts: a conversation through the student's chat template, as ids and labels.

The template's text is tokenised once, as a whole. Where answers are is found by rendering the conversation up to each
answer: that text must begin the whole one, and the answer must follow it. Image and task tokens are then put in by
id, so it does not matter whether the template wrote the task tokens itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from olaschema.errors import ConfigError
from olatrain.conversations import IMAGE_MARK, Conversation, SampleError
from olatrain.losses import IGNORED
from olatrain.tokens import TaskTokens

_PROBE = "probe"


@dataclass(frozen=True)
class Prompt:
    """One tokenised conversation: `input_ids` and `labels` of equal length, labels -100 outside the answers."""

    input_ids: list[int]
    labels: list[int]
    cut: int
    """Tokens that `max_length` took off the end."""


class PromptBuilder:
    """Makes prompts for one student.

    `tokenizer` is a fast tokenizer whose chat template takes plain strings with the image's mark or structured
    content; `template` replaces its own where the processor holds another.
    """

    def __init__(self, tokenizer: Any, tokens: TaskTokens, *, max_length: int, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = template or tokenizer.chat_template
        self._tokens = tokens
        self._max_length = max_length
        if not tokenizer.is_fast:
            raise ConfigError(
                f"the student's tokenizer {type(tokenizer).__name__} gives no offsets",
                "Save the student with a fast tokenizer (tokenizer.json).",
            )
        if self._template is None:
            raise ConfigError("the student has no chat template", "Make its folder with `olatrain compose`.")
        self._mark = str(tokenizer.convert_ids_to_tokens(tokens.image_id))
        self._reserved = frozenset((tokens.image_id, *tokens.flat))
        self._specials = frozenset(tokenizer.all_special_ids) | frozenset(
            id_ for id_, added in tokenizer.added_tokens_decoder.items() if added.special
        )
        added = tokenizer("")["input_ids"]
        self._adds_bos = tokenizer.bos_token is not None and added[:1] == [tokenizer.bos_token_id]
        self._structured = self._needs_structure()

    def build(self, conversation: Conversation, blocks: Sequence[Sequence[int]] | None = None) -> Prompt:
        """Tokenise a conversation; answers, with the token that ends each, are the labels.

        `blocks` are the ids that stand for each image (`families.Shown.block`); without them every image has the
        student's `image_length` placeholders.

        Raises SampleError `reserved-text` where the text itself holds the name of an image or task token, and
        `too-long` where the limit would cut the image or its task tokens.
        """
        messages = self._messages(conversation)
        try:
            text = self._render(messages, generate=False)
            spans = self._answers(conversation, messages, text)
        except TemplateError as error:
            raise SampleError(
                "template",
                f"conversation {conversation.index}: the student's chat template refuses it: {error}",
                "Change its turns (a system turn, or two turns of one speaker in a row), or the template.",
            ) from error
        ids, offsets = self._encode(text)
        labels = self._labels(ids, offsets, text, spans)
        if blocks is None:
            blocks = [[self._tokens.image_id] * (self._tokens.image_length or 1)] * len(conversation.keys)
        ids, labels, safe = self._with_images(conversation, ids, labels, blocks)
        if safe > self._max_length:
            raise SampleError(
                "too-long",
                f"conversation {conversation.index}: its image and task tokens end at {safe}, "
                f"max_length is {self._max_length}",
                "Raise max_length.",
            )
        cut = max(0, len(ids) - self._max_length)
        return Prompt(ids[: self._max_length], labels[: self._max_length], cut)

    def ask(self, conversation: Conversation, blocks: Sequence[Sequence[int]]) -> list[int]:
        """Tokenise a conversation up to where its last answer begins: the prompt to generate that answer from."""
        text = self._render(self._messages(conversation)[:-1], generate=True)
        ids, _ = self._encode(text)
        found, _, _ = self._with_images(conversation, ids, [IGNORED] * len(ids), blocks)
        return found

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        # templates of base tokenizers often leave the first token to the tokenizer; what ends a text is the template's,
        # and some tokenizers would end a question with it
        if self._adds_bos and not text.startswith(self._tokenizer.bos_token):
            ids, offsets = [self._tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
        return ids, offsets

    def _messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        return [
            {"role": turn.role, "content": self._content(turn.text, images=conversation.image_turns.count(number))}
            for number, turn in enumerate(conversation.turns)
        ]

    def _content(self, text: str, *, images: int) -> Any:
        if not self._structured:
            return f"{IMAGE_MARK}\n{text}" if images == 1 else text
        if images <= 1:
            return [*([{"type": "image"}] if images else []), {"type": "text", "text": text}]
        first, *others = text.split(IMAGE_MARK)
        parts = [{"type": "text", "text": first}]
        for words in others:
            parts += [{"type": "image"}, {"type": "text", "text": words}]
        return parts

    def _render(self, messages: list[dict[str, Any]], *, generate: bool) -> str:
        rendered: str = self._tokenizer.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=generate
        )
        return rendered

    def _needs_structure(self) -> bool:
        for structured in (False, True):
            self._structured = structured
            try:
                text = self._render([{"role": "user", "content": self._content(_PROBE, images=1)}], generate=True)
            except (TemplateError, TypeError):
                continue
            if _PROBE in text and text.count(self._mark) == 1 and "{'type'" not in text:
                return structured
        raise ConfigError(
            "the student's chat template shows neither plain nor structured content with an image",
            "Make the student's folder with `olatrain compose`.",
        )

    def _answers(self, conversation: Conversation, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """Character spans of the answers in `text`, without what ends them."""
        spans = []
        for number, turn in enumerate(conversation.turns):
            if turn.role != "assistant":
                continue
            before = self._render(messages[:number], generate=True)
            start = len(before)
            # some templates put a space between their header and the answer, others into the header
            gap = len(text[start:]) - len(text[start:].lstrip())
            for candidate in (start, start + gap):
                if text.startswith(before) and text.startswith(turn.text, candidate):
                    spans.append((candidate, candidate + len(turn.text)))
                    break
            else:
                raise ConfigError(
                    f"conversation {conversation.index}: the chat template does not give answer {number} after the "
                    "prompt that would be generated from, so it cannot be told what to learn",
                    "Use a chat template that writes each turn once, in order and unchanged.",
                )
        return spans

    def _labels(
        self, ids: list[int], offsets: list[tuple[int, int]], text: str, spans: list[tuple[int, int]]
    ) -> list[int]:
        labels = [IGNORED] * len(ids)
        place = 0
        for start, end in spans:
            while place < len(ids) and offsets[place][1] <= start:
                place += 1
            while place < len(ids) and offsets[place][0] < end:
                labels[place] = ids[place]
                place += 1
            # the model must learn to stop: the special token that ends the answer, perhaps after a line break
            ending = place
            while ending < len(ids) and ids[ending] not in self._specials and text[slice(*offsets[ending])].isspace():
                ending += 1
            if ending < len(ids) and ids[ending] in self._specials and text[end : offsets[ending][0]].strip() == "":
                labels[place : ending + 1] = ids[place : ending + 1]
                place = ending + 1
        return labels

    def _with_images(
        self, conversation: Conversation, ids: list[int], labels: list[int], blocks: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[int], int]:
        """Put each image's tokens at its mark and the task tokens behind them; also the length up to the last's end."""
        marks = [place for place, token in enumerate(ids) if token == self._tokens.image_id]
        if len(marks) != len(blocks):
            raise self._reserved_text(conversation)
        after, task = list(self._tokens.after_image), list(self._tokens.flat)
        made: list[int] = []
        made_labels: list[int] = []
        last = safe = 0
        for mark, block in zip(marks, blocks, strict=True):
            self._require_plain(conversation, ids[last:mark])
            made += ids[last:mark]
            made_labels += labels[last:mark]
            last = mark + 1
            closing = after if ids[last : last + len(after)] == after else []
            last += len(closing)
            if task and ids[last : last + len(task)] == task:
                last += len(task)
            made += [*block, *closing, *task]
            safe = len(made)
            made_labels += [IGNORED] * (safe - len(made_labels))
        self._require_plain(conversation, ids[last:])
        return made + ids[last:], made_labels + labels[last:], safe

    def _require_plain(self, conversation: Conversation, ids: Sequence[int]) -> None:
        if any(token in self._reserved for token in ids):
            raise self._reserved_text(conversation)

    def _reserved_text(self, conversation: Conversation) -> SampleError:
        return SampleError(
            "reserved-text",
            f"conversation {conversation.index}: its text holds the name of an image or task token",
            "Take it out of the text.",
        )
