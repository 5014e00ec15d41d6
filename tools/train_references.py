"""Make the reference networks and the images that the repository carries.

    python tools/train_references.py [--out calibration] [--networks digits_cnn digits_vit]

Trains recipes/models/digits_cnn.py and digits_vit.py on scikit-learn's copy of the UCI handwritten digits and writes
``digits.npz`` (images, labels, and which are for calibration and which for evaluation), ``digits_cnn.safetensors``
and ``digits_vit.safetensors``. Prints the sha256 hashes and the accuracies stated in calibration/README.md.
scikit-learn is needed here and nowhere else.

The split, the first weights, the order and the shifts of the training images come from one seed, and everything runs
on one thread, so a second run on the same machine writes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from recipes.models import digits_cnn, digits_vit  # noqa: E402  (found only once the repository is on the path)

SEED = 0
EVALUATION_IMAGES = 600
CALIBRATION_IMAGES = 512
BATCH = 64
# network -> its module, passes over the training images, peak learning rate
NETWORKS: dict[str, tuple[Any, int, float]] = {
    "digits_cnn": (digits_cnn, 60, 0.05),
    "digits_vit": (digits_vit, 100, 3e-3),
}


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for evaluation, every class in proportion, in a seeded random order."""
    everything = np.arange(len(labels))
    train, evaluation = train_test_split(
        everything, test_size=EVALUATION_IMAGES, stratify=labels, shuffle=True, random_state=SEED
    )
    return train, evaluation


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by at most one pixel in both directions; what moves in is empty."""
    count, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1))
    top, left = torch.randint(0, 3, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + top)[:, :, None]
    columns = (torch.arange(width) + left)[:, None, :]
    return padded[torch.arange(count)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)


def optimizer_of(name: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD for convolutions, AdamW for the transformer."""
    if name == "digits_vit":
        return torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)


def train(name: str, images: Tensor, labels: Tensor) -> nn.Module:
    """The network after its last pass; nothing is chosen by looking at evaluation images."""
    module, epochs, rate = NETWORKS[name]
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)  # the first weights
    model: nn.Module = module.build().train()
    steps_per_epoch = len(images) // BATCH
    optimizer = optimizer_of(name, model, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps_per_epoch)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: steps_per_epoch * BATCH].split(BATCH):
            loss = F.cross_entropy(model(shifted(images[chosen], generator)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "calibration", help="folder of the files")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    training, evaluation = split(labels)
    # numpy gives every member of the archive the same date (1980-01-01): equal arrays, equal bytes
    np.savez_compressed(
        out / "digits.npz",
        images=images,
        labels=labels,
        calibration=training[:CALIBRATION_IMAGES].astype(np.uint16),
        evaluation=evaluation.astype(np.uint16),
    )
    tell(out / "digits.npz")
    for name in options.networks:
        inputs, targets = NETWORKS[name][0].preprocess(images), torch.from_numpy(labels).long()
        model = train(name, inputs[training], targets[training])
        with torch.no_grad():
            right = model(inputs[evaluation]).argmax(1) == targets[evaluation]
        weights = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
        save_file(weights, out / f"{name}.safetensors")
        tell(out / f"{name}.safetensors")
        print(f"accuracy on {len(evaluation)} evaluation images: {100 * right.float().mean():.2f} %")


def tell(path: Path) -> None:
    """Print the size and hash of a file."""
    content = path.read_bytes()
    print(f"{path.name}  {len(content):,} bytes  sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
