"""Render the prompts of a model with its chat template, in the model's tool-call format."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from rest_rl.config import AUTO
from rest_rl.data.samples import ToolSample, get_calls, to_message_call
from rest_rl.errors import UserError
from rest_rl.formats import (
    FORMATS,
    OpenedThinkFormat,
    ToolFormat,
    demonstration_format,
    detect_template_format,
    get_format,
)
from rest_rl.formats.opened_think import OPENING_TAGS, THINK_SUFFIX
from rest_rl.response import ToolCall

FALLBACK_FORMAT = "hermes"
"""The format for models whose chat template uses no known format; a system message describes this one."""
PROBE_MESSAGE = {"role": "user", "content": "probe of the user message"}
PROBE_SYSTEM_MESSAGE = {"role": "system", "content": "probe of the system message"}
PROBE_RESULT = "probe of the first result"
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe", "description": "?", "parameters": {"type": "object", "properties": {}}},
}
SPECIFIED = "set by rest.format"
DESCRIBED_IN_SYSTEM = "a system message describes it, unless the prompts already do"
RESULTS_NOTE = "\n\nThe results of calls follow in <tool_response> </tool_response>."
"""Appended to the instructions of a format that has no notation for results."""
TEMPLATE_ERRORS = (TemplateError, TypeError, KeyError, AttributeError, ValueError)
"""Exceptions that a chat template can raise; templates are programs, and errors in them are not only TemplateErrors."""
Messages = list[dict[str, Any]]


class PromptLayout:
    """Renders the prompts of one model with its chat template, in one tool-call format.

    A template that writes calls in the chosen format receives messages and tools as they are. For any other template, a
    system message describes the tools and the format, and calls and results in the history become text.

    Args:
        tokenizer: The tokenizer of the model, with a chat template.
        tool_format: A format or its name.
        variables: Variables for the template, such as enable_thinking.
        context: The context length of the model in tokens; None if it is unknown.

    Raises:
        UserError: The tokenizer has no chat template, or one that ignores the text of messages.
    """

    def __init__(
        self,
        tokenizer: Any,
        tool_format: str | ToolFormat = "toolrl",
        variables: Mapping[str, Any] | None = None,
        context: int | None = None,
    ) -> None:
        self.context = context
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the tokenizer has no chat template",
                remedy="use an instruct model, or set tokenizer.chat_template",
            )
        self.tokenizer, self.format, self.variables = tokenizer, get_format(tool_format), dict(variables or {})
        # Templates have no metadata, so we render test messages (probes) to see whether text, tools and system messages
        # appear in the prompt, and how the prompt ends. If the template fails on a probe, the result is "".
        self._probe = self._render_or_empty([PROBE_MESSAGE])
        if self._probe and PROBE_MESSAGE["content"] not in self._probe:
            raise UserError(
                "the chat template ignores the text of messages, as some templates of vision models do",
                remedy="set tokenizer.chat_template to a template for text",
            )

    def render(self, sample: ToolSample) -> str:
        """Return the prompt up to the start of the response.

        The prompt starts with the beginning-of-sequence token if the tokenizer adds one, even if the template does not.

        Raises:
            UserError: The template fails on the sample.
        """
        messages = [  # prompts never contain the reasoning of earlier turns
            {key: value for key, value in message.items() if key != "reasoning_content"} for message in sample.messages
        ]
        tools = [] if sample.tools_in_prompt else list(sample.tools)
        text = self._render_messages(messages, tools, f"sample {sample.id!r}", are_final=sample.tools_in_prompt)
        # The prompt is tokenized with add_special_tokens=False, so it must contain BOS exactly once.
        return self.bos_prefix + text.removeprefix(self.bos_prefix)

    def _render_messages(
        self, messages: Messages, tools: Sequence[Any] = (), what: str = "tool results", *, are_final: bool = False
    ) -> str:
        if not (are_final or self.is_native):
            messages, tools = messages_to_text(messages, tools, self.format), []
        if not self._supports_system:
            messages = _move_system_into_user(messages)
        try:
            return self._apply_template(messages, tools)
        except TEMPLATE_ERRORS as error:
            try:  # Mistral's templates accept only ids of nine letters and digits
                return self._apply_template(assign_call_ids(messages), tools)
            except TEMPLATE_ERRORS:
                raise UserError(
                    f"the chat template failed on {what} ({type(error).__name__}: {error})",
                    remedy="complete the row (tools need name, description and parameters)",
                ) from error

    def render_results(self, names: Sequence[str], results: Sequence[Mapping[str, Any]], ends: Collection[str]) -> str:
        """Return the text between a response, which ended with one of `ends`, and the start of the next response.

        It contains the results of the response's calls of the tools `names`, given as tool messages. A rollout appends
        it to the tokens that the model sampled, so nothing that it sampled is rendered again.

        Raises:
            UserError: The template fails on results, or changes the text before them.
        """
        said = {
            "role": "assistant",
            "content": "",
            "tool_calls": [to_message_call(ToolCall(name, {})) for name in names],
        }
        probes = [{**result, "content": PROBE_RESULT} for result in results]
        marked, text = (self._render_messages([PROBE_MESSAGE, said, *map(dict, after)]) for after in (probes, results))
        place = marked.find(PROBE_RESULT)
        end = max((at + len(end) for end in ends if (at := marked.rfind(end, 0, place)) >= 0), default=-1)
        if place < 0 or end < 0 or not text.startswith(marked[:place]):
            problem = "the chat template cannot continue a conversation after tool results"
            expected = f"the results after the end of the response ({', '.join(ends) or 'no end token'})"
            raise UserError(problem, expected, "choose another rest.format, or another chat template")
        return text[end:]

    def count_tokens(self, sample: ToolSample) -> int:
        """Return the number of prompt tokens; 0 if the template fails (then `render` raises the error)."""
        try:
            return len(self.tokenizer(self.render(sample), add_special_tokens=False)["input_ids"])
        except ValueError:
            return 0

    @cached_property
    def is_native(self) -> bool:
        """Whether the chat template itself describes tools and writes calls in the format of this layout.

        If a chat template writes calls in your own format, set the attribute `is_native = True` on that format.
        """
        inner = self.format.inner if isinstance(self.format, OpenedThinkFormat) else self.format
        is_known = detect_tokenizer_format(self.tokenizer) == inner.name or getattr(inner, "is_native", False)
        return is_known and self._render_or_empty([PROBE_MESSAGE], [PROBE_TOOL]) not in ("", self._probe)

    @cached_property
    def opens_think(self) -> bool:
        """Whether a prompt ends with an open think block, inside which the response then starts."""
        return self._probe.rstrip().endswith(OPENING_TAGS)

    @cached_property
    def closes_think(self) -> bool:
        """Whether a prompt ends with a closed think block, which means that the model should not think."""
        return self._probe.rstrip().endswith(("</think>", "[/THINK]"))

    @cached_property
    def expects_reasoning(self) -> bool:
        """Whether the chat template knows think blocks and prompts leave them open to the model, as Qwen3's do."""
        return not self.closes_think and any(tag in str(self.tokenizer.chat_template) for tag in OPENING_TAGS)

    @cached_property
    def asks_for_reasoning(self) -> bool:
        """Whether the description of the format asks for a think block, which gold responses may lack."""
        return any(tag in self.format.instructions([]) for tag in OPENING_TAGS)

    @cached_property
    def bos_prefix(self) -> str:
        """The beginning-of-sequence token if the tokenizer adds it to every text, otherwise an empty string."""
        bos = self.tokenizer.bos_token
        return bos if bos and self.tokenizer("x")["input_ids"][:1] == [self.tokenizer.bos_token_id] else ""

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """The special tokens of the tokenizer, which recognizes them even in the text of messages."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return frozenset(filter(None, (*added, *self.tokenizer.all_special_tokens)))

    @cached_property
    def _supports_system(self) -> bool:
        # Gemma 2's template raises an error on system messages, and others ignore them.
        return PROBE_SYSTEM_MESSAGE["content"] in self._render_or_empty([PROBE_SYSTEM_MESSAGE, PROBE_MESSAGE])

    def _render_or_empty(self, messages: Messages, tools: Sequence[Any] = ()) -> str:
        try:
            return self._apply_template(messages, tools)
        except TEMPLATE_ERRORS:
            return ""

    def _apply_template(self, messages: Messages, tools: Sequence[Any]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, add_generation_prompt=True, tokenize=False, **self.variables
        )


def messages_to_text(messages: Messages, tools: Sequence[Any], tool_format: ToolFormat) -> Messages:
    """Return messages without tool roles: the system message describes the tools, and calls and results become text.

    Consecutive messages of the same role are merged, because some templates require alternating roles.
    """
    needs_words = tools or not tool_format.parse("", spans=False).untagged_answer
    inner = tool_format.inner if isinstance(tool_format, OpenedThinkFormat) else tool_format
    observation = getattr(inner, "observation", None)
    texts: Messages = []
    if needs_words:
        explained = tool_format.instructions(tools) + ("" if observation else RESULTS_NOTE)
        texts.append({"role": "system", "content": explained})
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "assistant":
            content = _render_assistant(message, tool_format)
        elif role == "tool":
            role, content = "user", observation(content) if observation else wrap_tool_response(content)
        if texts and texts[-1]["role"] == role != "assistant":
            texts[-1]["content"] += f"\n\n{content}"
        else:
            texts.append({"role": role, "content": content})
    return texts


def wrap_tool_response(content: str) -> str:
    """Wrap a tool result in `<tool_response>` tags, as the chat templates of Hermes and Qwen do."""
    return f"<tool_response>\n{content}\n</tool_response>"


def _render_assistant(message: Mapping[str, Any], tool_format: ToolFormat) -> str:
    # The message as the model would have written it, without reasoning. Raises ValueError if the format cannot write
    # the calls.
    calls, content = get_calls(message), message.get("content") or ""
    written = demonstration_format(tool_format.inner if isinstance(tool_format, OpenedThinkFormat) else tool_format)
    try:
        return written.render(None, calls, content or None)
    except ValueError:  # the text contains tags of the format
        return written.render(None, calls, None) if calls else content


def _move_system_into_user(messages: Messages) -> Messages:
    # Moves all system messages into the first other message if that is the user's, else into a new user message.
    said = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    if not said:
        return messages
    if others and others[0]["role"] == "user":
        said.append(others.pop(0)["content"])
    return [{"role": "user", "content": "\n\n".join(said)}, *others]


def assign_call_ids(messages: Messages) -> Messages:
    """Replace call ids, in calls and results, by ids of nine letters and digits, which Mistral's templates require."""
    # A result takes the new id of the waiting call whose old id it has, or else of the first waiting call.
    named: Messages = []
    waiting: list[tuple[str, str]] = []  # (id as given, new id) of the calls without a result yet
    made = 0
    for message in messages:
        changes: dict[str, Any] = {}
        if calls := message.get("tool_calls"):
            waiting = [(str(call.get("id")), f"call{made + i:05d}") for i, call in enumerate(calls)]
            made += len(calls)
            changes = {"tool_calls": [{**call, "id": new} for call, (_, new) in zip(calls, waiting, strict=True)]}
        elif message["role"] == "tool":
            given = str(message.get("tool_call_id"))
            answered = next((pair for pair in waiting if pair[0] == given), next(iter(waiting), ("", "call00000")))
            waiting = [pair for pair in waiting if pair is not answered]
            changes = {"tool_call_id": answered[1]}
        named.append({**message, **changes})
    return named


def detect_tokenizer_format(tokenizer: Any) -> str | None:
    """Return the name of the format that the tokenizer's chat template uses for calls; None if it is unknown."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):  # named templates
        template = template.get("tool_use") or template.get("default") or ""
    return detect_template_format(template or "")


def resolve_format(
    name: str, tokenizer: Any, variables: Mapping[str, Any] | None = None, *, keeps_prompts: bool = False
) -> tuple[str, str]:
    """Resolve the name of a format; `auto` becomes the format of the chat template.

    Returns:
        The name, with `+think` added if the template opens the think block, and the reason for the choice.

    Raises:
        UserError: The name has `+think` but the template opens no think block, or the name is `auto` and prompts are
            kept as published; the format that such prompts request must be named.
    """
    if keeps_prompts and name == AUTO:
        raise UserError(
            "kept prompts need an explicit format, the one that they request",
            remedy="pass --format (rest.format): toolrl for ToolRL and API-Bank, pythonic for ToolACE",
        )
    found = detect_tokenizer_format(tokenizer)
    base, asks_think = name.removesuffix(THINK_SUFFIX), name.endswith(THINK_SUFFIX)
    if base == AUTO:
        base = found or FALLBACK_FORMAT
        why = "from the chat template" if found else f"the chat template uses no known format, so {DESCRIBED_IN_SYSTEM}"
    elif base in FORMATS and found != base:
        shows = f"uses {found}" if found else "uses no known format"
        why = f"{SPECIFIED}; the chat template {shows}, so {DESCRIBED_IN_SYSTEM}"
    else:
        why = SPECIFIED
    opens = PromptLayout(tokenizer, base, variables).opens_think
    if asks_think and not opens:
        raise UserError(
            f"the format is {name!r}, but the model's chat template does not open a think block",
            f"{base!r}",
            "remove +think, or set model.chat_template_kwargs so that the template opens one",
        )
    return (base + THINK_SUFFIX, f"{why}; it opens the think block") if opens else (base, why)
