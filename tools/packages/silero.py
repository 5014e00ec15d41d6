"""Silero VAD at 16 kHz: is there speech in these 32 ms? A spectrum by convolution, four convolutions, an LSTM cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from .audio import speech, voices, with_noise
from .case import Case, Run, Scores
from .wheels import fetch, read

FRAME, CONTEXT, BINS, STATE = 512, 64, 129, 128
SECONDS = 3
Stream = tuple[Tensor, Tensor, Tensor]


class SileroVAD(nn.Module):
    """The probability of speech in a frame, and the state for the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 2 * BINS, 256, 128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(BINS, 128, 3, padding=1), nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, 2, 1), nn.Conv1d(64, STATE, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(STATE, STATE)
        self.final_conv = nn.Conv1d(STATE, 1, 1)

    def forward(self, frame: Tensor, hidden: Tensor, cell: Tensor) -> Stream:
        """A frame with the end of the one before it (batch, 576), hidden and cell state (batch, 128) -> probability
        (batch, 1), both states.
        """
        spectrum = self.stft_conv(F.pad(frame[:, None], (0, CONTEXT), mode="reflect"))
        x = (spectrum[:, :BINS] ** 2 + spectrum[:, BINS:] ** 2).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        hidden, cell = self.lstm_cell(x.squeeze(-1), (hidden, cell))
        return self.final_conv(hidden[..., None].relu()).sigmoid().squeeze(-1), hidden, cell


def silero(folder: Path) -> Case:
    """The detector on synthesized speech with pauses, in noise."""
    model = SileroVAD().eval()
    model.load_state_dict(load(read(fetch(folder, "silero_vad"), "silero_vad/data/silero_vad_16k.safetensors")))
    return Case("Silero VAD", model, _seen(model), _scores(model, clips(64, seed=1)), [{0: "batch"}] * 3)


def clips(count: int, seed: int) -> Tensor:
    """Frames with their context (frames, clips, 576) of sounds in which somebody speaks half of the time."""
    rng, sounds = np.random.default_rng(seed), []
    for voice in voices(count, rng):
        sound = 0.05 * speech(voice, SECONDS, rng)
        start = rng.integers(len(sound) // 2)
        sound[start : start + len(sound) // 2] *= 0.001
        sounds.append(with_noise(sound, rng.uniform(5, 40), rng))
    wave = F.pad(torch.from_numpy(np.stack(sounds)).float(), (CONTEXT, 0))
    return wave.unfold(1, CONTEXT + FRAME, FRAME).transpose(0, 1).contiguous()


def streamed(run: Run, frames: Tensor) -> tuple[np.ndarray, list[Stream]]:
    """Probabilities (frames, clips), and what was read at every frame, each frame with the state after the last."""
    hidden = cell = torch.zeros(frames.shape[1], STATE)
    found, read_there = [], []
    for frame in frames:
        read_there.append((frame, hidden, cell))
        probability, new_hidden, new_cell = run(read_there[-1])
        hidden, cell = (torch.from_numpy(np.asarray(x)) for x in (new_hidden, new_cell))
        found.append(probability[:, 0])
    return np.stack(found), read_there


def _seen(model: nn.Module) -> list[Stream]:
    """128 frames at random times of the calibration clips, with the states that they are met in."""
    _, streams = streamed(_of_model(model), clips(32, seed=0))
    whole = [torch.cat(parts) for parts in zip(*streams, strict=True)]
    chosen = torch.randperm(len(whole[0]), generator=torch.Generator().manual_seed(0))[:128]
    return [(whole[0][some], whole[1][some], whole[2][some]) for some in chosen.split(32)]


def _of_model(model: nn.Module) -> Run:
    def run(batch: Stream) -> list[np.ndarray]:
        with torch.no_grad():
            return [x.numpy() for x in model(*batch)]

    return run


def _scores(model: nn.Module, frames: Tensor) -> Callable[[Run], Scores]:
    """For every clip how near probabilities are to the float network's, and the share of equal decisions."""
    wanted, _ = streamed(_of_model(model), frames)

    def scores(run: Run) -> Scores:
        found, _ = streamed(run, frames)
        equal = (found >= 0.5) == (wanted >= 0.5)
        return {
            "probability": 100 * (1 - np.abs(found - wanted).mean(axis=0)),
            "decision": 100 * equal.mean(axis=0),
        }

    return scores
