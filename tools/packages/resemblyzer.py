"""Resemblyzer's speaker encoder (Wan et al., 2018): three LSTM layers over a mel spectrogram."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .audio import RATE, speech, voices, with_noise
from .case import Case, Run, Scores
from .wheels import fetch, tensors

FRAMES, BANDS, STEP, WINDOW = 160, 40, 160, 400  # frames a sample, mel bands, samples a frame and a window
LOUDNESS = 10 ** (-30 / 20)  # root mean square of a sound
SPEAKERS = 16


class SpeakerEncoder(nn.Module):
    """A vector of length 1 for what a voice sounds like."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        """Mel spectrograms (batch, frames, 40) -> (batch, 256)."""
        hidden = self.lstm(mels)[1][0]
        raw = self.linear(hidden[-1]).relu()
        return raw / raw.norm(dim=1, keepdim=True)


def resemblyzer(folder: Path) -> Case:
    """The encoder on synthesized voices, other ones for the evaluation."""
    model = SpeakerEncoder().eval()
    state = tensors(fetch(folder, "resemblyzer"), "resemblyzer/pretrained.pt")["model_state"]
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    seen, unseen = utterances(8, seed=0), utterances(8, seed=1)
    return Case("Resemblyzer", model, seen.split(32), _scores(model, seen, unseen), [{0: "batch"}])


def utterances(each: int, seed: int) -> Tensor:
    """Mel spectrograms (speakers * each, 160, 40) of so many sentences of every speaker, speaker by speaker."""
    rng = np.random.default_rng(seed)
    found = []
    for voice in voices(SPEAKERS, rng):
        for _ in range(each):
            sound = with_noise(speech(voice, FRAMES * STEP / RATE, rng), rng.uniform(15, 40), rng)
            found.append(mel_spectrogram(sound * LOUDNESS / np.sqrt(np.mean(sound**2))))
    return torch.stack(found)


def mel_spectrogram(sound: np.ndarray) -> Tensor:
    """(160, 40): the power in each mel band of every 10 ms."""
    window = torch.hann_window(WINDOW)
    samples = torch.from_numpy(sound).float()
    power = torch.stft(samples, WINDOW, STEP, window=window, pad_mode="constant", return_complex=True).abs() ** 2
    return (_mel_bands() @ power).T[:FRAMES]


def _mel_bands() -> Tensor:
    """Triangles between neighbouring points of Slaney's mel scale, each of area 1: (40, frequencies)."""
    top = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)  # linear up to 1000 Hz, which is mel 15; then logarithmic
    mels = np.linspace(0, top, BANDS + 2)
    points = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    hertz = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    rising = (hertz - points[:-2, None]) / np.diff(points)[:-1, None]
    falling = (points[2:, None] - hertz) / np.diff(points)[1:, None]
    bands = np.clip(np.minimum(rising, falling), 0, None) * 2 / (points[2:] - points[:-2])[:, None]
    return torch.from_numpy(bands).float()


def _scores(model: nn.Module, seen: Tensor, unseen: Tensor) -> Callable[[Run], Scores]:
    """For every utterance the cosine to the float network's vector, and how often both agree whether another one is of
    the same speaker, by a threshold halfway between the similarities of either kind in the calibration data.
    """
    with torch.no_grad():
        known, wanted = model(seen).numpy(), model(unseen).numpy()
    speaker = np.repeat(np.arange(SPEAKERS), len(seen) // SPEAKERS)
    same = speaker[:, None] == speaker
    likeness = known @ known.T
    threshold = (likeness[same].mean() + likeness[~same].mean()) / 2

    def scores(run: Run) -> Scores:
        found = np.concatenate([run(batch)[0] for batch in unseen.split(32)])
        agreed = (found @ found.T > threshold) == (wanted @ wanted.T > threshold)
        return {"cosine": 100 * (found * wanted).sum(axis=1), "same speaker": 100 * agreed.mean(axis=1)}

    return scores
