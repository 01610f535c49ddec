"""A checkpoint's chat template: from a conversation to the segments of its prompt.

The user's text stays text. A special string in it (``<image>``, ``<|im_start|>``, any control token
of the tokenizer) is data; only what the template itself writes is control. (The reference does not
tell them apart.) So before rendering, each character of the user's text at which a special string
begins, or at which one could arise together with its neighbours, is replaced by a private character
that occurs nowhere else; after rendering the prompt is cut at the remaining special strings, and
the characters are put back. Text without special strings or parts of them is rendered as it is, so
the prompt is the reference's (``apply_chat_template`` of transformers).

The published templates write the media of a message in front of its text. With ``order="given"``,
media behind some text pass the template as private characters of that text, one each, and become
placeholders afterwards.

A published template is rendered in this process. Any other is an untrusted program, and runs in a
process of its own with limits on time and memory, which is kept for the next prompt.
"""

import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlx_onevision.config.json_fields import is_array, is_object
from mlx_onevision.errors import CheckpointError, ContextOverflowError, RequestError
from mlx_onevision.files import read_json, refuse_lfs_pointer
from mlx_onevision.prompt.messages import Message, sources
from mlx_onevision.subprocesses import MISSING, BoundedProcess, find_interpreter

Order = Literal["template", "given"]

LONG_TEXT = 1 << 19  # characters; half of what a template may write

# The prompt of the original checkpoints, which come without a template of their own: conversation
# "qwen_1_5" of the original repository, with its system message.
ORIGINAL = """\
{% if messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\
{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% for block in message['content'] | selectattr('type', 'equalto', 'image') %}\
{{ '<image>\\n' }}\
{% endfor %}
{% for block in message['content'] | selectattr('type', 'equalto', 'video') %}\
{{ '<video>\\n' }}\
{% endfor %}
{% for block in message['content'] | selectattr('type', 'equalto', 'text') %}\
{{ block['text'] }}\
{% endfor %}
{{ '<|im_end|>\\n' }}\
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}\
{% endif %}
"""

PUBLISHED = frozenset(
    {
        # ORIGINAL, above
        "91511f6a5ac78f79cc3a8e0b7d0a324e1920e2bd715256da8161f9bc09890d52",
        # llava-hf, chat_template.json ("<|im_start|>user <image>"), also the demo model's; and the
        # same with its newlines written as "\\n"
        "fbf77862dcdda46840b6da02767d651eadad3582310e40fed04dc7594a0a80dd",
        "5ac9bd4e60a2be4f9df039e4d9328b91c2a957be3cb08686b9702ad77d9965ed",
        # transformers' conversion script ("<|im_start|>user" and a newline); and as above
        "f741044c80eb2fb78a62fe765fe9564e0170cf359becbac1298b5c1ce2e25b41",
        "c4c649e6a9be146f169b1391fb85e3fdc4f42b61cd4e023d0acee3bda39dd266",
    }
)
"""SHA-256 of the templates that are trusted to run in this process."""

SECONDS = 2.0  # for an untrusted template to render one prompt
MEMORY = 1 << 29  # bytes of its process, the interpreter included

# Private characters, to which no text gives a meaning: those that replace characters of special
# strings, and those that stand for media between text.
PLACEHOLDER_CHARS = range(0xF0000, 0x10FFFE)
MEDIA_CHARS = range(0xE000, 0xF900)


class Segment(NamedTuple):
    """A part of the prompt: a special string that the template wrote, or plain text.

    control : whether it is such a special string.
    learned : whether its tokens count in the loss, in a conversation that is trained on.
    """

    text: str
    control: bool
    learned: bool = False


class ChatTemplate:
    """A chat template, compiled when it is first used. From any thread.

    name : what errors call it.
    variables : the tokenizer's named tokens, which a template may write, such as ``eos_token``.
    """

    def __init__(
        self, source: str, name: str = "chat template", variables: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        self.name = name
        self._variables = dict(variables or {})
        self._renderer: Callable[[Mapping[str, Any]], str] | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> "ChatTemplate":
        """The template of a checkpoint: chat_template.jinja, else chat_template.json, else the one
        in tokenizer_config.json, else that of the original checkpoints.

        Raises:
            CheckpointError: naming the file that cannot be read.
        """
        named = {
            **(read_json(folder / "special_tokens_map.json") or {}),
            **(read_json(folder / "tokenizer_config.json") or {}),
        }
        variables = {
            name: text
            for name, token in named.items()
            if name.endswith("_token") and (text := _content(token)) is not None
        }
        file = folder / "chat_template.jinja"
        if file.is_file():
            refuse_lfs_pointer(file)
            try:
                return cls(file.read_text(encoding="utf-8"), file.name, variables)
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{file.name} cannot be read ({error})") from None
        for name in ("chat_template.json", "tokenizer_config.json"):
            source = _chosen((read_json(folder / name) or {}).get("chat_template"), name)
            # The template of the language model alone, which some checkpoints still have, has no
            # images and takes a message as one string.
            if source is not None and ("image" in source or name == "chat_template.json"):
                return cls(source, f"chat_template of {name}", variables)
        return cls(ORIGINAL, "the built-in chat template", variables)

    def with_source(self, source: str) -> "ChatTemplate":
        """Another template for the same tokenizer."""
        return ChatTemplate(source, "the chat template", self._variables)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, as the reference's ``apply_chat_template`` writes it.

        messages : in the one form of :func:`~mlx_onevision.prompt.messages.normalise_messages`;
            media need no source.

        Raises:
            RequestError: when the template refuses the conversation.
            ContextOverflowError: when it exceeds a limit because of a very long text.
            CheckpointError: when it is not a template, fails, or exceeds a limit.
        """
        render = self._renderer = self._renderer or _renderer(self.source, self.name)
        variables = {
            **self._variables,
            "messages": [_visible(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render(variables)
        except CheckpointError:
            length = sum(map(len, sources(messages, "text")))
            if length < LONG_TEXT:
                raise
            raise ContextOverflowError(
                f"the text has {length:,} characters, more than a prompt can have; "
                "use a shorter text"
            ) from None

    def close(self) -> None:
        """Ends the process of an untrusted template; another prompt starts another one."""
        self._renderer = None

    def segments(
        self,
        messages: Sequence[Message],
        specials: Iterable[str],
        order: Order = "template",
        answering: bool = True,
    ) -> list[Segment]:
        """The same prompt in segments: those of ``specials`` that the template wrote, and the text
        between them.

        order : "template" leaves the media of a message where the template writes them, joined the
            segments are what :meth:`render` returns; "given" keeps them where they stand in it.
        answering : whether the beginning of an answer stands at the end.
        """
        if order == "given":
            return self._given_order(messages, specials, answering)
        if order != "template":
            raise RequestError(f"order is {order!r}; it must be template or given")
        texts = [self.source, *sources(messages, "text")]
        guard = _Guard([special for special in specials if special], texts)
        hidden = [_visible(message, guard.hide) for message in messages]
        return guard.split(self.render(hidden, answering))

    def _given_order(
        self, messages: Sequence[Message], specials: Iterable[str], answering: bool
    ) -> list[Segment]:
        marks = _private(MEDIA_CHARS, ("image", "video"), [self.source, *sources(messages, "text")])
        tokens = {mark: f"<{kind}>" for kind, mark in marks.items()}
        written = _written_into_text(messages, marks)
        segments = self.segments(written, specials, answering=answering)
        cut = re.compile(f"([{''.join(tokens)}])")
        return [
            Segment(tokens.get(part, part), part in tokens or segment.control)
            for segment in segments
            for part in cut.split(segment.text)
            if part
        ]


def _renderer(source: str, name: str) -> Callable[[Mapping[str, Any]], str]:
    if sha256(source.encode(errors="replace")).hexdigest() not in PUBLISHED:
        return _Isolated(source, name).render
    from mlx_onevision.prompt.sandbox import SandboxedTemplate

    return SandboxedTemplate(source, name).render


class _Isolated:
    """An untrusted template, rendered by :func:`mlx_onevision.prompt.sandbox.answer` in a process
    that ends when this is forgotten.
    """

    def __init__(self, source: str, name: str) -> None:
        self._source, self._name = source, name
        self._lock = threading.Lock()
        self._process: BoundedProcess | None = None

    def render(self, variables: Mapping[str, Any]) -> str:
        request = {"source": self._source, "name": self._name, "variables": variables}
        with self._lock:
            # The process is kept for the next prompt only if it answers; after an error it is dead.
            process, self._process = self._process or self._start(), None
            try:
                answer = process.ask(request)
            except TimeoutError:
                raise CheckpointError(
                    f"{self._name} failed (it takes longer than {SECONDS:g} s)"
                ) from None
            except EOFError:
                raise CheckpointError(f"{self._name} failed (it takes too much memory)") from None
            self._process = process
        if "text" in answer:
            return answer["text"]
        raise (RequestError if answer["kind"] == "request" else CheckpointError)(answer["error"])

    def _start(self) -> BoundedProcess:
        interpreter = find_interpreter()
        if interpreter is None:
            raise CheckpointError(
                f"{self._name} is not a published one, and is rendered by {MISSING}"
            )
        module = "mlx_onevision.prompt.sandbox"
        return BoundedProcess(interpreter, module, memory=MEMORY, seconds=SECONDS)


class _Guard:
    """Replaces characters of special strings in the user's text, and puts them back."""

    def __init__(self, specials: Sequence[str], texts: Sequence[str]) -> None:
        # At one position the longest wins, as in the tokenizer.
        ordered = sorted(set(specials), key=lambda special: (-len(special), special))
        choice = "|".join(map(re.escape, ordered)) or "(?!)"
        self._special = re.compile(f"({choice})")
        self._begins = re.compile(f"(?=(?:{choice}))")  # overlapping ones too
        self._inner = {special[1:-1] for special in ordered}
        self._heads = {special[:n] for special in ordered for n in range(1, len(special))}
        self._tails = {special[n:] for special in ordered for n in range(1, len(special))}
        self._longest = len(ordered[0]) if ordered else 0
        self._replaced = _private(PLACEHOLDER_CHARS, sorted(set("".join(ordered))), texts)
        self._original = {ord(mark): character for character, mark in self._replaced.items()}

    def hide(self, text: str) -> str:
        """``text`` with private characters, so that no special string can arise from it."""
        places = {match.start() for match in self._begins.finditer(text)}
        core = text.strip()  # a template may trim
        for part, offset in ((text, 0), (core, text.find(core))):
            if not part:
                continue
            near = range(1, min(len(part), self._longest - 1) + 1)
            if any(part[:n] in self._tails for n in near) or (
                len(part) < self._longest and any(part in inner for inner in self._inner)
            ):
                places.add(offset)
            if any(part[-n:] in self._heads for n in near):
                places.add(offset + len(part) - 1)
        if not places:
            return text
        characters = list(text)
        for place in places:
            characters[place] = self._replaced[characters[place]]
        return "".join(characters)

    def split(self, prompt: str) -> list[Segment]:
        """A rendered prompt in segments, the characters put back."""
        return [
            Segment(part.translate(self._original), index % 2 == 1)
            for index, part in enumerate(self._special.split(prompt))
            if part
        ]


def _private(characters: range, names: Sequence[str], texts: Iterable[str]) -> dict[str, str]:
    """A private character for each name, of those that no text contains. RequestError where they do
    not suffice.
    """
    used = set[str]().union(*texts)
    free = (chr(code) for code in characters if chr(code) not in used)
    found = dict(zip(names, free, strict=False))
    if len(found) < len(names):
        raise RequestError("the text uses all private characters; leave some of them out")
    return found


def _visible(message: Message, rewrite: Callable[[str], str] = str) -> dict[str, Any]:
    """A message as a template gets it: of media the kind alone, never a path or an address."""
    blocks = [
        {"type": "text", "text": rewrite(block["text"])}
        if block["type"] == "text"
        else {"type": block["type"]}
        for block in message["content"]
    ]
    return {"role": message["role"], "content": blocks}


def _written_into_text(messages: Sequence[Message], marks: Mapping[str, str]) -> list[Message]:
    """The conversation with media behind text written into the text, so that a template, which
    writes a message's media first, leaves them where they stand. As templates write it, a newline
    follows each.

    marks : the character that stands for a medium of each kind.
    """
    ordered: list[Message] = []
    for message in messages:
        blocks: list[dict[str, Any]] = []
        for block in message["content"]:
            if block["type"] != "text" and not (blocks and blocks[-1]["type"] == "text"):
                blocks.append(block)
                continue
            written = block["text"] if block["type"] == "text" else marks[block["type"]] + "\n"
            if blocks and blocks[-1]["type"] == "text":
                blocks[-1] = {"type": "text", "text": blocks[-1]["text"] + written}
            else:
                blocks.append({"type": "text", "text": written})
        ordered.append({"role": message["role"], "content": blocks})
    return ordered


def _content(token: Any) -> str | None:
    """A token of tokenizer_config.json, which is a string or an object that holds one."""
    token = token.get("content") if is_object(token) else token
    return token if isinstance(token, str) else None


def _chosen(given: Any, name: str) -> str | None:
    """A template string, or the one called ``default`` of a list of named ones."""
    if is_array(given):
        named = [entry for entry in given if is_object(entry)]
        given = next((e.get("template") for e in named if e.get("name") == "default"), None)
    if given is not None and not isinstance(given, str):
        raise CheckpointError(f"{name} has a chat_template that is not a string")
    return given
