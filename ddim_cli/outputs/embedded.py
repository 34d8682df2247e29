"""Texts inside WebP and JPEG files: XMP for how a picture was made, EXIF for what other image tools read.

XMP is a property ``picture`` of the namespace `NAMESPACE`, whose value is the sidecar's text. A segment of a JPEG has
room for 64 KiB; what is longer goes on in further ones, as the XMP specification (part 3, section 1.1.3.1) lays it out.
"""

from __future__ import annotations

import hashlib
import struct
from xml.etree import ElementTree

from PIL import Image

NAMESPACE = "urn:ddim-cli:"
_NOTE = "http://ns.adobe.com/xmp/note/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
# How a segment of a JPEG begins that is XMP, that goes on with it, and that is EXIF.
_XMP, _MORE, EXIF = b"http://ns.adobe.com/xap/1.0/\0", b"http://ns.adobe.com/xmp/extension/\0", b"Exif\0\0"
_IN_A_SEGMENT = 65533
MOST_EXIF = _IN_A_SEGMENT - len(EXIF)
# Hash, length of the whole, and offset of this part.
_PART = struct.Struct(">32sLL")
_IN_A_PART = 65400
_EXIF_POINTER, _USER_COMMENT, _LONG, _UNDEFINED = 0x8769, 0x9286, 4, 7
_UNICODE = b"UNICODE\0"


def packet(text: str) -> bytes:
    """XMP with a text that is JSON. XML has no signs for two characters, which JSON can write otherwise."""
    for sign, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("\r", "&#13;")):
        text = text.replace(sign, escaped)
    text = text.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")
    return _packet(f' xmlns:ddim="{NAMESPACE}"', f"<ddim:picture>{text}</ddim:picture>")


def _packet(attributes: str, inside: str) -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF xmlns:rdf="{_RDF}"><rdf:Description rdf:about=""{attributes}>{inside}</rdf:Description></rdf:RDF>'
        '</x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def jpeg_segments(text: str) -> bytes:
    """The segments of a JPEG that hold ``text`` as XMP."""
    whole = packet(text)
    if len(_XMP) + len(whole) <= _IN_A_SEGMENT:
        return _segment(_XMP + whole)
    name = hashlib.md5(whole, usedforsecurity=False).hexdigest().upper()
    first = _packet(f' xmlns:xmpNote="{_NOTE}" xmpNote:HasExtendedXMP="{name}"', "")
    parts = (
        _segment(_MORE + _PART.pack(name.encode(), len(whole), start) + whole[start : start + _IN_A_PART])
        for start in range(0, len(whole), _IN_A_PART)
    )
    return b"".join([_segment(_XMP + first), *parts])


def _segment(data: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data


def text_of(image: Image.Image) -> str | None:
    """The text that `packet` or `jpeg_segments` has put into a picture; None where there is none."""
    if image.format == "WEBP":
        return _property(image.info.get("xmp", b""), NAMESPACE, "picture")
    segments = [data for name, data in getattr(image, "applist", ()) if name == "APP1"]
    first = next((data[len(_XMP) :] for data in segments if data.startswith(_XMP)), b"")
    text = _property(first, NAMESPACE, "picture")
    if text is None and (name := _property(first, _NOTE, "HasExtendedXMP")) is not None:
        text = _property(_joined(segments, name.encode()), NAMESPACE, "picture")
    return text


def _joined(segments: list[bytes], name: bytes) -> bytes:
    """The parts of extended XMP in the order of their offsets."""
    parts = {}
    for data in segments:
        if data.startswith(_MORE) and len(data) > len(_MORE) + _PART.size:
            owner, _, start = _PART.unpack_from(data, len(_MORE))
            if owner == name:
                parts[start] = data[len(_MORE) + _PART.size :]
    return b"".join(parts[start] for start in sorted(parts))


def _property(xmp: bytes, namespace: str, name: str) -> str | None:
    """A property of XMP: an element, or an attribute, as other programs may write it anew."""
    try:
        text = xmp.decode().lstrip("\ufeff").strip("\0")
        # XMP has no types of documents, and what they could define is not to be trusted.
        if not text or "<!" in text:
            return None
        root = ElementTree.fromstring(text)
    except (ValueError, ElementTree.ParseError):
        return None
    wanted = f"{{{namespace}}}{name}"
    for element in root.iter():
        if element.tag == wanted:
            return element.text
        if wanted in element.attrib:
            return element.attrib[wanted]
    return None


def user_comment(text: str) -> bytes:
    """EXIF with ``text`` as its UserComment, in UTF-16 with the higher byte first, as the web UIs write and read it."""
    comment = _UNICODE + text.encode("utf-16-be")
    # Two directories of one entry each, of which the first points to the second; behind them the comment.
    return b"".join(
        [
            struct.pack(">2sHL", b"MM", 42, 8),
            struct.pack(">HHHLLL", 1, _EXIF_POINTER, _LONG, 1, 26, 0),
            struct.pack(">HHHLLL", 1, _USER_COMMENT, _UNDEFINED, len(comment), 44, 0),
            comment,
        ]
    )


def comment_of(image: Image.Image) -> str | None:
    """The text that `user_comment` has put into a picture; None where there is none."""
    comment = image.getexif().get_ifd(_EXIF_POINTER).get(_USER_COMMENT)
    if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
        return None
    try:
        return comment[len(_UNICODE) :].decode("utf-16-be")
    except UnicodeDecodeError:
        return None
