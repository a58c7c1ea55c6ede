"""The table `images`: pictures that users sent, as their decoder encoded them anew.

The same picture is stored once per user. It is known by the hash of what is stored: encoding is deterministic, so the
same upload gives the same bytes, and so does one that differs in its metadata only, of which nothing is kept, not even
in a hash. Other settings or another version of Pillow may encode differently; then a picture is stored once more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from app.chats.decoders import Decoders
from app.chats.picture import Picture
from app.chats.uploads import Upload, inline_upload
from app.errors import NotFound
from app.expiry import Rows
from app.postgres import retry_conflicts
from app.wall import Wall

_COLUMNS = "id, mime, width, height, bytes, encode(sha256, 'hex') as sha256, name"
_SAVE = f"""
insert into images (id, user_id, sha256, mime, width, height, bytes, name, data)
values ($1, $2, decode($3, 'hex'), $4, $5, $6, $7, $8, $9)
on conflict (user_id, sha256) do update set updated_at = now(), name = coalesce(excluded.name, images.name)
returning {_COLUMNS}
"""
# One without a user is for whoever knows its id, which is random.
_FIND = f"select {_COLUMNS} from images where id = $1 and user_id in ($2, '')"
# In one statement with the mark, so that retention cannot take the picture away in between.
_READ = """
update images set sent = true where id = $1 and user_id in ($2, '')
returning mime, width, height, encode(sha256, 'hex') as sha256, data
"""
# A piece of retention: with the largest pictures more would take too long for one statement.
_PIECE = 100


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A row without its bytes; `bytes` says how many they are, `sha256` is their hash in hex."""

    id: UUID
    mime: str
    width: int
    height: int
    bytes: int
    sha256: str
    name: str | None


class Images:
    """Rows are at most `Limits.size` bytes. They are written before the message that names them, in a statement of
    their own: one that no message came to name stays, until retention removes it."""

    def __init__(self, wall: Wall, decoders: Decoders) -> None:
        self._wall = wall
        self._decoders = decoders

    async def accept_inline(self, image_data: Mapping[str, Any], *, user_id: str) -> StoredImage:
        """The `image_data` of a message, checked and stored. Raises as `accept`."""
        return await self.accept(inline_upload(image_data), user_id=user_id)

    async def accept(self, upload: Upload, *, user_id: str) -> StoredImage:
        """Decode, encode anew and store a picture; the same one again gets the same id.

        Raises Invalid for what is no picture or too large a one, Unavailable where it cannot be decoded or stored now.
        """
        picture = await self._decoders.develop(upload.text, upload.mime, user_id=user_id)
        return await retry_conflicts(lambda: self._save(picture, user_id=user_id, name=upload.name))

    async def _save(self, picture: Picture, *, user_id: str, name: str | None) -> StoredImage:
        about = (picture.sha256, picture.mime, picture.width, picture.height, len(picture.data))
        async with self._wall.connection() as connection:
            row = await connection.fetchrow(_SAVE, uuid4(), user_id, *about, name, picture.data)
        assert row is not None
        return StoredImage(**row)

    async def find(self, image_id: str, *, user_id: str) -> StoredImage:
        """What a message may name. Raises NotFound for an id that is unknown, malformed or another user's."""
        return StoredImage(**await self._row(_FIND, image_id, user_id))

    async def read(self, image_id: str, *, user_id: str) -> Picture:
        """The picture itself, for the prompt of a message, which keeps it for good. Raises NotFound as `find`."""
        return Picture(**await self._row(_READ, image_id, user_id))

    async def _row(self, query: str, image_id: str, user_id: str) -> Mapping[str, Any]:
        async with self._wall.connection() as connection:
            row = await connection.fetchrow(query, _uuid(image_id), user_id)
        if row is None:
            raise NotFound("image_unknown", "There is no image with this id.")
        return dict(row)


def _uuid(image_id: str) -> UUID:
    try:
        return UUID(image_id)
    except ValueError:
        # The nil id is nobody's, so that a malformed one is as unknown as any other.
        return UUID(int=0)


def images_expiring(keep_s: float) -> Rows:
    """Pictures that were uploaded so long ago, and that no message came to name since."""
    return Rows("images", "updated_at", keep_s, "not sent", _PIECE)
