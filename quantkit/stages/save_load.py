"""A quantized model on disk: ``plan.json`` beside ``weights.safetensors``.

``weights.safetensors`` holds, for every quantized layer, the tensors of ``numbers.packed_weight`` under
``<layer>.weight``: codes packed at true width, scales and, where the format has them, zero points, or float16 values;
and every other tensor of the model's state under its own name. Its header has one entry, ``quantkit_model``, JSON
with:

- ``version``; ``plan``, the digest of the plan these codes obey; ``digest`` of this header and all tensors;
- ``layers``: layer name -> weight format, shape and where the model holds it;
- ``folds``: (layer, BatchNorm) pairs that were folded, so that the model's modules can be brought to the same form;
- ``sites``: name, place, echoes and copies of each as (scope, operation, index, output), consumers, shape, roles;
- ``ranges``: site name -> kind of quantizer, and what that kind holds (``numbers.kinds``);
- ``bias_calls``, where a layer is called on inputs of several scales: the key, layer and site of each such call;
- ``halves``, where what stays float is stored as float16: the names of what is, and computes as float32;
- ``shapes``, where sizes vary in the calibration data: the shapes of the model's inputs in a few batches of it.

Neither file holds code. Loading needs the float model, in the type that it had, for its architecture and the buffers
that its state leaves out, as frequencies of positions are, and gives bit-identical outputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quantkit.errors import CorruptFile, InvalidRequest, did_you_mean
from quantkit.formats import Scheme
from quantkit.numbers.half import is_half_exactly
from quantkit.numbers.kinds import AnyWeight, range_of
from quantkit.numbers.packed_weight import PARTS, stored_tensors, stored_weight
from quantkit.plan import Plan, canonical_json
from quantkit.program.halves import keep_only_matrices_half
from quantkit.program.input_shapes import InputShapes
from quantkit.program.integer_biases import BiasCall
from quantkit.program.intercept import OpKey, device_of
from quantkit.program.layers import LayerWeight, Weights
from quantkit.program.sites import Site
from quantkit.program.updates import named_state
from quantkit.simulation.model import SimulatedModel
from quantkit.store import write_atomically
from quantkit.transforms.fold_bn import shape_like_folded
from quantkit.transforms.plain_weights import copy_with_computed_tensors, make_weights_plain

MODEL_VERSION = 3
Loaded = tuple[SimulatedModel, Plan, tuple[tuple[str, str], ...], tuple[InputShapes, ...]]
PLAN_FILE = "plan.json"
WEIGHTS_FILE = "weights.safetensors"
_HEADER = "quantkit_model"


def save_result(
    simulated: SimulatedModel,
    plan: Plan,
    folds: Iterable[tuple[str, str]],
    folder: str | Path,
    shapes: Sequence[InputShapes] = (),
) -> Path:
    """Write ``plan.json`` and ``weights.safetensors`` into ``folder``, each whole or not at all. ``shapes`` of the
    model's inputs say which of their sizes vary.
    """
    folder = Path(folder)
    tensors = _other_state(simulated)
    for name, weight in simulated.weights.items():
        tensors |= stored_tensors(weight, f"{name}.weight")
    floats = simulated.floats.layers
    header = {
        "version": MODEL_VERSION,
        "plan": plan.digest(),
        "layers": {n: {"format": str(w.format)} | floats[n].to_dict() for n, w in simulated.weights.items()},
        "updated": list(simulated.updated),
        "folds": [list(pair) for pair in folds],
        "sites": [asdict(site) for site in simulated.sites],
        "ranges": {name: found.to_dict() for name, found in simulated.ranges.items()},
    }
    if simulated.bias_calls:
        header["bias_calls"] = [asdict(call) for call in simulated.bias_calls]
    if simulated.half_floats:
        header["halves"] = halves = [name for name, tensor in tensors.items() if is_half_exactly(tensor)]
        tensors |= {name: tensors[name].to(torch.float16) for name in halves}
    if shapes:
        header["shapes"] = [{name: list(shape) for name, shape in form.items()} for form in shapes]
    header["digest"] = _digest(header, tensors)
    metadata = {_HEADER: canonical_json(header)}
    write_atomically(folder / WEIGHTS_FILE, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    plan.save(folder / PLAN_FILE)
    return folder


def load_result(folder: str | Path, model: nn.Module) -> Loaded:
    """(model, plan, folds, shapes) as ``save_result`` got them, on a copy of ``model``, the float model of the same
    architecture (its weights do not matter).

    Raises CorruptFile for damaged files, InvalidRequest for missing ones, an edited plan and a model that does not
    fit.
    """
    folder = Path(folder)
    plan = Plan.load(folder / PLAN_FILE)
    header, tensors = _read(folder / WEIGHTS_FILE)
    if header["plan"] != plan.digest():
        raise InvalidRequest(
            f"{str(folder / PLAN_FILE)!r} was changed after the weights beside it were made. "
            "Apply the plan to the model again."
        )
    own = _own_copy(model)
    folds = tuple((layer, norm) for layer, norm in header["folds"])
    try:
        shape_like_folded(own, folds)
        layers = {name: LayerWeight.from_dict(record) for name, record in header["layers"].items()}
        floats = Weights(
            own,
            layers,
            {
                n: torch.zeros(w.shape, dtype=torch.float32, device=device_of(own))
                for n, w in layers.items()
                if w.parameter is None
            },
        )
        covered = set(floats.covered(layers))
        weights = {name: _weight(name, record, floats, tensors) for name, record in header["layers"].items()}
    except AttributeError as error:
        raise InvalidRequest(f"The model is not of the saved architecture: {error}.") from error
    tensors |= {name: tensors[name].float() for name in header.get("halves", ())}
    _load_state(own, covered, tensors)
    sites = [_site(record) for record in header["sites"]]
    ranges = {name: range_of(record) for name, record in header["ranges"].items()}
    shapes = tuple({name: tuple(shape) for name, shape in form.items()} for form in header.get("shapes", ()))
    simulated = SimulatedModel(own, sites, weights, ranges, floats, header["updated"])
    simulated.half_floats = "halves" in header
    simulated.bias_calls = tuple(
        BiasCall(OpKey(**call["key"]), call["layer"], call["site"]) for call in header.get("bias_calls", ())
    )
    return simulated, plan, folds, shapes


def _own_copy(model: nn.Module) -> nn.Module:
    """A copy to load into; raises InvalidRequest for tensors without memory."""
    if without := [name for name, tensor in named_state(model).items() if tensor.is_meta]:
        raise InvalidRequest(
            f"These tensors of the model have no memory to load into: {', '.join(without[:5])}. Build it outside "
            "torch.device('meta'), or call model.to_empty(device='cpu') first."
        )
    own = copy_with_computed_tensors(model).eval()
    keep_only_matrices_half(own)
    make_weights_plain(own)
    return own


def _other_state(simulated: SimulatedModel) -> dict[str, Tensor]:
    """The model's state without the weights that are stored as codes."""
    coded = set(simulated.floats.covered(simulated.weights))
    state = simulated.model.state_dict()
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items() if name not in coded}


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256(canonical_json(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:16]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if header["version"] != MODEL_VERSION:
            raise ValueError(f"version {header['version']}, expected {MODEL_VERSION}")
        if header.pop("digest") != _digest(header, tensors):
            raise ValueError("its contents are not those that were written")
        return header, tensors
    except OSError as error:
        raise InvalidRequest(f"Cannot read the weights {str(path)!r}: {error.strerror or error}.") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptFile(
            f"{str(path)!r} is damaged, cut off or not written by quantkit ({error}). Save the result again."
        ) from error


def _weight(name: str, record: Mapping[str, Any], floats: Weights, tensors: dict[str, Tensor]) -> AnyWeight:
    """A layer's weight as it is stored, taken out of ``tensors``."""
    shape = tuple(record["shape"])
    if (own := tuple(floats[name].shape)) != shape:
        raise InvalidRequest(
            f"Layer {name!r} has a weight of shape {own} in the model and of {shape} in the saved file: this is not "
            "the model that was saved."
        )
    format = Scheme.parse(record["format"]).weight
    assert format is not None
    found = stored_weight(tensors, f"{name}.weight", shape, format)
    for part in PARTS:
        tensors.pop(f"{name}.weight.{part}", None)
    return found


def _load_state(model: nn.Module, covered: Collection[str], tensors: Mapping[str, Tensor]) -> None:
    """Load everything but the coded weights; raises InvalidRequest naming what does not fit."""
    wanted = {n: t for n, t in model.state_dict().items() if n not in covered}
    for name in wanted.keys() ^ tensors.keys():
        where = "the saved weights" if name in tensors else "the model"
        other = list(wanted if name in tensors else tensors)
        raise InvalidRequest(
            f"Only {where} has {name!r}: this is not the model that was saved.{did_you_mean(name, other)}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise InvalidRequest(
                f"{name!r} has shape {tuple(wanted[name].shape)} in the model and {tuple(tensor.shape)} in the saved "
                "weights: this is not the model that was saved."
            )
    own = named_state(model)
    for name in own.keys() & tensors.keys():
        own[name].data = own[name].data.to(tensors[name].dtype)  # as it was saved, whatever the architecture's type
    model.load_state_dict(dict(tensors), strict=False)


def _site(record: Mapping[str, Any]) -> Site:
    tuples = {part: tuple(record[part]) for part in ("consumers", "shape", "roles")}
    echoes, copies = (tuple(OpKey(**key) for key in record[part]) for part in ("echoes", "copies"))
    return Site(record["name"], OpKey(**record["place"]), echoes, copies=copies, **tuples)
