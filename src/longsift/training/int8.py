"""Weights in eight bits: half the size of bfloat16, and exactly defined.

Every matrix W, (rows, columns), becomes int8 numbers n and one float32 scale s a row, with W[i, j] ≈ n[i, j] · s[i] and
s[i] = max_j |W[i, j]| / 127. In the file the scales of `<name>` are `<name>.scale`; vectors stay as they are. The file
is not called `model.safetensors`: a program that knows nothing of the scales must not read it as if it had none.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from longsift.errors import InputError
from longsift.tables import publish

FILE = "model.int8.safetensors"
_SCALE = ".scale"


def quantise(folder: Path, out: Path) -> None:
    """Write a model folder again with int8 matrices, in `model.int8.safetensors`; other files are copied.

    Raises:
        InputError: `folder` holds no `model.safetensors`.
    """
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} holds no model.safetensors; make one with `train`")
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.ndim != 2:
            stored[name] = weight
            continue
        scale = (weight.float().abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        stored[name] = (weight.float() / scale[:, None]).round().to(torch.int8)
        stored[name + _SCALE] = scale
    out.mkdir(parents=True, exist_ok=True)
    with publish(out / FILE) as path:
        save_file(stored, path, metadata={"format": "pt"})
    for file in folder.glob("*.json"):
        shutil.copy(file, out / file.name)


def dequantise(path: Path) -> dict[str, torch.Tensor]:
    """Read a file written by `quantise`: every matrix as int8 · scale, computed in float32, all weights float32."""
    stored = load_file(path)
    return {
        name: weight.float() * stored[name + _SCALE][:, None] if weight.dtype is torch.int8 else weight.float()
        for name, weight in stored.items()
        if not name.endswith(_SCALE)
    }
