"""A corpus of files with wrong names, damaged, oversized or unusual, and the expected result for each."""

import struct
import zlib

import numpy as np
from PIL import Image

from tests.data_prep.images.encoded_images import by_pillow, chunk, encoded, oriented, png

AS_PILLOW, BY_UPPER_BITS, WITHOUT_METADATA = "as Pillow", "by its upper bits", "as Pillow, without its metadata"
READ = (AS_PILLOW, BY_UPPER_BITS, WITHOUT_METADATA)
"""The expected results for files that are not skipped."""


def corpus(image: Image.Image) -> dict[str, tuple[bytes, str]]:
    """File name: content, and the expected result: one of READ or the reason for a skip."""
    jpeg, png_, gif = encoded(image, "JPEG"), encoded(image, "PNG"), encoded(image, "GIF")
    webp, tiff, bmp = encoded(image, "WEBP"), encoded(image, "TIFF"), encoded(image, "BMP")
    return (
        truncated(jpeg, png_, gif, webp, tiff, bmp, image)
        | not_images(image)
        | other_forms(image)
        | oversized(png_)
        | damaged(jpeg, png_, webp, image)
    )


def truncated(
    jpeg: bytes, png_: bytes, gif: bytes, webp: bytes, tiff: bytes, bmp: bytes, image: Image.Image
) -> dict[str, tuple[bytes, str]]:
    deflated = encoded(image, "TIFF", compression="tiff_adobe_deflate")
    files = {
        "jpeg_half.jpg": jpeg[: len(jpeg) // 2],
        "jpeg_header_only.jpg": jpeg[:200],
        "jpeg_magic_only.jpg": jpeg[:4],
        "jpeg_no_end.jpg": jpeg[:-2],
        "progressive_half.jpg": encoded(image, "JPEG", progressive=True)[:2000],
        "png_half.png": png_[: len(png_) // 2],
        "png_header_only.png": png_[:33],
        "png_signature_only.png": png_[:8],
        "gif_half.gif": gif[: len(gif) // 2],
        "gif_in_palette.gif": gif[:100],
        "webp_half.webp": webp[: len(webp) // 2],
        "webp_last_byte.webp": webp[:-1],
        "webp_header_only.webp": webp[:12],
        "tiff_half.tif": tiff[: len(tiff) // 2],
        "tiff_lost_directory.tiff": deflated[: len(deflated) // 2],
        "bmp_half.bmp": bmp[: len(bmp) // 2],
        "avif_half.jpg": encoded(image, "AVIF")[:2000],
        "jpeg2000_half.jpg": encoded(image, "JPEG2000")[:2000],
        "pixmap_half.ppm": encoded(image, "PPM")[:2000],
    }
    return {name: (content, "truncated") for name, content in files.items()} | {
        "png_no_end.png": (png_[:-12], AS_PILLOW)  # all its pixels are there
    }


def not_images(image: Image.Image) -> dict[str, tuple[bytes, str]]:
    files = {
        "one_byte.jpg": b"\xff",
        "text.jpg": b"Not Found\n",
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"><circle r="5"/></svg>',
        "document.jpg": b"%PDF-1.7\n1 0 obj << >> endobj\n%%EOF\n",
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n",
        "phone.jpg": struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + bytes(500),
        "noise.jpg": np.random.default_rng(3).bytes(4000),
        "zeros.png": bytes(4000),
        "sound.webp": b"RIFF" + struct.pack("<I", 40) + b"WAVEfmt " + bytes(32),
        "archive.jpg": b"PK\x03\x04" + bytes(100),
        "targa.jpg": encoded(image, "TGA"),  # has no signature that would tell it from noise
    }
    return {name: (content, "not a picture") for name, content in files.items()} | {"nothing.jpg": (b"", "empty")}


def other_forms(image: Image.Image) -> dict[str, tuple[bytes, str]]:
    """Unusual, but valid."""
    pixels = np.asarray(image)
    gray16 = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 200)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels.astype(">u2") * 200)
    clear = image.copy()
    clear.putalpha(Image.fromarray(pixels[:, :, 0]))
    frames = [image.rotate(90 * turn) for turn in range(3)]
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    inks = encoded(image.convert("CMYK"), "JPEG")
    adobe = inks.index(b"Adobe") + 11
    float_pixels = Image.fromarray(pixels[:, :, 0].astype(np.float32))
    two_pages = {"save_all": True, "append_images": frames[1:]}
    files = {
        "png_named.jpg": encoded(image, "PNG"),
        "jpeg_named.png": encoded(image, "JPEG"),
        "webp_named.gif": encoded(image, "WEBP"),
        "avif_named.jpg": encoded(image, "AVIF"),
        "jpeg2000_named.jpg": encoded(image, "JPEG2000"),
        "inks.jpg": inks,
        "inks_converted.jpg": inks[:adobe] + b"\x02" + inks[adobe + 1 :],
        "color16.png": png(*image.size, lines, bits=16),
        "one_bit.png": encoded(image.convert("1"), "PNG"),
        "one_bit.tif": encoded(image.convert("1"), "TIFF", compression="group4"),
        "palette_clear.png": encoded(palette, "PNG", transparency=3),
        "palette_clears.png": encoded(palette, "PNG", transparency=bytes(range(256))),
        "gray_alpha.png": encoded(clear.convert("LA"), "PNG"),
        "alpha.png": encoded(clear, "PNG"),
        "alpha.webp": encoded(clear, "WEBP"),
        "gray.jpg": encoded(image.convert("L"), "JPEG"),
        "moving.gif": encoded(frames[0], "GIF", **two_pages),
        "moving.webp": encoded(frames[0], "WEBP", **two_pages),
        "moving.png": encoded(frames[0], "PNG", **two_pages),
        "pages.tif": encoded(frames[0], "TIFF", **two_pages),
        "float.tif": encoded(float_pixels, "TIFF"),
        "whole_numbers.tif": encoded(Image.fromarray(pixels[:, :, 0].astype(np.int32)), "TIFF"),
        "inks.tif": encoded(image.convert("CMYK"), "TIFF"),
        "lab.tif": encoded(Image.frombytes("LAB", image.size, pixels.tobytes()), "TIFF"),
        "jpeg_within.tif": encoded(image, "TIFF", compression="jpeg"),
        "turned.jpg": encoded(image, "JPEG", exif=oriented(6)),
        "mirrored.png": encoded(image, "PNG", exif=oriented(5)),
        "orientation_99.jpg": encoded(image, "JPEG", exif=oriented(99)),
        "bad_exif.jpg": encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage"),
        "junk_behind.jpg": encoded(image, "JPEG") + b"junk" * 500,
        "two_images.jpg": encoded(image, "MPO", **two_pages),
        "icon.bmp": encoded(image, "ICO", sizes=[(48, 36), (16, 16)]),
        "palette.bmp": encoded(palette, "BMP"),
        "upside_down.bmp": upside_down(encoded(image, "BMP")),
        "one_pixel.png": encoded(image.resize((1, 1)), "PNG"),
        "one_pixel.jpg": encoded(image.resize((1, 1)), "JPEG"),
        "column.jpg": encoded(image.resize((1, 5000)), "JPEG"),
        "row.png": encoded(image.resize((5000, 1)), "PNG"),
        "text_pixels.ppm": b"P3\n2 2\n255\n" + b" ".join(b"%d" % value for value in range(12)),
    }
    return {name: (content, AS_PILLOW) for name, content in files.items()} | {
        "gray16.png": (encoded(gray16, "PNG"), BY_UPPER_BITS),
        "gray16.tif": (encoded(gray16, "TIFF"), BY_UPPER_BITS),
    }


def upside_down(bmp: bytes) -> bytes:
    """A BMP whose rows are stored top-down: its height is negative."""
    (height,) = struct.unpack_from("<i", bmp, 22)
    return bmp[:22] + struct.pack("<i", -height) + bmp[26:]


def oversized(png_: bytes) -> dict[str, tuple[bytes, str]]:
    jpeg = encoded(Image.new("RGB", (16, 16)), "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    many_scans = encoded(Image.new("RGB", (3000, 3000)), "JPEG", progressive=True)
    last = many_scans.rindex(b"\xff\xda")
    zeros = zlib.compress(bytes(100_000_000), 9)
    files = {
        "png_50000.png": png(50_000, 50_000, b"0"),
        "png_2_billion.png": png(2**31 - 1, 2**31 - 1, b"0"),
        "jpeg_65500.jpg": jpeg[:frame] + struct.pack(">HH", 65500, 65500) + jpeg[frame + 4 :],
        "gif_65535.gif": b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b",\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;",
        "bmp_bomb.bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 70, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
        "scans.jpg": many_scans[:last] + 2000 * many_scans[last:-2] + many_scans[-2:],
    }
    metadata = {  # the limit is on pixels
        "text_bomb.png": png_[:33] + chunk(b"zTXt", b"a\0\0" + zeros) + png_[33:],
        "text_bomb_behind.png": png_[:-12] + chunk(b"zTXt", b"a\0\0" + zeros) + png_[-12:],
        "international_text_bomb.png": png_[:33] + chunk(b"iTXt", b"a\0\1\0\0\0" + zeros) + png_[33:],
        "profile_bomb.png": png_[:33] + chunk(b"iCCP", b"a\0\0" + zeros) + png_[33:],
    }
    found = {name: (content, "too large") for name, content in files.items()}
    return (
        found
        | {name: (content, WITHOUT_METADATA) for name, content in metadata.items()}
        | {
            # within the limit of pixels, with next to none behind the header
            "png_13000.png": (png(13_000, 13_000, b"0"), "truncated"),
        }
    )


def damaged(jpeg: bytes, png_: bytes, webp: bytes, image: Image.Image) -> dict[str, tuple[bytes, str]]:
    def changed(content: bytes, place: int, by: int = 0xFF) -> bytes:
        return content[:place] + bytes([content[place] ^ by]) + content[place + 1 :]

    scan, quantization, frame = jpeg.index(b"\xff\xda"), jpeg.index(b"\xff\xdb"), jpeg.index(b"\xff\xc0")
    tables = jpeg.index(b"\xff\xc4")
    idat = png_.index(b"IDAT")
    flipped = {f"flipped_{step}.jpg": changed(jpeg, scan + 40 + 37 * step, 1 << step % 8) for step in range(8)}
    files = {
        "bad_tables.jpg": changed(jpeg, tables + 6),
        "bad_quantization.jpg": changed(jpeg, quantization + 4),
        "no_quantization.jpg": jpeg[:quantization] + jpeg[frame:],
        "no_components.jpg": changed(jpeg, frame + 9, jpeg[frame + 9]),
        "arithmetic_in_name.jpg": changed(jpeg, frame + 1, 0xC0 ^ 0xC9),
        "lossless_in_name.jpg": changed(jpeg, frame + 1, 0xC0 ^ 0xC3),
        "bad_crc.png": changed(png_, idat - 5),
        "bad_pixels_crc.png": changed(png_, len(png_) - 13),
        "bad_deflate.png": png_[: idat + 200] + bytes(200) + png_[idat + 400 :],
        "bad_bits.png": png(4, 4, b"\0" * 16, bits=3),
        "no_palette.png": png(4, 4, b"\0" * 20, color=3),
        "no_width.png": png(0, 4, b"\0" * 20),
        "bad_webp.webp": webp[:30] + bytes(len(webp) - 30),
        "bad_tiff.tif": b"II*\0" + struct.pack("<I", 8) + b"\xff" * 60,
    }
    # What Pillow makes of a damaged file is its own business; ours is to make the same of it, or to skip it.
    return {name: (content, pillows_verdict(content)) for name, content in (files | flipped).items()}


def pillows_verdict(content: bytes) -> str:
    try:
        by_pillow(content)
    except Exception:
        return "damaged"
    return AS_PILLOW
