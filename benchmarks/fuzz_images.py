# SPDX-License-Identifier: Apache-2.0
"""Damaged pictures of all formats through `load_image`: a picture in RGB or a MediaError, nothing else.

    python benchmarks/fuzz_images.py --count 150000

Each is a small valid picture with bytes changed, cut out, doubled or cut off at the end, by (seed, number). Prints the
counts, the slowest and the peak of memory; exit code 1 if anything else came out.
"""

from __future__ import annotations

import argparse
import io
import resource
import time
import warnings
from collections import Counter

import numpy as np
from PIL import Image

from embedrl_verl.data.media import load_image
from embedrl_verl.errors import MediaError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "LA")


def pictures() -> list[bytes]:
    """A valid picture of each format in each mode that it has."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    found = []
    for kind in FORMATS:
        for mode in MODES:
            file = io.BytesIO()
            image = Image.fromarray(noise)
            try:
                (image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)).save(file, kind)
            except (OSError, ValueError):  # a format without this mode
                continue
            found.append(file.getvalue())
    return found


def damaged(picture: bytes, rng: np.random.Generator) -> bytes:
    """The picture with one to six faults, most of them near its head."""
    content = bytearray(picture)
    for _ in range(int(rng.integers(1, 7))):
        if len(content) < 8:
            break
        place = int(len(content) * rng.random() ** 2)
        how = rng.integers(5)
        if how < 2:
            content[place] = int(rng.integers(256))
        elif how == 2:
            del content[place : place + int(rng.integers(1, 32))]
        elif how == 3:
            content[place:place] = content[place : place + int(rng.integers(1, 32))]
        else:
            content = content[: max(place, 1)]
    return bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    whole, counts, slowest = pictures(), Counter[str](), 0.0
    for number in range(arguments.count):
        content = damaged(whole[number % len(whole)], np.random.default_rng([arguments.seed, number]))
        started = time.perf_counter()
        try:
            image = load_image(content, None)
            counts["pictures" if image.mode == "RGB" else f"mode {image.mode}"] += 1
        except MediaError:
            counts["MediaError"] += 1
        except Exception as error:  # whatever it is, the run looks for it
            counts[f"{type(error).__name__}: {error} (number {number})"] += 1
        slowest = max(slowest, time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{len(whole)} pictures, {dict(counts)}, slowest {slowest:.2f} s, peak {peak} MiB")
    return int(bool(set(counts) - {"pictures", "MediaError"}))


if __name__ == "__main__":
    raise SystemExit(main())
