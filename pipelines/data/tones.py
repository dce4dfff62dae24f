"""A second modality: tones that say what captions of digits say. The pitch is the digit, the timbre is the ink.

A tone is 0.8 s of sound, 8,000 samples a second. What a network sees of it is a spectrogram, 48 semitones from C4 up by
8 moments, of values in [−1, 1]: levels from −48 dB to 0 dB of the full scale. :func:`spectrogram` takes it of a sound,
:func:`sound` makes a sound of it, and :func:`decode` tells pitch and timbre by arithmetic, with nothing learned.

* The ten digits are the white keys from C4 to E5; harmonics, up to the fifth, reach row 44 of 48.
* Tones of one kind differ in loudness, onset, decay, tuning and noise, and in the phases of their harmonics.
* No tone says what the ground is: captions of one tone differ in it.
"""

import wave
from functools import lru_cache
from io import BytesIO
from typing import NamedTuple

import numpy as np

from pipelines.data.digits import DIGITS, INKS

RATE, FRAMES, ROWS = 8000, 8, 48  # samples a second; moments and semitones of a spectrogram
SAMPLES = 6400  # of a tone
KEYS = (0, 2, 4, 5, 7, 9, 11, 12, 14, 16)  # semitones above C4, by digit
TIMBRES = {  # ink → amplitudes of the harmonics
    "red": (1.0, 0.0, 0.0, 0.0, 0.0),
    "green": (1.0, 0.7, 0.0, 0.0, 0.0),
    "blue": (1.0, 0.0, 0.7, 0.0, 0.0),
    "yellow": (1.0, 0.7, 0.0, 0.6, 0.0),
    "purple": (1.0, 0.0, 0.7, 0.0, 0.5),
    "orange": (1.0, 0.7, 0.7, 0.6, 0.5),
}
_C4, _HOP, _WINDOW = 261.6256, SAMPLES // FRAMES, 1600
_PARTIALS = (0, 12, 19, 24, 28)  # semitones from the fundamental to each harmonic, the nearest
_DECIBELS = 48.0  # from a spectrogram's least value to its largest
_AUDIBLE = -36.0  # dB: what is below is not played
_MIDDLE, _SPREAD = -0.93, 0.4  # of the values of spectrograms: their mean, and what their deviation is divided by
SHAPE = (8, 12, 4)  # of a folded one
CLEAR = 0.85  # the cosine from which on a spectrogram shows a tone at all


class Tones(NamedTuple):
    """Spectrograms (n, 48, 8) float32 in [−1, 1], and which digit and ink each is of, (n,) int64, in the order of
    ``DIGITS`` and ``INKS``."""

    spectrograms: np.ndarray
    digits: np.ndarray
    inks: np.ndarray


class Heard(NamedTuple):
    """What :func:`decode` hears: indices of digit and ink (n,), and ``likeness`` (n,), the cosine to such a tone."""

    digits: np.ndarray
    inks: np.ndarray
    likeness: np.ndarray


def play(digits: np.ndarray, inks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sound (n, 6400) for each digit and ink (n,), as an instrument would play it: no two are alike."""

    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (len(digits), 1))

    time = np.arange(SAMPLES) / RATE
    onset, decay = uniform(0.0, 0.2), uniform(0.3, 1.5)
    since = np.clip(time - onset, 0, None)
    envelope = 10 ** (uniform(-20, -11) / 20) * np.minimum(since / 0.02, 1) * np.exp(-since / decay)
    base = _C4 * 2 ** ((np.array(KEYS)[digits][:, None] + uniform(-0.15, 0.15)) / 12)
    weights = np.array([TIMBRES[ink] for ink in INKS])[inks]
    played = uniform(0.005, 0.03) * rng.standard_normal((len(digits), SAMPLES))
    for number in range(weights.shape[1]):
        phase, some = uniform(0, 2 * np.pi), weights[:, number] > 0
        strength = weights[some, number, None] * 10 ** (uniform(-1.5, 1.5)[some] / 20)
        turned = 2 * np.pi * (number + 1) * base[some] * time + phase[some]
        played[some] += strength * envelope[some] * np.sin(turned)
    return played


def spectrogram(sounds: np.ndarray) -> np.ndarray:
    """Of ``sounds`` (n, 6400) the levels (n, 48, 8) float32 in [−1, 1]: by a window for each semitone that is as many
    of its periods long, a constant-Q transform (Brown 1991)."""
    edge = (_WINDOW - _HOP) // 2
    padded = np.pad(sounds, ((0, 0), (edge, edge)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW, axis=1)[:, ::_HOP]
    amplitude = np.abs(windows.astype(np.complex64) @ _kernels()).transpose(0, 2, 1)
    return leveled(amplitude)


def leveled(amplitude: np.ndarray) -> np.ndarray:
    """Values in [−1, 1] of amplitudes, of which 1 is the full scale."""
    decibels = 20 * np.log10(np.maximum(amplitude, 1e-9))
    return np.clip(2 * decibels / _DECIBELS + 1, -1, 1).astype(np.float32)


def amplitudes(spectrograms: np.ndarray) -> np.ndarray:
    """What :func:`leveled` was given; 0 for the least value."""
    values = np.clip(np.asarray(spectrograms, dtype=np.float64), -1, 1)
    return np.where(values > -1, 10 ** ((values - 1) * _DECIBELS / 40), 0.0)


def sound(spectrograms: np.ndarray) -> np.ndarray:
    """Sounds (n, 6400) of ``spectrograms`` (n, 48, 8): a sine wave for each row, as loud as it says at each moment."""
    loud = amplitudes(spectrograms)
    loud = np.where(loud > 10 ** (_AUDIBLE / 20), loud, 0.0)
    time, middles = np.arange(SAMPLES), (np.arange(FRAMES) + 0.5) * _HOP
    ahead = np.clip(np.searchsorted(middles, time), 1, FRAMES - 1)
    share = np.clip((time - middles[ahead - 1]) / _HOP, 0, 1)
    envelope = loud[..., ahead - 1] * (1 - share) + loud[..., ahead] * share
    phases = np.random.default_rng(0).uniform(0, 2 * np.pi, (ROWS, 1))  # all in phase would crackle
    waves = np.sin(2 * np.pi * _frequencies()[:, None] * time / RATE + phases)
    return np.asarray(np.einsum("nrt,rt->nt", envelope, waves))


def wav(sounds: np.ndarray, pause: float = 0.2) -> bytes:
    """A WAV file, 16 bit mono, of ``sounds`` (n, samples) in [−1, 1], one after the other with a ``pause`` in s."""
    silence = np.zeros((len(sounds), round(pause * RATE)))
    whole = np.concatenate([sounds, silence], axis=1).ravel()
    file = BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(RATE)
        writer.writeframes(np.rint(np.clip(whole, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def decode(spectrograms: np.ndarray) -> Heard:
    """The pitch and the timbre whose harmonics are most like those of ``spectrograms`` (n, 48, 8), by the cosine of
    amplitudes. Learned from nothing, so it can judge what is learned."""
    loud = np.sqrt(np.square(amplitudes(spectrograms)).mean(axis=2))
    patterns = _patterns()
    found = loud @ patterns.T / np.maximum(np.linalg.norm(loud, axis=1, keepdims=True), 1e-12)
    best = found.argmax(axis=1)
    return Heard(best // len(INKS), best % len(INKS), found.max(axis=1))


def folded(spectrograms: np.ndarray) -> np.ndarray:
    """What a network learns to draw: (n, 8, 12, 4) float32 of ``spectrograms`` (n, 48, 8), four rows and two moments as
    channels, so that it sees each place at a quarter and half of the resolution, of about the variance of latents."""
    blocks = ((spectrograms - _MIDDLE) / _SPREAD).reshape(-1, ROWS // 4, 4, FRAMES // 2, 2)
    return np.ascontiguousarray(blocks.transpose(0, 2, 4, 1, 3).reshape(-1, *SHAPE), dtype=np.float32)


def unfolded(drawn: np.ndarray) -> np.ndarray:
    """The spectrograms (n, 48, 8), in [−1, 1], of what a network draws (n, 8, 12, 4)."""
    blocks = drawn.reshape(-1, 4, 2, ROWS // 4, FRAMES // 2).transpose(0, 3, 1, 4, 2)
    return np.clip(blocks.reshape(-1, ROWS, FRAMES) * _SPREAD + _MIDDLE, -1, 1)


@lru_cache(maxsize=4)
def tones(each: int, seed: int) -> Tones:
    """So many tones of ``each`` of the 60 kinds, the same for the same seed."""
    digits, inks = (axis.ravel() for axis in np.indices((len(DIGITS), len(INKS), each))[:2])
    rng = np.random.default_rng(seed)
    parts = np.array_split(np.arange(len(digits)), max(1, len(digits) // 256))
    made = [spectrogram(play(digits[part], inks[part], rng)) for part in parts]
    return Tones(np.concatenate(made), digits, inks)


def shown(spectrograms: np.ndarray, scale: int = 1) -> np.ndarray:
    """Pictures (n, 48, 8 · 2 · ``scale``, 3) uint8 of ``spectrograms``, low tones at the bottom, loud ones bright."""
    level = (np.clip(spectrograms, -1, 1) + 1)[:, ::-1] / 2
    colours = np.stack([level**0.7, level**1.5, 0.25 + 0.5 * level - 0.5 * level**3], axis=-1)
    return np.rint(255 * np.clip(colours, 0, 1)).astype(np.uint8).repeat(2 * scale, axis=2)


def words(digits: np.ndarray, inks: np.ndarray) -> list[tuple[str, str]]:
    """Of indices (n,) of digits and inks."""
    known = tuple(INKS)
    return [(DIGITS[digit], known[ink]) for digit, ink in zip(digits, inks, strict=True)]


def _frequencies() -> np.ndarray:
    """Of the rows (48,), in Hz."""
    return _C4 * 2 ** (np.arange(ROWS) / 12)


@lru_cache(maxsize=1)
def _kernels() -> np.ndarray:
    """What windows of samples are multiplied with (1600, 48): each column's sine wave of amplitude 1 gives 1."""
    time = np.arange(_WINDOW) - (_WINDOW - 1) / 2
    length = _WINDOW * _C4 / _frequencies()
    inside = np.abs(time[:, None]) <= length / 2
    hann = np.where(inside, 0.5 + 0.5 * np.cos(2 * np.pi * time[:, None] / length), 0.0)
    turned = np.exp(-2j * np.pi * _frequencies() * time[:, None] / RATE)
    return np.asarray(2 * hann / hann.sum(axis=0) * turned, dtype=np.complex64)


@lru_cache(maxsize=1)
def _patterns() -> np.ndarray:
    """Amplitudes by row of each kind of tone (60, 48), of unit length."""
    patterns = np.zeros((len(DIGITS), len(INKS), ROWS))
    for digit, key in enumerate(KEYS):
        for ink, name in enumerate(INKS):
            patterns[digit, ink, key + np.array(_PARTIALS)] = TIMBRES[name]
    flat = patterns.reshape(-1, ROWS)
    return np.asarray(flat / np.linalg.norm(flat, axis=1, keepdims=True))
