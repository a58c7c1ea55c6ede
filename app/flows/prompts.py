"""What a flow asks its provider: its templates filled in, and as much of the history as the model's budget holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.chats.chat import Message, estimated_tokens, fitting
from app.errors import Invalid
from app.flows.config import Choice, Flow
from app.flows.run import Inputs
from app.flows.templates import compiled
from app.providers.provider import Prompt, PromptMessage

# What is kept free for the answer where a flow has a budget but no limit of its own, in tokens.
_ANSWER_TOKENS = 1024
_MOST_MESSAGES = 200
_NAMES = {"user": "User", "assistant": "Assistant", "system": "System"}


@dataclass(frozen=True, slots=True)
class Asked:
    """The messages of one flow, the same for every choice. `dropped` counts the messages of the history left out."""

    messages: Sequence[PromptMessage]
    dropped: int


def asked(flow: Flow, inputs: Inputs, outputs: Mapping[str, str], *, name: str) -> Asked:
    """Raises Invalid where the message alone is more than the model's budget: it is never cut."""
    history = inputs.history[-flow.history :] if flow.history else () if flow.history == 0 else inputs.history
    values = {
        "message": inputs.text,
        "history": _transcript(history),
        "language": inputs.language,
        "topK": str(inputs.top_k.get(name, flow.top_k or "")),
        **{f"output.{flow}": output for flow, output in outputs.items()},
        **{f"value.{key}": value for key, value in inputs.values.items()},
    }
    system, text = compiled(flow.system).render(values), compiled(flow.prompt).render(values)
    kept = _kept(flow, history, system, text)
    opening = [PromptMessage("system", system)] if system else []
    past = [PromptMessage(message.role, message.content) for message in kept]
    question = PromptMessage("user", text, inputs.images if flow.images else ())
    return Asked([*opening, *past, question], len(history) - len(kept))


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


def _kept(flow: Flow, history: Sequence[Message], system: str, text: str) -> Sequence[Message]:
    if flow.context_tokens is None:
        return history
    own = estimated_tokens(system) + estimated_tokens(text) + (flow.max_tokens or _ANSWER_TOKENS)
    if own > flow.context_tokens:
        raise Invalid("message_too_long", "The message is longer than the model can read; send a shorter one.")
    return fitting(list(history), limit=_MOST_MESSAGES, budget_tokens=flow.context_tokens - own)


def _transcript(history: Sequence[Message]) -> str:
    return "\n".join(f"{_NAMES[message.role]}: {message.content}" for message in history)
