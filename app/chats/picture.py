"""A picture as data: what one may be, and what became of it. Pure, because the decoder's process imports it too."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What a picture may cost. `pixels` is asked of its header, before anything is decoded.

    The result has at most `side` pixels on its longer side and `size` bytes: a larger picture is scaled down.
    """

    pixels: int = 40_000_000
    side: int = 2048
    size: int = 3_670_016
    seconds: float = 10


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that was decoded and encoded anew, upright and without metadata; `sha256` is of `data`, in hex."""

    mime: str
    width: int
    height: int
    sha256: str
    data: bytes
