"""A picture as clients send it, in the bodies of upload-image and process-message."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from app.errors import Invalid
from app.text import clean, validated

Declared = Annotated[str, Field(max_length=255)]

# Control characters, and those that turn the direction of writing: "exe.gnp" shown as "png.exe".
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffd]")
_NAME_LENGTH = 200


class ImageData(BaseModel):
    """A picture. `data` is base64 or a data: URL; `mime` may be left out, but must be right where it is given."""

    model_config = ConfigDict(strict=True)

    data: Annotated[str, Field(min_length=1)]
    mime: Declared | None = None
    name: str | None = None


class _Inline(BaseModel):
    image_data: ImageData


@dataclass(frozen=True, slots=True)
class Upload:
    """A picture on its way to a decoder: ASCII text, what it was declared to be, and its cleaned name."""

    text: str
    mime: str
    name: str | None


def upload_of(given: ImageData) -> Upload:
    """Raises Invalid where it cannot be a picture at all; the decoder says the rest."""
    if not given.data.isascii():
        raise Invalid("image_invalid", "data is not base64.")
    return Upload(given.data, clean(given.mime or ""), _cleaned(given.name or ""))


def inline_upload(image_data: Mapping[str, Any]) -> Upload:
    """The `image_data` of a message. Raises Invalid."""
    return upload_of(validated(_Inline, {"image_data": image_data}).image_data)


def _cleaned(name: str) -> str | None:
    """The last part of a path, without what hides in names, on one line; None where nothing is left."""
    last = re.split(r"[/\\]", name[-10 * _NAME_LENGTH :])[-1]
    return " ".join(_HIDDEN.sub("", last).split())[-_NAME_LENGTH:].strip() or None
