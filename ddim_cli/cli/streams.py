"""Print to a stdout whose encoding lacks a character, as that of a pipe on Windows does."""

from __future__ import annotations

import codecs
import sys

# One column wide each, as the original, so that tables stay aligned.
_LOOK_ALIKES = {"├": "|", "└": "`", "│": "|", "─": "-", "±": "~"}
_HANDLER = "ddim-look-alike"


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of `codecs`: a look-alike; a file name's odd bytes as they are; else an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    end = error.start + 1
    if character in _LOOK_ALIKES:
        return _LOOK_ALIKES[character], end
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), end
    return character.encode("ascii", "backslashreplace").decode("ascii"), end


def never_fail_to_encode() -> None:
    """Have stdout replace what its encoding lacks, unless the user has chosen how (``PYTHONIOENCODING=ascii:replace``).

    Python's stderr escapes such characters by itself.
    """
    if getattr(sys.stdout, "errors", None) in ("strict", "surrogateescape") and hasattr(sys.stdout, "reconfigure"):
        codecs.register_error(_HANDLER, _replace)
        sys.stdout.reconfigure(errors=_HANDLER)
