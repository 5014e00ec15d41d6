"""The three networks of MTCNN (Zhang et al., 2016) as in facenet-pytorch: proposals, refinement, landmarks."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case, Run, Scores
from .wheels import fetch, read, tensors

SHRINK = 0.709  # from one level of the pyramid to the next, as in the paper
SIZES = {"P-Net": 12, "R-Net": 24, "O-Net": 48}
SURE = {"P-Net": 0.6, "R-Net": 0.7, "O-Net": 0.7}  # a face, from this probability on
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "camera")  # the first has the face


class PNet(nn.Module):
    """Is there a face in a window of 12 pixels, and where? For every other window of an image of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (batch, 3, height, width) -> shifts of edges (batch, 4, ...), probabilities of no face and a face."""
        x = F.max_pool2d(self.prelu1(self.conv1(images)), 2, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_2(x), self.conv4_1(x).softmax(dim=1)


class RNet(nn.Module):
    """The same for one window of 24 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Windows (batch, 3, 24, 24) -> shifts (batch, 4), probabilities (batch, 2)."""
        x = F.max_pool2d(self.prelu1(self.conv1(windows)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = self.prelu4(self.dense4(_columns_first(self.prelu3(self.conv3(x)))))
        return self.dense5_2(x), self.dense5_1(x).softmax(dim=1)


class ONet(nn.Module):
    """The same for one window of 48 pixels, and five landmarks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows (batch, 3, 48, 48) -> shifts (batch, 4), landmarks (batch, 10), probabilities (batch, 2)."""
        x = F.max_pool2d(self.prelu1(self.conv1(windows)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu3(self.conv3(x)), 2, 2, ceil_mode=True)
        x = self.prelu5(self.dense5(_columns_first(self.prelu4(self.conv4(x)))))
        return self.dense6_2(x), self.dense6_3(x), self.dense6_1(x).softmax(dim=1)


def _columns_first(x: Tensor) -> Tensor:
    """Rows for a dense layer in the order of the original implementation: by width, height, channel."""
    return x.permute(0, 3, 2, 1).flatten(1)


def p_net(folder: Path) -> Case:
    """P-Net on levels of a pyramid, every batch of another size."""
    model = _trained(PNet(), folder, "pnet")
    calibration, evaluation = photographs(folder), [x.flip(-1) for x in photographs(folder, offset=24)]
    batches = [crops for image in calibration for crops in _level_crops(image, 0)]
    unseen = [crops for image in evaluation for crops in _level_crops(image, 1)]
    sizes = [{0: "batch", 2: "height", 3: "width"}]
    return Case("P-Net", model, batches, _scores("P-Net", model, unseen), sizes)


def r_net(folder: Path) -> Case:
    """R-Net on windows that P-Net proposes."""
    return _second_stage("R-Net", _trained(RNet(), folder, "rnet"), folder)


def o_net(folder: Path) -> Case:
    """O-Net on the same, larger."""
    return _second_stage("O-Net", _trained(ONet(), folder, "onet"), folder)


def photographs(folder: Path, offset: int = 0) -> list[Tensor]:
    """Photographs as (1, 3, height, width) from -1 to 1, without ``offset`` pixels of their upper left edges."""
    from PIL import Image

    path, found = fetch(folder, "scikit_image"), []
    for name in PHOTOGRAPHS:
        with Image.open(io.BytesIO(read(path, f"skimage/data/{name}.png"))) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()
        found.append((pixels[None, :, offset:, offset:] - 127.5) / 128)
    return found


def _trained(model: nn.Module, folder: Path, name: str) -> nn.Module:
    model.load_state_dict(tensors(fetch(folder, "facenet_pytorch"), f"facenet_pytorch/data/{name}.pt"))
    return model.eval()


def _levels(image: Tensor, smallest: int) -> Iterator[Tensor]:
    """The pyramid of an image, from the level on which ``smallest`` pixels are P-Net's window."""
    scale = SIZES["P-Net"] / smallest
    while min(image.shape[-2:]) * scale >= 2 * SIZES["P-Net"]:
        height, width = (int(side * scale) for side in image.shape[-2:])
        yield F.interpolate(image, (height, width), mode="area")
        scale *= SHRINK


def _level_crops(image: Tensor, seed: int) -> Iterator[Tensor]:
    """From each level of a pyramid a batch of eight crops of three quarters of it."""
    generator = torch.Generator().manual_seed(seed)
    for level in _levels(image, 40 + 8 * seed):
        height, width = (3 * side // 4 for side in level.shape[-2:])
        tops = torch.randint(level.shape[-2] - height + 1, (8,), generator=generator)
        lefts = torch.randint(level.shape[-1] - width + 1, (8,), generator=generator)
        places = zip(tops.tolist(), lefts.tolist(), strict=True)
        yield torch.cat([level[..., top : top + height, left : left + width] for top, left in places])


def _second_stage(name: str, model: nn.Module, folder: Path) -> Case:
    proposals, size = _trained(PNet(), folder, "pnet"), SIZES[name]
    seen = torch.cat([_windows(proposals, x, size, 0) for x in photographs(folder)])
    mirrored = [x.flip(-1) for x in photographs(folder, offset=24)]
    unseen = torch.cat([_windows(proposals, x, size, 1) for x in mirrored])
    shuffled = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))]
    return Case(name, model, shuffled[:128].split(32), _scores(name, model, unseen.split(64)), [{0: "batch"}])


@torch.no_grad()
def _windows(proposals: nn.Module, image: Tensor, size: int, seed: int) -> Tensor:
    """Windows of a photograph: those most likely a face by P-Net, on every level, with their edges moved a little."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for level in _levels(image, 24):
        scale = image.shape[-1] / level.shape[-1]
        shifts, probabilities = proposals(level)
        best = probabilities[0, 1].flatten().topk(min(32, probabilities[0, 1].numel())).indices
        for index in best.tolist():
            row, column = divmod(index, shifts.shape[-1])
            corners = torch.tensor([column, row, column, row]) * 2 + torch.tensor([0, 0, 1, 1]) * SIZES["P-Net"]
            moved = shifts[0, :, row, column] + torch.randn(4, generator=generator) * 0.05
            edges = (corners + moved * SIZES["P-Net"]) * scale
            left, top, right, bottom = (max(0, int(edge)) for edge in edges.tolist())
            window = image[..., top:bottom, left:right]
            if min(window.shape[-2:]) > size // 3:
                found.append(F.interpolate(window, (size, size), mode="area"))
    return torch.cat(found)


def _scores(name: str, model: nn.Module, unseen: Sequence[Tensor]) -> Callable[[Run], Scores]:
    """For every crop how near the probabilities of a face are to the float network's, and where that says that there
    is one, the overlap of both boxes.
    """
    with torch.no_grad():
        wanted = [[x.numpy() for x in model(batch)] for batch in unseen]

    def scores(run: Run) -> Scores:
        likely, overlaps = [], []
        for batch, right in zip(unseen, wanted, strict=True):
            found = run(batch)
            crops = len(batch)
            face, other = right[-1][:, 1].reshape(crops, -1), found[-1][:, 1].reshape(crops, -1)
            likely += list(1 - np.abs(face - other).mean(axis=1))
            overlap = box_overlap(right[0], found[0]).reshape(crops, -1)
            sure = face >= SURE[name]
            overlaps += [overlap[i, sure[i]].mean() for i in range(crops) if sure[i].any()]
        return {"probability": 100 * np.array(likely), "box overlap": 100 * np.array(overlaps)}

    return scores


def box_overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of the unit square with its edges shifted by either: (batch, 4, ...) left, top, right
    and bottom -> (batch, ...).
    """
    edge = np.array([0.0, 0.0, 1.0, 1.0]).reshape(1, 4, *[1] * (first.ndim - 2))
    a, b = first + edge, second + edge
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    areas = [np.clip(box[:, 2:] - box[:, :2], 0, None).prod(axis=1) for box in (a, b)]
    return common / (areas[0] + areas[1] - common)
