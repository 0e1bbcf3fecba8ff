"""Renders conversations with a tokenizer's chat template."""

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

from .messages import check_template_kwargs


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
        self._tokenizer = tokenizer
        self._kwargs = dict(kwargs or {})
        self._today = today or date.today()
        self.asked_for_date = False
        check_template_kwargs("chat_template_kwargs", self._kwargs)
        template = str(tokenizer.chat_template)
        if unknown := [name for name in self._kwargs if not re.search(rf"\b{re.escape(name)}\b", template)]:
            raise ValueError(f"the chat template does not use {', '.join(unknown)}: see its text for its variables")

    @property
    def today(self) -> str | None:
        """The date that the template has asked for, as `2026-11-27`; None if it has not."""
        return self._today.isoformat() if self.asked_for_date else None

    def ids(
        self, where: str, messages: Sequence[Mapping[str, Any]], record: Mapping[str, Any], **options: Any
    ) -> list:
        """Token ids of a conversation.

        Args:
            where: beginning of an error message.
            messages: the conversation.
            record: may hold `tools` and `chat_template_kwargs`.
            options: `add_generation_prompt`, or `tokenize=False` for the text.

        Raises:
            ValueError: there is no template, or it fails; the message has its words.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"{where}: it is a conversation, and the tokenizer has no chat template: use an instruction-tuned "
                "model, give a template with --chat-template (tokenizer.chat_template), or give strings"
            )
        variables = {"strftime_now": self._strftime, **self._kwargs, **record.get("chat_template_kwargs", {})}
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=record.get("tools"), return_dict=False, **variables, **options
            )
        except Exception as error:  # a template is a program of the tokenizer's author
            words = " ".join(str(error).split())
            raise ValueError(
                f"{where}: the chat template fails ({type(error).__name__}: {words}). Change the messages, or the "
                "template: --chat-template, --chat-template-kwargs"
            ) from None

    def _strftime(self, form: str) -> str:
        self.asked_for_date = True
        return datetime.combine(self._today, time()).strftime(form)
