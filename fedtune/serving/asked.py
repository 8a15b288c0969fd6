"""What a client may ask, in OpenAI's words, within bounds; keys that are not known here are passed over, as
clients send many."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedtune.validation import in_words

MOST_MESSAGES = 256
MOST_CHARACTERS = 200_000  # of a message or a prompt


class Asked(BaseModel):
    """A message or table of a request."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Part(Asked):
    type: Literal["text"]
    text: str = Field(max_length=MOST_CHARACTERS)


class Message(Asked):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = Field(None, max_length=MOST_CHARACTERS)

    @property
    def plain(self) -> dict[str, Any]:
        """As the chat template reads it."""
        said = self.content or ""
        text = said if isinstance(said, str) else "\n".join(part.text for part in said)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Asked):
    include_usage: bool = False


class Sampling(Asked):
    """How an answer is to be written. Without a temperature it is greedy, as in the scores of a run."""

    model: str = Field("", max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = Field(None, max_length=256)
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        said = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text[:256] for text in said[:4] if text)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)


class TextRequest(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str]

    @property
    def text(self) -> str:
        """Raises ValueError for several prompts, or for too long a one."""
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if len(texts) != 1 or len(texts[0]) > MOST_CHARACTERS:
            raise ValueError(f"prompt: expected one text of {MOST_CHARACTERS:,} characters or less")
        return texts[0]


def read_request(cls: type[Sampling], body: bytes) -> Any:
    """A request from its bytes. Raises ValueError with a sentence."""
    try:
        return cls.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the request"
        raise ValueError(f"{place[:120]}: expected {in_words(first['msg'])[:200]}") from None
