"""More networks for the zoo: unusual ways to write what the usual ones compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from tests.program.models import IMAGE, TOKENS, VECTOR, MobileNetBlock, Net, conv_bn, randn
from tests.program.networks import ZOO, family

__all__ = ["ZOO"]


@family()
def dataclass_output():
    @dataclass
    class Output:
        logits: Tensor
        features: Tensor

    def forward(self, x):
        features = self.conv(x)
        return Output(self.head(F.relu(self.norm(features)).mean((2, 3))), features)

    return Net(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), head=nn.Linear(4, 3)), IMAGE


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


@family()
def weight_standardisation():
    return nn.Sequential(StandardisedConv(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 3)), IMAGE


class DynamicConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, x.mean() * self.weight, self.bias)


@family(**{"0": "its weight is read by 0/mul"})
def weight_scaled_by_activations():
    return nn.Sequential(DynamicConv(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), IMAGE


@family()
def weight_norm():
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 3)), IMAGE


@family()
def spectral_norm():
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 2)), VECTOR


@family()
def weight_norm_of_old():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 3))
    return model, IMAGE


@family()
def spectral_norm_of_old():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 2)), VECTOR


@family()
def pruned():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model, VECTOR


@family()
def gradient_checkpointing():
    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False).mean((2, 3)))

    return Net(forward, body=nn.Sequential(conv_bn(3, 4), conv_bn(4, 4)), head=nn.Linear(4, 3)), IMAGE


@family()
def nested_sequentials():
    inner = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4))), nn.Hardswish())
    return nn.Sequential(inner, nn.ModuleDict({"a": nn.Conv2d(4, 4, 1)})["a"], nn.Flatten(), nn.Linear(144, 3)), IMAGE


@family()
def custom_leaf_with_several_operations():
    class Gate(nn.Module):
        def forward(self, x):
            y = torch.relu(x)
            return y + torch.tanh(x)

    return nn.Sequential(nn.Conv2d(3, 4, 3), Gate(), nn.Conv2d(4, 2, 3)), IMAGE


@family()
def module_named_input():
    model = Net(lambda self, x: self.output(self.input(x)), input=nn.Conv2d(3, 4, 3), output=nn.Conv2d(4, 2, 3))
    return model, IMAGE


@family()
def learned_query():
    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 2, 8))
            self.fc, self.mix = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            query = self.fc(self.query.expand(x.shape[0], -1, -1))
            return self.mix(x).mean(1, keepdim=True) + query

    return Query(), TOKENS


@family()
def position_expanded_before_adding():
    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(5, 8))
            self.fc, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.fc(x) + self.position.expand_as(x)) + self.fc(x + self.position.expand_as(x))

    return Position(), TOKENS


@family(two="no recorded call made")
def assignment_into_a_slice():
    def forward(self, x):
        x = self.one(x)
        x[:, :2] = torch.tanh(x[:, 2:])
        return self.two(x)

    return Net(forward, one=nn.Conv2d(3, 4, 3), two=nn.Conv2d(4, 2, 3)), IMAGE


@family(two="no recorded call made")
def in_place_on_a_view():
    def forward(self, x):
        x = self.one(x)
        x[:, :2].relu_()
        x.view(-1).mul_(2.0)
        return self.two(x)

    return Net(forward, one=nn.Conv2d(3, 4, 3), two=nn.Conv2d(4, 2, 3)), IMAGE


@family()
def transposed_by_attribute():
    def forward(self, x):
        return self.channels(self.tokens(x.mT).mT)

    return Net(forward, tokens=nn.Linear(5, 5), channels=nn.Linear(8, 8)), TOKENS


class SwishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        s = torch.sigmoid(ctx.saved_tensors[0])
        return gradient * s * (1 + ctx.saved_tensors[0] * (1 - s))


@family()
def custom_autograd_function():
    model = Net(
        lambda self, x: self.two(SwishFunction.apply(self.one(x))), one=nn.Conv2d(3, 4, 3), two=nn.Conv2d(4, 2, 3)
    )
    return model, IMAGE


@family()
def graph_network():
    def forward(self, x, edges):
        messages = self.message(x)[edges[0]]
        return self.head(torch.zeros_like(x).index_add(0, edges[1], messages) + x)

    edges = torch.randint(0, 9, (2, 20), generator=torch.Generator().manual_seed(0))
    return Net(forward, message=nn.Linear(6, 6), head=nn.Linear(6, 3)), ((randn(9, 6), edges), {})


@family()
def functional_weights():
    def forward(self, x):
        return self.two(F.relu(F.conv2d(x, self.one.weight, self.one.bias)))

    return Net(forward, one=nn.Conv2d(3, 4, 3), two=nn.Conv2d(4, 2, 3)), IMAGE


@family()
def input_normalised_in_place():
    def forward(self, x):
        x -= 0.5
        x /= 2.0
        return self.conv(x)

    return Net(forward, conv=nn.Conv2d(3, 4, 3)), IMAGE


@family()
def mobilenet():
    return nn.Sequential(
        conv_bn(3, 4), MobileNetBlock(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ), IMAGE


@family()
def convolution_reused():
    model = Net(lambda self, x: self.conv(torch.tanh(self.conv(x)) * 3), conv=nn.Conv2d(3, 3, 3, padding=1))
    return model, IMAGE


@family(two="no recorded call made")
def scripted_activation():
    swish = torch.jit.script(swish_of_old)
    return Net(lambda self, x: self.two(swish(self.one(x))), one=nn.Conv2d(3, 4, 3), two=nn.Conv2d(4, 2, 3)), IMAGE


def swish_of_old(x):
    return x * torch.sigmoid(x)


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with its activation inside, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


@family()
def batch_norm_with_activation_inside():
    return nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4), nn.Conv2d(4, 2, 3)), IMAGE


@family()
def batch_norm_under_two_names():
    norm = nn.BatchNorm2d(4)
    model = Net(
        lambda self, x: self.two(self.b(self.one(x))), a=norm, b=norm, one=nn.Conv2d(3, 4, 3), two=nn.Conv2d(4, 2, 1)
    )
    return model, IMAGE


@family()
def stacked_frames_shifted_in_time():
    def forward(self, x):
        y = self.one(x)
        shifted = torch.zeros_like(y)
        shifted[1:] = y[:-1]
        return self.head((y + shifted).mean((2, 3)))

    return Net(forward, one=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 3)), IMAGE


@family()
def masked_convolution():
    class Masked(nn.Conv2d):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            self.register_buffer("mask", torch.ones_like(self.weight))
            self.mask[:, :, 2:] = 0

        def forward(self, x):
            self.weight.data *= self.mask
            return super().forward(x)

    return nn.Sequential(Masked(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), IMAGE
