"""What may be in memory at once on one replica, whoever asks for it."""

from app.chats.allowance import Allowance
from app.settings import Settings

# Bodies of uploads in memory at once, in largest ones. Each is there twice while it is read and parsed.
_UPLOADS = 3
# Conversations of other programs that are read at once.
_READINGS = 4
# Chats that are exported at once: each holds a connection and a snapshot.
_EXPORTS = 3
# Files that are imported at once: of each some megabytes are in memory, twice.
_IMPORTS = 3
# Bodies of more than a megabyte that are compared at once: their parts are in memory, some ten times as large.
_HISTORIES = 3


class Allowances:
    """One for each thing that is large."""

    def __init__(self, settings: Settings) -> None:
        self.uploads = Allowance(_UPLOADS * settings.upload_limit, of="uploads", each=settings.upload_limit)
        self.readings = Allowance(_READINGS, of="readings of sources", each=1)
        self.exports = Allowance(_EXPORTS, of="exports", each=1)
        self.imports = Allowance(_IMPORTS, of="imports", each=1)
        self.histories = Allowance(_HISTORIES, of="histories", each=1)
