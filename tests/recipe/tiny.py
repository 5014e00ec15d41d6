"""A recipe that runs in a second, with the files it names, written into a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from tests.stages.networks import images, small

NETWORK = '''
import time
from dataclasses import dataclass

import torch
from torch import nn

from tests.stages.networks import small


@dataclass
class Shift:
    """Dataclasses with deferred annotations look their module up."""

    amount: "float" = 0.5


def build():
    return small(seed=7)


def build_other():
    return nn.Sequential(nn.Linear(4, 3))


def build_nothing():
    return "a network"


def build_with_arguments(width):
    return small(width)


def preprocess(array):
    return torch.from_numpy(array) * Shift().amount * 2


def preprocess_badly(array):
    return array


def batches():
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(8, 2, 6, 6, generator=generator), torch.zeros(8)


def one_tensor():
    return torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def brightness(model):
    with torch.no_grad():
        return float(model(torch.ones(4, 2, 6, 6)).mean())


calls = []


def worse_every_time(model):
    calls.append(model)
    return -len(calls)
'''

RECIPE = """\
# the tiny network of the tests
model:
  python: network.py:build
  weights: data/weights.safetensors
calibration:
  npz: data/images.npz
  inputs: images
  select: calibration
  preprocess: network.py:preprocess
evaluate:
  metric: top1
  npz: data/images.npz
  inputs: images
  labels: labels
  select: [24, 64]
budget: 4 bits
schemes: [w3a8, w5a8, w8a8]
"""


def write_tiny(folder: Path) -> Path:
    """Write the recipe and what it names into ``folder``; labels are what the network says, so that it is right."""
    (folder / "data").mkdir(parents=True)
    (folder / "network.py").write_text(NETWORK)
    model = small()
    save_file(model.state_dict(), folder / "data" / "weights.safetensors")
    x = images(64)
    with torch.no_grad():
        labels = model(x).argmax(-1)
    arrays = {"images": x.numpy(), "labels": labels.numpy(), "calibration": np.arange(24), "nobody": np.arange(0)}
    arrays |= {"far": np.array([3, 64]), "halves": np.array([0.5, 1.5]), "odd": np.arange(64) % 2 == 1}
    arrays |= {"few labels": labels[:30].numpy(), "doubles": x.double().numpy(), "number": np.array(3.0)}
    np.savez(folder / "data" / "images.npz", **arrays)
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def rewritten(path: Path, **changes: object) -> Path:
    """The recipe with keys (two underscores for a dot) replaced, or removed where the value is None; line numbers are
    those of a dumped table.
    """
    data = yaml.safe_load(path.read_text())
    for name, value in changes.items():
        *above, last = name.split("__")
        table = data
        for key in above:
            table = table.setdefault(key, {})
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path
