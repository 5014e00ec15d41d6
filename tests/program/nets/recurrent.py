"""Recurrent networks: the modules, and their cells in a loop over time."""

from __future__ import annotations

import torch
from torch import nn

from tests.program.nets.entry import architecture, sequences
from tools.zoo.plain import Recurrent

LENGTHS = (5, 8, 2)
SERIES = sequences(6, LENGTHS[0])


@architecture(SERIES, lengths=LENGTHS)
def lstm_bidirectional():
    return Recurrent(nn.LSTM(6, 7, num_layers=2, bidirectional=True, batch_first=True))


@architecture(SERIES, lengths=LENGTHS)
def lstm_with_projection():
    return Recurrent(nn.LSTM(6, 7, proj_size=4, batch_first=True))


@architecture(SERIES, lengths=LENGTHS)
def gru():
    return Recurrent(nn.GRU(6, 7, num_layers=2, batch_first=True))


@architecture(SERIES, lengths=LENGTHS)
def elman_network():
    return Recurrent(nn.RNN(6, 7, nonlinearity="relu", bias=False, batch_first=True))


class LastState(nn.Module):
    """Time before samples, a start that is given, and the last state as the summary."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.start, self.head = nn.GRU(6, 7), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        _, state = self.gru(x.transpose(0, 1), torch.tanh(self.start(x.mean(1)))[None])
        return self.head(state[-1])


@architecture(SERIES, lengths=LENGTHS)
def gru_from_given_state():
    return LastState()


class CellLoop(nn.Module):
    """An LSTM cell and a GRU cell, one step at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(6, 7), nn.GRUCell(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden, cell, top = x.new_zeros(len(x), 7), x.new_zeros(len(x), 7), x.new_zeros(len(x), 5)
        outputs = []
        for step in x.unbind(1):
            hidden, cell = self.lstm(step, (hidden, cell))
            top = self.gru(hidden, top)
            outputs.append(self.head(top))
        return torch.stack(outputs, 1)


@architecture(SERIES, lengths=LENGTHS, control_flow=("length",))
def cells_over_time():
    return CellLoop()


class PlainCell(nn.Module):
    """nn.RNNCell without a start: it makes zeros of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.RNNCell(6, 7), nn.Linear(7, 3)

    def forward(self, x):
        state = None
        for i in range(x.shape[1]):
            state = self.cell(x[:, i], state)
        return self.head(state)


@architecture(SERIES, lengths=LENGTHS, control_flow=("length",))
def plain_cell_over_time():
    return PlainCell()
