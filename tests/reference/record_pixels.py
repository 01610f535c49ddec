"""Records what the reference makes of pictures, as pixels.npz beside this file.

    PYTHONPATH=tests python tests/reference/record_pixels.py

Needs torch, torchvision, transformers and Pillow as `make parity` installs them, on Linux with a C
compiler (see :func:`load_decoders`). tests/test_resample.py and tests/test_image.py read the file:

    made_with            versions
    table/*              (256, 3) float32: pixel value of each level and channel, by normalisation
    tiles, squares       (n, 16): digests of the pixel_values of TILED_SIZES, alone and in pairs
    torch/H,W>h,w        resized noise, by torch; seed 3
    pillow/H,W>h,w       the same by Pillow 13
    object/*, array/*    (H, W, 3): what becomes of images.objects() and images.arrays()
    file/*               bytes of a file
    decoded/*            (H, W, 3): what torchvision decodes it to
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import images
import numpy as np
import PIL
import torch
import transformers
from parity.torchvision_ops import torchvision
from PIL import Image
from transformers import LlavaOnevisionImageProcessor

HALVES = [0.5] * 3
# Up and down, one axis alone, odd ratios, single pixels, a quarter and beyond, and Pillow 13's
# vertical-first cases on both sides of its rule.
RESIZES = (
    ((23, 31), (23, 47)), ((23, 31), (50, 31)), ((23, 31), (64, 80)), ((40, 60), (13, 17)),
    ((1, 90), (3, 20)), ((90, 1), (20, 3)), ((1, 1), (7, 5)), ((60, 60), (59, 61)),
    ((120, 90), (31, 29)), ((200, 30), (9, 28)), ((150, 40), (40, 30)), ((80, 40), (20, 10)),
    ((60, 40), (20, 20)), ((61, 40), (20, 20)), ((300, 20), (40, 40)), ((20, 400), (16, 30)),
)  # fmt: skip


def load_decoders() -> None:
    """Registers torchvision's image decoders beside a CPU-only torch.

    Their library is linked to two of a CUDA torch's, of which it needs one variable, and the rest
    only to decode on a GPU. So two libraries of those names with that variable are made, and the
    decoders' is loaded with its functions bound when called.
    """
    if torchvision.io.image._has_image_ops():
        return
    needed = b"char _ZN3c104cuda20CUDACachingAllocator9allocatorE[8];"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("libc10_cuda.so", "libtorch_cuda.so"):
            path = f"{folder}/{name}"
            link = ["cc", "-shared", "-fPIC", "-xc", "-", "-o", path, f"-Wl,-soname,{name}"]
            subprocess.run(link, input=needed, check=True)
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    libc = ctypes.CDLL(None)
    libc.dlopen.restype = ctypes.c_void_p
    libc.dlerror.restype = ctypes.c_char_p
    library = str(Path(torchvision.__path__[0]) / "image.so")
    if not libc.dlopen(library.encode(), os.RTLD_LAZY | os.RTLD_GLOBAL):
        sys.exit(libc.dlerror().decode())
    torchvision.io.image._has_image_ops = lambda: True


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def files() -> dict[str, bytes]:
    """Files of every kind that torchvision decodes to 8 bits."""
    objects = images.objects()
    rgb = Image.fromarray(images.smooth(*images.SMALL))
    exif = Image.Exif()
    made = {f"png {mode}": encoded(objects[mode], "PNG") for mode in ("1", "L", "LA", "P", "RGBA")}
    made["png P, one clear index"] = encoded(objects["P"], "PNG", transparency=3)
    made["png P, clear by degrees"] = encoded(objects["P, clear by degrees"], "PNG")
    made["png L, one clear colour"] = encoded(objects["L, one clear colour"], "PNG")
    made["png RGB, one clear colour"] = encoded(objects["RGB, one clear colour"], "PNG")
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        made[f"jpeg turned {orientation}"] = encoded(rgb, "JPEG", exif=exif)
    made["png turned 6"] = encoded(objects["RGB, turned by EXIF"], "PNG", exif=turned(6))
    made["jpeg L"] = encoded(rgb.convert("L"), "JPEG")
    made["jpeg CMYK"] = encoded(rgb.convert("CMYK"), "JPEG")
    made["jpeg progressive"] = encoded(rgb, "JPEG", progressive=True)
    made["jpeg 4:4:4"] = encoded(rgb, "JPEG", quality=95, subsampling=0)
    made["webp lossy"] = encoded(rgb, "WEBP")
    made["webp RGBA"] = encoded(objects["RGBA"], "WEBP", lossless=True, exact=True)
    made["gif"] = encoded(objects["P"], "GIF")
    return made


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def decoded(data: bytes) -> np.ndarray:
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    mode = torchvision.io.ImageReadMode.RGB
    tensor = torchvision.io.decode_image(buffer, mode, apply_exif_orientation=True)
    return tensor.permute(1, 2, 0).contiguous().numpy()


def planes(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) as the tensor (3, H, W) of which the processor cannot mistake the channels."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def main() -> None:
    torch.set_num_threads(1)
    load_decoders()
    half = LlavaOnevisionImageProcessor(image_mean=HALVES, image_std=HALVES)
    clip = LlavaOnevisionImageProcessor(
        image_mean=list(images.CLIP_MEAN), image_std=list(images.CLIP_STD)
    )
    arrays: dict[str, np.ndarray] = {}
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
    versions += f"transformers {transformers.__version__}, Pillow {PIL.__version__}"
    arrays["made_with"] = np.array(versions)

    levels = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 256, 3))
    normalisations: list[tuple[str, Any, dict[str, Any]]] = [
        ("halves", half, {}),
        ("clip", clip, {}),
        ("rescaled by 1/127.5", half, {"rescale_factor": 1 / 127.5}),
        ("clip, rescaled by 0.004", clip, {"rescale_factor": 0.004}),
    ]
    for name, processor, options in normalisations:
        size = {"height": 256, "width": 256}
        pair = processor([[planes(levels)] * 2], size=size, return_tensors="np", **options)
        arrays[f"table/{name}"] = pair["pixel_values"][0, 0, :, :, 0].T.copy()

    tiles, squares = [], []
    for high, wide in images.TILED_SIZES:
        image = planes(images.noise(high, wide, 3, seed=high + wide))
        tiles.append(images.digest(half([[image]], return_tensors="np")["pixel_values"][0]))
        pair = clip([[image, image]], return_tensors="np")["pixel_values"]
        squares.append(images.digest(pair[0]))
    arrays["tiles"], arrays["squares"] = np.stack(tiles), np.stack(squares)

    for size, to_size in RESIZES:
        image = images.noise(*size, 3, seed=3)
        name = f"{size[0]},{size[1]}>{to_size[0]},{to_size[1]}"
        by_torch = torch.nn.functional.interpolate(
            planes(image)[None], to_size, mode="bicubic", antialias=True
        )
        arrays[f"torch/{name}"] = by_torch[0].permute(1, 2, 0).contiguous().numpy()
        by_pillow = Image.fromarray(image).resize(
            (to_size[1], to_size[0]), Image.Resampling.BICUBIC
        )
        arrays[f"pillow/{name}"] = np.asarray(by_pillow)

    for name, picture in images.objects().items():
        tensor = half.process_image(picture, do_convert_rgb=True)
        arrays[f"object/{name}"] = tensor.permute(1, 2, 0).contiguous().numpy()
    for name, array in images.arrays().items():
        tensor = half.process_image(array, do_convert_rgb=True)
        arrays[f"array/{name}"] = tensor.permute(1, 2, 0).contiguous().numpy()
    for name, data in files().items():
        arrays[f"file/{name}"] = np.frombuffer(data, np.uint8)
        arrays[f"decoded/{name}"] = decoded(data)
    save: Any = np.savez_compressed
    save(Path(__file__).with_name("pixels.npz"), **arrays)


if __name__ == "__main__":
    main()
