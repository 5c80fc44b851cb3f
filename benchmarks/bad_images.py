"""Damage valid images of every format at random and decode them: each must be decoded or reported as bad.

    python benchmarks/bad_images.py --mutations 5000

Decoding runs in a separate process with bounded memory, so that a crash, a hang (60 s without an image) or excessive
memory is reported with the image that caused it. Exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import collections
import io
import multiprocessing
import random
import resource
import sys
import time
from multiprocessing.connection import Connection

import numpy as np
from PIL import Image

from tokbench.data.decoding import ImageError, decode

GIBIBYTE = 2**30


def seeds() -> dict[str, bytes]:
    """Small valid files in every supported format, in several modes and compressions."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: list[tuple[str, str, Image.Image, dict[str, object]]] = [
        ("jpeg", "JPEG", colour, {"exif": exif}),
        ("progressive jpeg", "JPEG", colour, {"progressive": True}),
        ("cmyk jpeg", "JPEG", colour.convert("CMYK"), {}),
        ("png", "PNG", colour, {}),
        ("palette png", "PNG", colour.convert("P"), {"transparency": 0}),
        ("16-bit png", "PNG", Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {}),
        ("webp", "WEBP", colour, {}),
        ("animated webp", "WEBP", colour, {"save_all": True, "append_images": [colour.rotate(90)]}),
        ("animated gif", "GIF", colour, {"save_all": True, "append_images": [colour.rotate(90)]}),
        ("bmp", "BMP", colour, {}),
        ("tiff", "TIFF", colour, {}),
        ("lzw tiff", "TIFF", colour, {"compression": "tiff_lzw"}),
        ("jpeg tiff", "TIFF", colour, {"compression": "jpeg"}),
        ("ppm", "PPM", colour, {}),
    ]
    found = {}
    for name, form, image, options in kinds:
        file = io.BytesIO()
        image.save(file, form, **options)
        found[name] = file.getvalue()
    return found


def mutate(content: bytes, dice: random.Random) -> bytes:
    """Damage a file one to four times: truncate, change bytes, flip bits, insert, delete or repeat bytes."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        size = max(1, len(data))
        at = dice.randrange(min(size, 64) if dice.random() < 0.5 else size)
        kind = dice.choice(["cut", "set", "flip", "insert", "delete", "repeat"])
        if kind == "cut":
            del data[dice.randrange(size) :]
        elif kind == "set":
            data[at : at + dice.choice([1, 2, 4])] = dice.choice([b"\0", b"\xff", b"\xff" * 4, dice.randbytes(2)])
        elif kind == "flip" and data:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == "insert":
            data[at:at] = dice.randbytes(dice.randint(1, 16))
        elif kind == "delete":
            del data[at : at + dice.randint(1, 16)]
        else:
            data[at:at] = data[at : at + 32]
    return bytes(data)


def outcome(content: bytes) -> str:
    """`decoded`, `bad`, or a description of what must not happen."""
    try:
        image = decode(io.BytesIO(content), "mutant")
    except ImageError as error:
        return "bad" if error.reason and "\n" not in str(error) else f"unclear reason {str(error)!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "decoded" if image.mode in ("L", "RGB") and min(image.size) else f"mode {image.mode}, size {image.size}"


def _serve(pipe: Connection, memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    while content := pipe.recv_bytes():
        pipe.send((outcome(content), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def try_all(mutations: int, seed: int = 0, patience: float = 60.0) -> tuple[collections.Counter[str], list[str], int]:
    """(count of each outcome, descriptions of failures, peak memory in KiB) of `mutations` mutants."""
    dice, counts, surprises, most = random.Random(seed), collections.Counter[str](), [], 0
    files = list(seeds().items())
    context = multiprocessing.get_context("fork")
    process, ours = None, None
    for number in range(mutations):
        if process is None or ours is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, 8 * GIBIBYTE), daemon=True)
            process.start()
            theirs.close()
        name, content = files[number % len(files)]
        mutant = mutate(content, dice)
        if not mutant:
            continue
        ours.send_bytes(mutant)
        try:
            said, memory = ours.recv() if ours.poll(patience) else ("hangs", 0)
        except EOFError:
            said, memory = "crash", 0
        most = max(most, memory)
        counts[said if said in ("decoded", "bad", "hangs", "crash") else "other"] += 1
        if said not in ("decoded", "bad"):
            surprises.append(f"mutant {number} ({name}): {said}; {mutant.hex()[:200]}")
            process.kill()
            process = None
    if process is not None:
        process.kill()
    return counts, surprises, most


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    began = time.monotonic()
    counts, surprises, most = try_all(asked.mutations, asked.seed)
    print(
        f"{sum(counts.values()):,} mutants of {len(seeds())} files in {time.monotonic() - began:.0f} s:", dict(counts)
    )
    print(f"most memory of the decoding process: {most / 1024:.0f} MiB")
    print(*surprises, sep="\n")
    sys.exit(bool(surprises))
