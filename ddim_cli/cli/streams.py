"""Standard output whose encoding lacks a character that is written, as a pipe on Windows does."""

from __future__ import annotations

import codecs
import sys

# Of what commands print, the characters that have a look-alike in ASCII; each is one column wide, as the original.
_LOOK_ALIKES = {"├": "|", "└": "`", "│": "|", "─": "-", "±": "~"}
_HANDLER = "ddim-look-alike"


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of `codecs`: a look-alike; a file name's odd bytes as they are; else an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start]
    end = error.start + 1
    if found in _LOOK_ALIKES:
        return _LOOK_ALIKES[found], end
    if "\udc80" <= found <= "\udcff":
        return bytes([ord(found) - 0xDC00]), end
    return found.encode("ascii", "backslashreplace").decode("ascii"), end


def never_fail_to_encode() -> None:
    """Have stdout replace what its encoding lacks, unless the user has chosen how (``PYTHONIOENCODING=ascii:replace``).

    Python's stderr escapes such characters by itself.
    """
    if getattr(sys.stdout, "errors", None) in ("strict", "surrogateescape") and hasattr(sys.stdout, "reconfigure"):
        codecs.register_error(_HANDLER, _replace)
        sys.stdout.reconfigure(errors=_HANDLER)
