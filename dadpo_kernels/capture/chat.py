"""Renders conversations with a tokenizer's chat template."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from .messages import check_template_kwargs

_DATE = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")


class ChatTemplate:
    """The chat template of a tokenizer, with options and one date for all conversations.

    Args:
        tokenizer: a tokenizer of transformers.
        kwargs: variables of the template, as `{"enable_thinking": False}`; a record's `chat_template_kwargs` come
            first.
        today: what a template that asks for today's date gets (`strftime_now`, as Llama 3.2's); None is today. A
            capture that goes on after midnight must get the date of its beginning.

    Raises:
        ValueError: the template does not use a variable, or a name is an argument of `apply_chat_template` itself.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None, today: date | None = None) -> None:
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs or {})
        self._today = today or date.today()
        self.asked_for_date = False
        check_template_kwargs("chat_template_kwargs", self.kwargs)
        text = str(tokenizer.chat_template)
        if unknown := [name for name in self.kwargs if not re.search(rf"\b{re.escape(name)}\b", text)]:
            raise ValueError(f"the chat template does not use {', '.join(unknown)}: see its text for its variables")

    @property
    def today(self) -> str | None:
        """The date that the template has asked for, as `2026-11-27`; None if it has not."""
        return self._today.isoformat() if self.asked_for_date else None

    def ids(self, where: str, messages: Sequence[Mapping[str, Any]], record: Mapping[str, Any], **options: Any) -> Any:
        """Token ids of a conversation, a list; with the option `tokenize=False` its text.

        Args:
            where: beginning of an error message.
            messages: the conversation.
            record: may hold `tools` and `chat_template_kwargs`.
            options: of `apply_chat_template`, such as `add_generation_prompt`.

        Raises:
            ValueError: there is no template, it fails (the message has its words), or its date's format is no text, so
                that it cannot be replaced.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{where}: it is a conversation, and the tokenizer has no chat template: use an instruction-tuned "
                "model, give a template with --chat-template (tokenizer.chat_template), or give strings"
            )
        tools, variables = record.get("tools"), {**self.kwargs, **record.get("chat_template_kwargs", {})}
        try:
            text, dates = _DATE.subn(self._date, self.tokenizer.get_chat_template(tools=tools))
            self.asked_for_date |= dates > 0
            if re.search(r"strftime_now\s*\(", text):
                raise ValueError("it asks for the date in a format that is no text, so that it would change every day")
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=text, return_dict=False, **variables, **options
            )
        except Exception as error:  # a template is a program of the tokenizer's author
            words = " ".join(str(error).split())
            raise ValueError(
                f"{where}: the chat template fails ({type(error).__name__}: {words}). Change the messages, or the "
                "template: --chat-template, --chat-template-kwargs"
            ) from None

    def _date(self, call: re.Match) -> str:
        return json.dumps(self._today.strftime(call[1] or call[2] or ""))
