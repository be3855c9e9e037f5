"""Chat templates: the language model's own, fed turns in which each image is followed by its task tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence

IMAGE_TOKEN = "<image>"  # noqa: S105 - a token of the vocabulary

# Rewrites every message before the model's own template sees it: content becomes text that starts with the turn's
# image, its task tokens right behind it. Several images of one turn stay where they are among its words. A plain string
# may hold `<image>` anywhere.
_REWRITE = """\
{%- set ola = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set turn = namespace(images=0, text='', placed='') -%}
{%- if message['content'] is string -%}
{%- if message['role'] == 'assistant' -%}
{%- set turn.text = message['content'] -%}
{%- else -%}
{%- set turn.images = message['content'].count('@IMAGE@') -%}
{%- set turn.placed = message['content'].replace('@IMAGE@', '@BLOCK@') -%}
{%- set turn.text = message['content'].replace('@IMAGE@\\n', '').replace('\\n@IMAGE@', '').replace('@IMAGE@', '') -%}
{%- endif -%}
{%- elif message['content'] -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{%- set turn.text = turn.text + part['text'] -%}
{%- set turn.placed = turn.placed + part['text'] -%}
{%- elif part['type'] in ('image', 'image_url') -%}
{%- set turn.images = turn.images + 1 -%}
{%- set turn.placed = turn.placed + '@BLOCK@' + '\\n' -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if turn.images > 1 -%}
{%- set content = turn.placed -%}
{%- else -%}
{%- set content = '@BLOCK@' * turn.images + ('\\n' if turn.images else '') + turn.text -%}
{%- endif -%}
{%- set ola.messages = ola.messages + [dict(message, content=@CONTENT@)] -%}
{%- endfor -%}
{%- set messages = ola.messages %}"""
_SYSTEM = """\
{%- if messages and messages[0]['role'] != 'system' -%}
{%- set messages = [{'role': 'system', 'content': @SYSTEM@}] + messages -%}
{%- endif -%}"""
# For a language model without a template: the turns of LLaVA-1.5's prompts.
_PLAIN = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- message['content'] + ' ' -}}
{%- elif message['role'] == 'user' -%}
{{- 'USER: ' + message['content'] + ' ' -}}
{%- else -%}
{{- 'ASSISTANT: ' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def make_chat_template(
    own: str | None,
    task_tokens: Sequence[str],
    *,
    system: str | None = None,
    image: str = IMAGE_TOKEN,
    structured: bool = False,
) -> str:
    """Adapt a template, or write plain turns where `own` is None.

    Content may be structured or a plain string that holds `<image>`. `system` is said first where a conversation has no
    system message of its own. `image` is what the model's prompts hold for one image; `structured` says that `own`
    reads content as a list of parts.
    """
    block = image + "".join(task_tokens)
    content = "[{'type': 'text', 'text': content}]" if structured and own else "content"
    template = _REWRITE.replace("@CONTENT@", content).replace("@BLOCK@", block).replace("@IMAGE@", IMAGE_TOKEN)
    template += own or _PLAIN
    if system is None:
        return template
    # in ASCII with escapes, which Jinja reads as JSON does
    return _SYSTEM.replace("@SYSTEM@", json.dumps(system)) + template
