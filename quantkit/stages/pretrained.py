"""A quantized model as a folder that transformers loads: float weights with the values of their codes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import InvalidRequest
from quantkit.program.inputs import Batch, first_samples
from quantkit.program.outputs import main_output
from quantkit.program.record import run_model
from quantkit.simulation.model import SimulatedModel
from quantkit.store import explained

COMPARED = 4  # samples
CLOSE = 1e-3  # of the largest output: kernels may order sums differently


@dataclass(frozen=True)
class Saved:
    """What is saved: a quantized model with the BatchNorms that were folded into it, an ``example`` of its inputs to
    compare on, and ``keep``, which writes codes and plan into a folder.
    """

    simulated: SimulatedModel
    folds: Sequence[tuple[str, str]]
    example: Batch | None
    keep: Callable[[Path], Any]


def save_pretrained(saved: Saved, folder: str | Path, tokenizer: Any = None) -> Path:
    """Write the model as its class's ``save_pretrained`` does, with the ``tokenizer``'s files, and beside them the
    codes and the plan. What is there of other names stays.

    Raises InvalidRequest, and leaves nothing, where the class cannot be saved so, where activations have codes, and
    where the folder, loaded again, does not compute what the quantized model does.
    """
    folder = Path(folder)
    _require_plain(saved)
    own = saved.simulated.on_cpu().in_float32()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as made:
            own.model.save_pretrained(made)  # type: ignore[operator]
            if tokenizer is not None:
                tokenizer.save_pretrained(made)
            _require_same(own, Path(made), saved.example)
            saved.keep(Path(made))
            for file in sorted(Path(made).iterdir()):
                os.replace(file, folder / file.name)
    return folder


def _require_plain(saved: Saved) -> None:
    """Raise InvalidRequest for what a class of transformers could not hold or carry out."""
    simulated = saved.simulated
    kind, instead = type(simulated.model).__name__, "result.save() keeps everything, for quantkit.load()."
    if not hasattr(simulated.model, "save_pretrained") or not hasattr(type(simulated.model), "from_pretrained"):
        raise InvalidRequest(f"{kind} has no save_pretrained, as the models of transformers have. {instead}")
    if coded := [site for site in simulated.sites if site.name in simulated.ranges]:
        raise InvalidRequest(
            f"save_pretrained writes float weights, and {kind} would compute with float activations: {len(coded)} of "
            f"them have codes in this plan, {coded[0].name!r} among others. Quantize weights alone, as 'w4', to share "
            f"them so. {instead}"
        )
    if saved.folds:
        layer, norm = saved.folds[0]
        raise InvalidRequest(f"{norm!r} was folded into {layer!r}, and {kind} would make it anew. {instead}")
    computed = [name for name in simulated.weights if simulated.floats.layers[name].parameter is None]
    if computed:
        raise InvalidRequest(f"{kind} computes the weight of {computed[0]!r} anew, without its codes. {instead}")


def _require_same(own: SimulatedModel, folder: Path, example: Batch | None) -> None:
    """Raise InvalidRequest unless the folder gives the same model: its output for the example, and where there is
    none, its tensors.
    """
    kind: Any = type(own.model)
    loaded = kind.from_pretrained(folder, local_files_only=True).eval()
    if example is None:
        found = loaded.state_dict()
        pairs = [(x, found.get(name, x.new_zeros(0))) for name, x in own.model.state_dict().items()]
    else:
        few = first_samples(example, COMPARED)
        pairs = [(main_output(run_model(own.model, few)), main_output(run_model(loaded, few)))]
    if not all(_close(one, other) for one, other in pairs):
        raise InvalidRequest(
            f"What {kind.__name__}.from_pretrained makes of the saved folder does not compute what the quantized "
            "model does: its code rebuilds something that was changed. result.save() keeps everything, for "
            "quantkit.load()."
        )


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    largest = float(one.abs().max()) if one.numel() else 0.0
    return torch.allclose(one.float(), other.float(), rtol=0, atol=CLOSE * largest)
