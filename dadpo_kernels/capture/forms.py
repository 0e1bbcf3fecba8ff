"""The forms in which preference sets are published, converted to one: `{"prompt", "chosen", "rejected"}`."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .messages import TEMPLATE_COLUMNS, content, template_columns

Record = dict[str, Any]
ANSWERS = ("chosen", "rejected")
# Columns that hold the question if there is no `prompt`. The record is a conversation then.
_QUESTIONS = ("question", "query", "instruction", "input")
# Columns of text that are no prompt, whatever they hold.
_METADATA = {
    *("category", "chosen_model", "dataset", "hash", "id", "index", "lang", "language", "license", "model", "name"),
    *("prompt_id", "rejected_model", "score", "source", "split", "subset", "tag", "tags", "task", "type", "uuid"),
}
_SHAREGPT_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **{"observation": "tool", "tool": "tool"},
}
_PROMPT_TWICE = "pairs whose answers began with the prompt again, which was taken away there"


class Form(NamedTuple):
    """A form of records: the columns that tell it, and the function that converts a record."""

    columns: frozenset[str]
    convert: Callable[[str, Record, Counter], Record]


def as_pair(
    where: str, record: Any, notes: Counter | None = None, columns: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Convert a record to `{"prompt", "chosen", "rejected"}`, or to `{"prompt", "completion"}` if it has one answer.

    The values are all strings or all lists of messages; `tools` and `chat_template_kwargs` are kept. These forms are
    accepted, see docs/data.md for examples:

    - `prompt, chosen, rejected` (TRL), conversational or standard. Without a prompt, or with the prompt in front of
      both answers again, what both begin with is the prompt, as in TRL's `extract_prompt`;
    - the question in `question`, `query`, `instruction` or `input`, the last two also together, with `system` and
      `history` (Alpaca and LLaMA-Factory, orca_dpo_pairs): a conversation;
    - `conversations` of `{"from", "value"}` with two answers (ShareGPT), `messages` with `rejected_response`
      (ms-swift), `input` with `preferred_output` and `non_preferred_output` (OpenAI), `chosen_response` and
      `rejected_response` (Argilla);
    - several answers with `rank` (Nectar) or `overall_score` (UltraFeedback): the best and the worst;
    - one answer: `prompt, completion` (TRL), `messages`, `conversations`, or `instruction` or `question` with
      `output`, `response` or `answer`.

    Args:
        where: place of the record, for messages.
        notes: counts what was changed, by a text that says what.
        columns: names to use instead of the record's, `{"prompt": "question"}`. An empty one says that there is no
            such column.

    Raises:
        ValueError: the record has another form.
    """
    notes = Counter() if notes is None else notes
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a {type(record).__name__} is not an object with prompt, chosen and rejected")
    record = _renamed(where, {k: v for k, v in record.items() if v is not None}, columns or {})
    form = next((form for form in _FORMS if form.columns <= record.keys()), None)
    if form is None:
        missing = [name for name in ("prompt", *ANSWERS) if name not in record]
        raise ValueError(
            f"{where}: missing {', '.join(missing)}. A pair needs prompt, chosen and rejected; the columns are "
            f"{', '.join(record) or 'none'}. Name them with --columns prompt=...,chosen=...,rejected=..."
        )
    pair = form.convert(where, record, notes)
    if "completion" in pair and record.keys() & {*ANSWERS}:
        raise ValueError(f"{where}: {' and '.join(record.keys() & {*ANSWERS})} without the other: a pair needs both")
    if len({type(part) for part in pair.values()}) > 1:
        given = ", ".join(f"{name} is a {type(part).__name__}" for name, part in pair.items())
        raise ValueError(f"{where}: {given}; a pair has strings only, or lists of messages only")
    return pair | template_columns(where, record)


def _renamed(where: str, record: Record, columns: Mapping[str, str]) -> Record:
    for name, source in columns.items():
        if source and source not in record:
            raise ValueError(
                f"{where}: no column {source!r} for --columns {name}={source}: it has {', '.join(record)}"
            )
    used = {source for source in columns.values() if source}
    kept = {k: v for k, v in record.items() if k not in columns and k not in used}
    if "" in columns.values():  # what could be the prompt is none
        kept = {name: value for name, value in kept.items() if name in (*ANSWERS, *TEMPLATE_COLUMNS)}
    return kept | {name: record[source] for name, source in columns.items() if source}


# ---- pairs ------------------------------------------------------------------------------------------------------


def _two_answers(where: str, record: Record, notes: Counter) -> Record:
    """TRL's forms, and those with the question in another column."""
    prompt, chosen, rejected = (content(where, name, record.get(name)) for name in ("prompt", *ANSWERS))
    asked, question = _question(where, record) if prompt is None else ([], None)
    prompt = question if asked else prompt
    front = _front(where, record)
    if asked or front:
        chosen, rejected = _said("assistant", chosen), _said("assistant", rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        pair = _separated(where, prompt, chosen, rejected)
        return pair | {"prompt": _behind(where, front, pair["prompt"])}

    # Separate the prompt from strings that begin with it.
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        _check_columns(where, record)
        length = len(_shared(chosen, rejected))
        length -= length > 0 and chosen[length - 1] == " "
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    elif isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        begins = chosen.startswith(prompt) and rejected.startswith(prompt)
        if begins and len(prompt.split()) > 1:  # a single word may well be said again
            notes[_PROMPT_TWICE] += 1
            chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    return _with_prompt(where, prompt, chosen, rejected)


def _separated(where: str, prompt: Any, chosen: list[Record], rejected: list[Record]) -> Record:
    """The prompt, and the answers without the messages that both begin with."""
    shared = _shared(chosen, rejected)
    if isinstance(prompt, str):
        if shared and not any(message.get("content") == prompt for message in shared):
            raise ValueError(f"{where}: none of the messages that chosen and rejected share is the prompt")
        prompt = shared or _said("user", prompt or None)
    if prompt is None or (prompt and shared[: len(prompt)] == prompt):  # they may share more turns
        prompt, chosen, rejected = shared, chosen[len(shared) :], rejected[len(shared) :]
    return _with_prompt(where, prompt, chosen, rejected)


def _behind(where: str, front: list[Record], prompt: list[Record]) -> list[Record]:
    """The prompt with `front` before it, unless it begins with a system message of its own."""
    if not front or prompt[: len(front)] == front:
        return prompt
    if prompt[0]["role"] == "system":
        raise ValueError(f"{where}: the column system and the system message of the conversation differ")
    return front + prompt


def _with_prompt(where: str, prompt: Any, chosen: Any, rejected: Any) -> Record:
    if not prompt:
        raise ValueError(
            f"{where}: there is no prompt, and chosen and rejected do not begin with the same one. Name its column "
            "with --columns prompt=..."
        )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _check_columns(where: str, record: Record) -> None:
    """What two answers begin with is the prompt only if no other column can be it."""
    texts = [
        name
        for name, value in record.items()
        if isinstance(value, str | list) and name not in _METADATA and name not in (*ANSWERS, "tools")
    ]
    if texts:
        raise ValueError(
            f"{where}: no column is called prompt, and {', '.join(texts)} may be it: say which with --columns "
            f"prompt={texts[0]}, or --columns prompt= if chosen and rejected begin with the prompt"
        )


def _question(where: str, record: Record) -> tuple[list[str], Any]:
    """The columns that hold the question, and the question."""
    asked = [name for name in _QUESTIONS if record.get(name)]
    if len(asked) > 1 and asked != ["instruction", "input"]:
        raise ValueError(
            f"{where}: {' and '.join(asked)} may both be the prompt: say which with --columns prompt={asked[0]}"
        )
    parts = [content(where, name, record[name]) for name in asked]
    if len(parts) == 2 and not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{where}: instruction and input must both be strings")
    return asked, "\n".join(parts) if len(parts) == 2 else (parts[0] if parts else None)


def _front(where: str, record: Record) -> list[Record]:
    """The messages before the question: `system`, and `history` as pairs of question and answer."""
    system, history = record.get("system"), record.get("history") or []
    messages = _said("system", content(where, "system", system)) if system else []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise ValueError(f"{where}: history is {str(history)[:40]!r}: a list of [question, answer] is needed")
    for turn in history:
        for role, said in zip(("user", "assistant"), turn, strict=True):
            messages += _said(role, content(where, "history", said))
    return messages


def _said(role: str, text: Any) -> Any:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _shared(a: Any, b: Any) -> Any:
    """The common beginning of two conversations or texts, without the last message or character of the shorter one."""
    most = min(len(a), len(b)) - 1
    return a[: next((i for i in range(most) if a[i] != b[i]), max(most, 0))]


def _sharegpt(where: str, record: Record, notes: Counter) -> Record:
    """`conversations` of `{"from", "value"}`, and the answers as such turns or as texts."""

    def turns(column: str) -> list[Record]:
        value = record[column]
        if isinstance(value, str):
            return _said("assistant", value)
        messages = []
        for turn in [value] if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if not isinstance(turn, dict) or "from" not in turn:
                messages.append(turn)
            elif turn["from"] in _SHAREGPT_ROLES:
                messages.append({"role": _SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")})
            else:
                raise ValueError(
                    f"{where}: {column} has a turn from {turn['from']!r}: use one of {', '.join(_SHAREGPT_ROLES)}"
                )
        return content(where, column, messages)

    said = _front(where, {"system": record.get("system")}) + turns("conversations")
    if set(ANSWERS) <= record.keys():
        return _separated(where, said, turns("chosen"), turns("rejected"))
    return _one_answer(where, said)


def _swift(where: str, record: Record, notes: Counter) -> Record:
    """`messages` that end with the chosen answer, and the rejected one in `rejected_response`."""
    whole = _one_answer(where, content(where, "messages", record["messages"]))
    rejected = _said("assistant", content(where, "rejected_response", record["rejected_response"]))
    return {"prompt": whole["prompt"], "chosen": whole["completion"], "rejected": rejected}


def _openai(where: str, record: Record, notes: Counter) -> Record:
    inner = record["input"]
    if not isinstance(inner, dict) or "messages" not in inner:
        raise ValueError(f"{where}: input must be an object with messages")
    answers = {"chosen": record["preferred_output"], "rejected": record["non_preferred_output"]}
    return _two_answers(where, {"prompt": inner["messages"], **answers}, notes)


def _argilla(where: str, record: Record, notes: Counter) -> Record:
    answers = {name: record[f"{name}_response"] for name in ANSWERS}
    return _two_answers(where, record | answers, notes)


def _ranked(answers: str, text: str, score: str, sign: int) -> Callable[[str, Record, Counter], Record]:
    """The best and the worst of several answers: `record[answers]` is a list of `{text, score}`."""

    def convert(where: str, record: Record, notes: Counter) -> Record:
        listed = record[answers]
        if not isinstance(listed, list) or not all(
            isinstance(answer, dict) and isinstance(answer.get(score), int | float) and answer[score] == answer[score]
            for answer in listed
        ):
            raise ValueError(f"{where}: {answers} must be a list of objects with {text} and a number {score}")
        order = sorted(listed, key=lambda answer: sign * answer[score])
        if len(order) < 2 or order[0][score] == order[-1][score]:
            raise ValueError(f"{where}: no two {answers} with different {score}, so none is better")
        pair = {"chosen": order[-1].get(text), "rejected": order[0].get(text)}
        dialog = _dialog(record["prompt"]) if isinstance(record.get("prompt"), str) else None
        kept = {k: v for k, v in record.items() if k != answers}
        if dialog:
            answers_said = {name: _said("assistant", answer) for name, answer in pair.items()}
            return _two_answers(where, kept | {"prompt": dialog} | answers_said, notes)
        return _two_answers(where, kept | pair, notes)

    return convert


def _dialog(text: str) -> list[Record] | None:
    """The messages in Nectar's `\\n\\nHuman: ...\\n\\nAssistant: ...`; None for other texts."""
    if not text.startswith("\n\nHuman: ") or not text.rstrip().endswith("\n\nAssistant:"):
        return None
    messages = []
    for human in text.rstrip().removesuffix("\n\nAssistant:").split("\n\nHuman: ")[1:]:
        question, *answers = human.split("\n\nAssistant: ")
        messages += _said("user", question)
        for answer in answers:
            messages += _said("assistant", answer)
    return messages


# ---- one answer -------------------------------------------------------------------------------------------------


def _one_answer(where: str, messages: Any) -> Record:
    if not isinstance(messages, list) or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: messages must end with an answer of the assistant, after at least one other message"
        )
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _completion(where: str, record: Record, notes: Counter) -> Record:
    prompt, answer = (content(where, name, record[name]) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(answer, list):
        prompt = _said("user", prompt)
    if not prompt:
        raise ValueError(f"{where}: the prompt is empty")
    return {"prompt": prompt, "completion": answer}


def _instruction(answer: str) -> Callable[[str, Record, Counter], Record]:
    def convert(where: str, record: Record, notes: Counter) -> Record:
        asked, question = _question(where, record)
        if not asked:
            raise ValueError(f"{where}: none of {', '.join(_QUESTIONS)} holds a text")
        prompt = _front(where, record) + _said("user", question)
        return {"prompt": prompt, "completion": _said("assistant", content(where, answer, record[answer]))}

    return convert


def _form(columns: Iterable[str], convert: Callable[[str, Record, Counter], Record]) -> Form:
    return Form(frozenset(columns), convert)


# The first whose columns a record has is taken.
_FORMS = (
    _form(("input", "preferred_output", "non_preferred_output"), _openai),
    _form(("conversations",), _sharegpt),
    _form(("messages", "rejected_response"), _swift),
    _form(("chosen_response", "rejected_response"), _argilla),
    _form(ANSWERS, _two_answers),
    _form(("prompt", "answers"), _ranked("answers", "answer", "rank", -1)),
    _form(("instruction", "completions"), _ranked("completions", "response", "overall_score", 1)),
    _form(("prompt", "completion"), _completion),
    _form(
        ("messages",), lambda where, record, notes: _one_answer(where, content(where, "messages", record["messages"]))
    ),
    *(
        _form((question, answer), _instruction(answer))
        for question in _QUESTIONS
        for answer in ("output", "response", "answer")
    ),
)
