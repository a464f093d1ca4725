"""What a file probably is, by its first bytes: a message that names the cause saves an hour."""

from __future__ import annotations

_MAGIC = (
    (b"\x1f\x8b", "it is gzip-compressed; unpack it first"),
    (b"PK\x03\x04", "it is a zip archive; unpack it first (a torch checkpoint is one too)"),
    (b"PK\x05\x06", "it is an empty zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7z archive"),
    (b"\xfd7zXZ\x00", "it is xz-compressed; unpack it first"),
    (b"BZh", "it is bzip2-compressed; unpack it first"),
    (b"(\xb5/\xfd", "it is zstd-compressed; unpack it first"),
    (b"version https://git-lfs", "it is a git-LFS pointer, not the file itself; run: git lfs pull"),
    (b"\x80\x02", "it is a Python pickle, which may run code when loaded"),
    (b"\x80\x03", "it is a Python pickle, which may run code when loaded"),
    (b"\x80\x04", "it is a Python pickle, which may run code when loaded"),
    (b"\x80\x05", "it is a Python pickle, which may run code when loaded"),
    (b"\x7fELF", "it is a program"),
    (b"ptrt", "it is a TensorRT plan"),
)
_HTML = (b"<!doctype", b"<html", b"<?xml", b"<head")


def cause_of(head: bytes) -> str:
    """Why a file with these first bytes cannot be what it should be; empty where nothing speaks against it."""
    if not head:
        return "it is empty; the copy or the export did not finish"
    if not head.strip(b"\0"):
        return "it holds nothing but zeros"
    for magic, cause in _MAGIC:
        if head.startswith(magic):
            return cause
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it first"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_HTML):
        return "it is a web page, such as an error page of a download"
    return ""
