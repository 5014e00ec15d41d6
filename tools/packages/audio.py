"""Sounds whose pitch, voice and pauses are known: tones with vibrato, vowels by formants, noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RATE = 16_000  # samples a second
# Mean formants of five English vowels, in Hz (Peterson and Barney, 1952), and how wide and loud they are here.
_VOWELS = np.array([(730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410)])
_BANDWIDTHS = np.array([80.0, 110.0, 160.0])
_LEVELS = np.array([1.0, 0.6, 0.3])
_SYLLABLES = 4.0  # a second


@dataclass(frozen=True)
class Voice:
    """A speaker: mean ``pitch`` in Hz, the factor of all formants by the length of the vocal ``tract``, and how much
    noise there is in the ``breath``.
    """

    pitch: float
    tract: float
    breath: float


def voices(count: int, rng: np.random.Generator) -> list[Voice]:
    """Speakers from low to high, each a little off the line."""
    heights = np.linspace(0, 1, count)
    return [
        Voice(
            pitch=90 * 2 ** (1.3 * h + rng.normal(0, 0.05)),
            tract=0.85 + 0.35 * h + rng.normal(0, 0.03),
            breath=rng.uniform(0.01, 0.05),
        )
        for h in heights
    ]


def tone(hertz: np.ndarray, slope: float, rng: np.random.Generator) -> np.ndarray:
    """A harmonic tone of this pitch at every sample; harmonic k is k ** -slope times as loud, in random phase."""
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    sound = np.zeros_like(phase)
    for k in range(1, 13):
        audible = k * hertz < RATE / 2
        sound += audible * k**-slope * np.sin(k * phase + rng.uniform(0, 2 * np.pi))
    return sound / np.sqrt(np.mean(sound**2))


def with_noise(sound: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """A sound with white noise so many decibels below it."""
    level = np.sqrt(np.mean(sound**2)) * 10 ** (-decibels / 20)
    return sound + level * rng.normal(size=sound.shape)


def speech(voice: Voice, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Vowels that glide into each other, one for a syllable, with hissing between some of them."""
    count = int(seconds * _SYLLABLES) + 2
    time, knots = np.arange(int(seconds * RATE)) / RATE, np.arange(count) / _SYLLABLES
    melody = voice.pitch * 2 ** rng.normal(0, 0.12, count)
    pitch = np.interp(time, knots, melody) * (1 + 0.01 * np.sin(2 * np.pi * 5 * time))
    spoken = _VOWELS[rng.integers(len(_VOWELS), size=count)] * voice.tract
    formants = np.stack([np.interp(time, knots, spoken[:, i]) for i in range(3)])
    beat = np.abs(np.sin(np.pi * _SYLLABLES * time + rng.uniform(0, np.pi)))
    return beat**0.5 * _sung(pitch, formants, rng) + (1 - beat) * voice.breath * _hiss(len(time), rng)


def _sung(pitch: np.ndarray, formants: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Harmonics of a glottis (12 dB an octave), each as loud as the formants near it let it be."""
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    sound = np.zeros_like(phase)
    for k in range(1, 1 + int(4000 / pitch.min())):
        distance = (k * pitch - formants) / _BANDWIDTHS[:, None]
        gain = (_LEVELS[:, None] / (1 + distance**2)).sum(axis=0) + 0.02
        sound += (k * pitch < RATE / 2) * gain * np.sin(k * phase) / k
    return sound / np.sqrt(np.mean(sound**2))


def _hiss(count: int, rng: np.random.Generator) -> np.ndarray:
    """Noise without its low frequencies, as of an s."""
    return np.diff(rng.normal(size=count + 2), n=2)
