"""Pillow's images in 8 bits."""

from typing import Any

# of big and little endian files; Pillow before 11 gives 16-bit PNGs as I
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def has_sixteen_bits(image: Any) -> bool:
    """Whether it has 16 bits, or else 8. Raises ValueError for any other image of Pillow."""
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and image.format == "PNG"):
        return True
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}, not of 8 or 16 bits: save it as such")
    return False


def in_eight_bits(image: Any, channels: int) -> Any:
    """The image as "L" for one channel, else as "RGB"; of 16 bits the upper 8.

    `convert` alone cuts every value above 255 off (Pillow 13): a 16-bit image would be white. Raises
    ValueError for whole numbers of 32 bits and floating point, whose range is not known.
    """
    if has_sixteen_bits(image):
        image = image.convert("I").point(lambda value: value / 256)
    return image.convert("L" if channels == 1 else "RGB")
