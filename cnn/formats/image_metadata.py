"""Removes metadata from image files: text, EXIF, XMP and colour profiles may be damaged while pixels are intact."""

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_JPEG_METADATA = (*range(0xE1, 0xEE), 0xEF, 0xFE)  # APP1 to APP13, APP15, COM; APP0 and APP14 define colours


def pixels_only(data: bytes) -> bytes:
    """Returns a PNG, JPEG or WebP file without its metadata.

    Data of other formats, and everything after a damaged part, stay as they are.
    """
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(_JPEG):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    return data


def _png(data: bytes) -> bytes:
    """Keeps chunks of pixels; a chunk is length, type, content and CRC (PNG, Third Edition, section 5.3)."""
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if data[at + 4 : at + 8] in _PNG_PIXELS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _jpeg(data: bytes) -> bytes:
    """Drops segments of metadata up to the first scan; a segment is marker, length, content (ITU T.81, annex B)."""
    kept, at = [_JPEG], len(_JPEG)
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in (0xDA, 0xFF):
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] not in _JPEG_METADATA:
            kept.append(data[at:end])
        at = end
    return b"".join((*kept, data[at:]))


def _webp(data: bytes) -> bytes:
    """Drops chunks of metadata; a chunk is type, little-endian length, content, padding to even (RFC 9649, 2.3)."""
    kept, at = [], 12
    while at + 8 <= len(data):
        end = at + 8 + (length := int.from_bytes(data[at + 4 : at + 8], "little")) + length % 2
        if data[at : at + 4] not in (b"EXIF", b"XMP ", b"ICCP"):
            kept.append(data[at:end])
        at = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body
