"""What a flow asks its provider: its templates filled in, and as much of the history as the model's budget holds."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.chats.chat import Message, estimated_tokens, fitting
from app.flows.config import ANSWER_TOKENS, Choice, Flow
from app.flows.run import Failure, FlowFailed, Inputs
from app.flows.templates import compiled
from app.providers.provider import Prompt, PromptMessage

_TOO_LONG = Failure("prompt_too_long", "The message is longer than the model can read; send a shorter one.")
_PLENTY = 1 << 31
_HISTORY = "history"
_NAMES = {"user": "User", "assistant": "Assistant", "system": "System"}


@dataclass(frozen=True, slots=True)
class Asked:
    """The messages of one flow, the same for every choice. `dropped` counts the messages of the history left out."""

    messages: Sequence[PromptMessage]
    dropped: int


def asked(flow: Flow, inputs: Inputs, outputs: Mapping[str, str], *, name: str) -> Asked:
    """Raises FlowFailed where the message alone is more than the model's budget: it is never cut."""
    system, text = compiled(flow.system), compiled(flow.prompt)
    values = {
        "message": inputs.text,
        "language": inputs.language,
        "topK": str(inputs.top_k.get(name, flow.top_k or "")),
        **{f"output.{flow}": output for flow, output in outputs.items()},
        **{f"value.{key}": value for key, value in inputs.values.items()},
    }
    kept = _kept(flow, inputs.history, system.render(values) + text.render(values))
    dropped = len(inputs.history) - len(kept)
    if _HISTORY in system.names | text.names:  # told there, and not once more as messages
        values[_HISTORY], kept = _transcript(kept), ()
    rendered = system.render(values)
    opening = [PromptMessage("system", rendered)] if rendered else []
    past = [PromptMessage(message.role, message.content) for message in kept]
    question = PromptMessage("user", text.render(values), inputs.images if flow.images else ())
    return Asked([*opening, *past, question], dropped)


def prompt(flow: Flow, choice: Choice, asked: Asked, inputs: Inputs, *, name: str, session_id: str) -> Prompt:
    """The call of one choice."""
    wanted = {} if inputs.temperature is None else {"temperature": inputs.temperature}
    return Prompt(
        choice.model,
        asked.messages,
        {**choice.parameters, **wanted},
        max_tokens=flow.max_tokens,
        json_output=flow.output == "json",
        top_k=inputs.top_k.get(name, flow.top_k),
        session_id=session_id,
    )


def memory_id(user_id: str, session_id: str) -> str:
    """What a provider with a memory knows a chat by: users choose their chats' ids, and two may choose the same."""
    return hashlib.sha256(f"{user_id}\0{session_id}".encode()).hexdigest()[:32]


def _kept(flow: Flow, history: Sequence[Message], own: str) -> Sequence[Message]:
    """The newest messages that the model has room for beside what the flow itself says."""
    limit = len(history) if flow.history is None else flow.history
    if flow.context_tokens is None:
        return history if limit >= len(history) else fitting(list(history), limit=limit, budget_tokens=_PLENTY)
    left = flow.context_tokens - estimated_tokens(own) - (flow.max_tokens or ANSWER_TOKENS)
    if left < 0:
        raise FlowFailed(_TOO_LONG)
    return fitting(list(history), limit=limit, budget_tokens=left)


def _transcript(history: Sequence[Message]) -> str:
    return "\n".join(f"{_NAMES[message.role]}: {message.content}" for message in history)
