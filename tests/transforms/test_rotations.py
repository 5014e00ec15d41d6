"""Rotations leave what a network computes as it is, by explicit matrices and on whole architectures in float64, or say
what is in their way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit.errors import InvalidRequest
from quantkit.program.arguments import replaced
from quantkit.program.inputs import Batch
from quantkit.targets import Target
from quantkit.transforms import rotate_heads, rotate_stream
from quantkit.transforms.known import TRANSFORMS
from quantkit.transforms.norms import normalizations
from quantkit.transforms.orthogonal import keeping_ones, random_hadamard
from quantkit.transforms.prepare import Prepared, prepare
from quantkit.transforms.registry import Proposal, Setting
from quantkit.transforms.residual_stream import residual_streams
from tests.program.nets import huggingface
from tests.program.nets.entry import BatchBuilder

WIDTH, HEADS = 12, 3
EXACT = 1e-9


class Root(nn.Module):
    """An RMSNorm, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        self.inner = x.pow(2)
        return x * torch.rsqrt(self.inner.mean(-1, keepdim=True) + 1e-6) * self.weight


class Toy(nn.Module):
    """A pre-norm transformer of one block on vectors of tokens; ``way`` changes one thing."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        self.embed = nn.Linear(5, WIDTH)
        self.positions = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.first, self.second, self.last = norm(WIDTH), norm(WIDTH), norm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 3, bias=way != "no bias")
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, tokens: Tensor) -> Any:
        x = self.embed(tokens) + self.positions
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        if self.way == "activation":
            x = torch.relu(x)
        y = self.second(x)
        x = x + self.down(F.gelu(self.up(y)))
        if self.way == "read twice":
            x = x + y
        made = self.head(self.last(x))
        if self.way == "gain elsewhere":
            made = made + self.last.weight.sum()
        if self.way == "bias elsewhere":
            made = made + self.out.bias.sum()
        if self.way == "inside a norm":
            made = made + self.last.inner.mean(-1, keepdim=True)
        return (made, x) if self.way == "returned" else (made, v) if self.way == "values returned" else made


def toy(norm: Callable[[int], nn.Module] = nn.LayerNorm, way: str = "plain") -> Prepared:
    torch.manual_seed(0)
    return prepare(Toy(norm, way).eval(), [tokens()], Target.load("onnxruntime-cpu"))


def tokens(seed: int = 0) -> Batch:
    return (torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed)),), {}


def proposed(ready: Prepared, name: str) -> Proposal:
    return TRANSFORMS[name].propose(Setting(ready, (), {}, {}, seed=3))


def outputs(ready: Prepared, batch: Batch) -> list[Tensor]:
    """What a replay makes of a batch with everything in float64, the casts of the network's own code too."""
    model = ready.model

    def widened(leaf: Any) -> Any:
        return torch.float64 if leaf is torch.float32 else leaf

    steps = [(step, replaced((step.args, step.kwargs), widened)) for step in ready.program.steps]
    wide = tuple(replace(step, args=args, kwargs=kwargs) for step, (args, kwargs) in steps)
    program = replace(ready.program, steps=wide)
    state = {n: x.double() if x.is_floating_point() else x for n, x in program.state_of(model).items()}
    given = {n: x.double() if x.is_floating_point() else x for n, x in program.entering(model, batch).items()}
    with torch.no_grad():
        return [x for x in program.replay(given, state, program.outputs) if x.is_floating_point()]


def difference(ready: Prepared, name: str, batch: Batch) -> float:
    """How much a rotation changes what is made of a batch, in float64, as a share of the largest."""
    changes = proposed(ready, name).changes
    assert changes
    ready.model.double()
    before, weights = outputs(ready, batch), [x.clone() for x in ready.model.state_dict().values()]
    for change in changes:
        change.apply(ready.weights)
    after = outputs(ready, batch)
    assert any(not torch.equal(x, y) for x, y in zip(weights, ready.model.state_dict().values(), strict=True))
    pairs = zip(before, after, strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def mistral() -> nn.Module:
    hf = huggingface.transformers()
    return hf.MistralForCausalLM(hf.MistralConfig(**huggingface.decoder(sliding_window=3)))


def qwen3_with_own_head() -> nn.Module:
    hf = huggingface.transformers()
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**huggingface.decoder(head_dim=8)))


def swin_of_three_stages() -> nn.Module:
    """Its second stage is read by a norm of four times its width."""
    hf = huggingface.transformers()
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 1, 1), "num_heads": (2, 4, 8)}
    return hf.SwinForImageClassification(hf.SwinConfig(**sizes, window_size=2, initializer_range=0.3, num_labels=3))


class TorchEncoder(nn.Module):
    """Layers of torch's own, whose packed projections are cut while they run."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 20, dropout=0.0, norm_first=True, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.encoder(self.embed(x)).mean(1))
        return made


TEXT, IMAGES = huggingface.text(), huggingface.pixels(16)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], BatchBuilder]] = {
    "bert": (huggingface.bert, huggingface.text("right")),
    "vit": (huggingface.vit, IMAGES),
    "gpt2": (huggingface.gpt2, TEXT),
    "llama": (huggingface.llama, TEXT),
    "qwen3": (huggingface.qwen3, TEXT),
    "qwen3 with a head of its own": (qwen3_with_own_head, TEXT),
    "mistral": (mistral, TEXT),
    "gemma2": (huggingface.gemma2, TEXT),
    "swin": (swin_of_three_stages, huggingface.pixels(32)),
    "torch": (TorchEncoder, lambda samples, length=None, seed=0: tokens(seed)),
}
STREAMS = ("torch", "vit", "llama", "qwen3 with a head of its own", "mistral", "swin")
IN_THE_WAY = {
    "bert": ("bert.encoder.layer.0.attention.output/add", "the norm bert.embeddings.LayerNorm writes to it"),
    "gpt2": (
        "transformer/add.1",
        "transformer.wte cannot absorb transformer.ln_f.weight, as it is used without it too",
    ),
    "qwen3": (
        "model.embed_tokens/embedding",
        "model.embed_tokens cannot absorb model.norm.weight, as it is used without",
    ),
    "gemma2": ("model.embed_tokens/mul", "the norm model.layers.0.post_attention_layernorm writes to it"),
    "swin": ("swin.embeddings.norm/layer_norm", "the norm swin.embeddings.norm writes to it"),
}


def network(name: str) -> tuple[Prepared, BatchBuilder]:
    """A tiny network with gains, shifts and biases drawn at random."""
    build, batch = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.5 * torch.randn(parameter.shape))
    return prepare(model, [batch(2)], Target.load("onnxruntime-cpu")), batch


@pytest.mark.parametrize("name", STREAMS)
def test_turned_streams_leave_outputs_of_architectures_as_they_are(name: str) -> None:
    ready, batch = network(name)
    assert difference(ready, rotate_stream.NAME, batch(2, seed=5)) < EXACT


@pytest.mark.parametrize("name", NETWORKS)
def test_turned_heads_leave_outputs_of_architectures_as_they_are(name: str) -> None:
    ready, batch = network(name)
    assert difference(ready, rotate_heads.NAME, batch(2, seed=5)) < EXACT


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_streams_that_cannot_be_turned_say_why(name: str) -> None:
    at, reason = IN_THE_WAY[name]
    assert proposed(network(name)[0], rotate_stream.NAME).reasons[at].startswith(reason)


def test_every_stage_of_swin_behind_the_first_is_turned() -> None:
    ready, _ = network("swin")
    streams, _ = residual_streams(ready, normalizations(ready)[0])
    assert [stream.width for stream in streams] == [16, 32]
    assert any(read.norm.width == 4 * 16 for read in streams[0].norms)


def test_a_tied_head_follows_where_the_last_gain_is_the_same_for_all_channels() -> None:
    ready, batch = network("gpt2")
    gain, shift = (ready.model.get_parameter(f"transformer.ln_f.{name}") for name in ("weight", "bias"))
    gain.data.fill_(1.5)
    assert bool(shift.any())
    assert difference(ready, rotate_stream.NAME, batch(2, seed=5)) < EXACT


@pytest.mark.parametrize("way", ["plain", "no bias"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, Root])
def test_a_turned_stream_is_that_of_explicit_matrices(norm: Callable[[int], nn.Module], way: str) -> None:
    ready = toy(norm, way)
    (change,) = proposed(ready, rotate_stream.NAME).changes
    model = ready.model.double()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    change.apply(ready.weights)
    turn = random_hadamard(WIDTH, torch.Generator().manual_seed(3))
    turn = keeping_ones(turn) if norm is nn.LayerNorm else turn
    wanted = dict(before)
    for writer in ("embed", "out", "down"):
        wanted[f"{writer}.weight"] = torch.einsum("io,ij->oj", turn, before[f"{writer}.weight"])
        if f"{writer}.bias" in before:
            wanted[f"{writer}.bias"] = torch.einsum("i,io->o", before[f"{writer}.bias"], turn)
    wanted["positions"] = torch.einsum("bti,io->bto", before["positions"], turn)
    for reader, read in (("qkv", "first"), ("up", "second"), ("head", "last")):
        gain = before[f"{read}.weight"]
        wanted[f"{reader}.weight"] = torch.einsum("oi,i,ij->oj", before[f"{reader}.weight"], gain, turn)
        wanted[f"{read}.weight"] = torch.ones_like(gain)
        if norm is nn.LayerNorm:
            shift, folded = before[f"{read}.bias"], f"{reader}.bias" in before
            wanted[f"{read}.bias"] = 0 * shift if folded else torch.einsum("i,ij->j", shift / gain, turn)
            if folded:
                wanted[f"{reader}.bias"] = before[f"{reader}.bias"] + before[f"{reader}.weight"] @ shift
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-12, msg=name)


def test_turned_heads_are_those_of_explicit_matrices() -> None:
    ready = toy()
    (change,) = proposed(ready, rotate_heads.NAME).changes
    model = ready.model.double()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    change.apply(ready.weights)
    generator = torch.Generator().manual_seed(3)
    turn = torch.block_diag(*[random_hadamard(WIDTH // HEADS, generator) for _ in range(HEADS)])
    values = slice(2 * WIDTH, 3 * WIDTH)
    wanted = dict(before)
    wanted["qkv.weight"][values] = turn.T @ before["qkv.weight"][values].clone()
    wanted["qkv.bias"][values] = before["qkv.bias"][values].clone() @ turn
    wanted["out.weight"] = before["out.weight"] @ turn
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-12, msg=name)


def test_norms_commute_with_matrices_that_keep_ones_and_root_mean_squares_with_all() -> None:
    """And a LayerNorm of what was made to have no mean is an RMSNorm (Pre-RMSNorm, arXiv 2305.14858)."""
    x = torch.randn(50, WIDTH, dtype=torch.float64) + 2
    turn = random_hadamard(WIDTH, torch.Generator().manual_seed(0))
    kept = keeping_ones(turn)
    norm = F.layer_norm(x, (WIDTH,))
    torch.testing.assert_close(F.layer_norm(x @ kept, (WIDTH,)), norm @ kept, rtol=0, atol=1e-12)
    torch.testing.assert_close(F.rms_norm(x @ turn, (WIDTH,)), F.rms_norm(x, (WIDTH,)) @ turn, rtol=0, atol=1e-12)
    assert float((F.layer_norm(x @ turn, (WIDTH,)) - norm @ turn).abs().max()) > 0.1
    centered = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(F.rms_norm(centered, (WIDTH,), eps=1e-5), norm, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("activation", "/relu does not treat its channels alike"),
        ("read twice", "the norm second writes to it"),
        ("gain elsewhere", "last.weight is also read by /sum"),
        ("bias elsewhere", "out.bias is also read by /sum"),
        ("inside a norm", "what the norm last makes of it first is read by others"),
        ("returned", "the model returns /add.2"),
    ],
)
def test_what_is_in_the_way_of_a_stream_is_named(way: str, why: str) -> None:
    found = proposed(toy(Root if way == "inside a norm" else nn.LayerNorm, way), rotate_stream.NAME)
    assert not found.changes
    assert why in next(iter(found.reasons.values()))


def test_heads_whose_values_the_model_returns_stay() -> None:
    found = proposed(toy(way="values returned"), rotate_heads.NAME)
    assert not found.changes
    assert found.reasons == {"/matmul.1": "the model returns the values"}


@pytest.mark.parametrize("name", [rotate_stream.NAME, rotate_heads.NAME])
def test_a_record_says_all_that_makes_the_change_again(name: str) -> None:
    first, second = toy(), toy()
    (change,) = proposed(first, name).changes
    change.apply(first.weights)
    records = json.loads(json.dumps([change.record()]))
    (again,) = TRANSFORMS[name].redo(Setting(second, (), {}, {}, seed=99), records)
    again.apply(second.weights)
    for one, other in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(InvalidRequest, match="'elsewhere', which the model does not have"):
        TRANSFORMS[name].redo(Setting(second, (), {}, {}), [{**records[0], "at": "elsewhere"}])
