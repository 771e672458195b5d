"""The files of a checkpoint folder: JSON, and safetensors in one file or in shards. Pickles are never opened."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hotloop.engine.errors import UserError
from hotloop.engine.files import read_record

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that cannot be read or holds no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a {type(values).__name__}, expected an object")
    return values


def weight_files(folder: Path) -> list[Path]:
    """Raises UserError where there are none, or where the index names one that is missing."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX}: no weight_map: the index is not whole")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{folder / INDEX}: shard {name!r} is not a file of the folder")
            if not (folder / name).exists():
                raise UserError(f"{folder / INDEX}: shard {name} is missing: copy it into the folder")
        return [folder / name for name in names]
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    reason = f"{pickled[0]} is a pickle, which can run code when it is read" if pickled else "no weights there"
    raise UserError(f"{folder}: {WEIGHTS} is missing ({reason}): save the model as safetensors")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder. Raises UserError, also for one that the index names and no shard has."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
    if (folder / INDEX).exists():
        for name, shard in read_json(folder / INDEX)["weight_map"].items():
            if name not in tensors:
                raise UserError(f"{folder / shard}: tensor {name} is missing, which {INDEX} says is there")
    return tensors


def fingerprint(folder: Path) -> str:
    """SHA-256 of the settings, the weights and the tokenizer."""
    digest = hashlib.sha256()
    for path in [folder / CONFIG, *weight_files(folder), folder / TOKENIZER]:
        digest.update(read_record(path).sha256.encode() if path.exists() else b"-")
    return digest.hexdigest()
