"""Chat templates: a conversation as the text that a tokenizer's Jinja template makes of it.

Templates see and may use what `transformers` gives them in `apply_chat_template`: the filter
`tojson` without HTML escapes, loop controls, `{% generation %}` blocks, `raise_exception`,
`strftime_now`, and the special tokens by name. They come with downloaded tokenizers, so they run in
Jinja's sandbox, in which they can compute text and no more.
"""

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sharding.errors import UsageError
from trainer.data.clean import Rejected
from trainer.packages import data_library

if TYPE_CHECKING:
    import jinja2

REFUSED = "chat_refused"  # the reason of a rejection
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names for one thing, oldest last


class ChatTemplate:
    """A compiled template."""

    def __init__(self, source: str, specials: dict[str, str]) -> None:
        """Compiles `source`; `specials` are the special tokens by name, such as `bos_token`.

        Raises:
          UsageError: the source is not a Jinja template, or Jinja is not installed.
        """
        exceptions = data_library("jinja2.exceptions")
        self._specials = specials
        self._now = datetime.now()
        environment = _environment()
        environment.globals["strftime_now"] = lambda form: self._now.strftime(form)
        try:
            self._template = environment.from_string(source)
        except exceptions.TemplateError as error:
            raise UsageError(f"the chat template cannot be read: {_one_line(error)}") from None

    def render(self, messages: list[dict[str, Any]], now: datetime | None = None) -> str:
        """Returns a conversation as text; `now` is the time that the template is told.

        Raises:
          Rejected: the template refuses the conversation or fails on it.
        """
        self._now = now or datetime.now()
        try:
            return self._template.render(
                messages=[_normalised(message) for message in messages],
                tools=None, documents=None, add_generation_prompt=False, **self._specials,
            )  # fmt: skip
        except Exception as error:  # a template is a program: with odd messages it may raise any
            raise Rejected(REFUSED, f"the chat template refuses it: {_one_line(error)}") from None


def _normalised(message: dict[str, Any]) -> dict[str, Any]:
    """Drops fields that are None, and gives the reasoning of a message under its usual names."""
    known = {name: value for name, value in message.items() if value is not None}
    reasoning = next((known[name] for name in _REASONING if name in known), None)
    if reasoning is None:
        return known
    return {"thinking": reasoning, **known, "reasoning_content": reasoning}


def _environment() -> "jinja2.Environment":
    jinja2 = data_library("jinja2")
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: marks what the assistant says; the text stays as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_unchanged")
            return jinja2.nodes.CallBlock(call, [], [], body, lineno=line)

        def _unchanged(self, caller: Any) -> str:
            return caller()

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: int | None = None,
        separators: tuple[str, str] | None = None, sort_keys: bool = False,
    ) -> str:  # fmt: skip
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )  # fmt: skip

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {text}"
