"""What is clipped: the shapes of the parameters of real models, and one model whole."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

Shapes = list[tuple[int, ...]]


class Case(NamedTuple):
    """Gradients of one model in one dtype."""

    name: str
    shapes: Shapes
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


def gpt(layers: int, width: int, vocabulary: int, context: int) -> Shapes:
    """A decoder as GPT-2: 12 tensors a layer, and 4 more."""
    block: Shapes = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *(block * layers), (width,), (width,)]


def gpt2_124m() -> Shapes:
    """148 tensors."""
    return gpt(12, 768, 50257, 1024)


def resnet50() -> Shapes:
    """161 tensors."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            for shape in ((width, width_in, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * width, width_in, 1, 1), (4 * width,), (4 * width,)]
            width_in = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def language_model(layers: int, width: int, hidden: int, vocabulary: int = 128256) -> Shapes:
    """A decoder with grouped-query attention (a quarter of the heads) and gated layers."""
    kv = width // 4
    layer: Shapes = [(width, width), (kv, width), (kv, width), (width, width)]
    layer += [(hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(vocabulary, width), *(layer * layers), (width,), (vocabulary, width)]


def mixture_of_experts(layers: int = 16, experts: int = 64) -> Shapes:
    """3168 tensors, 1.7 G elements."""
    width, hidden = 1024, 512
    expert: Shapes = [(hidden, width), (hidden, width), (width, hidden)]
    attention: Shapes = [(width, width)] * 4
    return (expert * experts + attention + [(experts, width), (width,)]) * layers


class Block(nn.Module):
    """A residual block of ResNet-18."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = (
            nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            if stride > 1
            else nn.Identity()
        )

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.body(image) + self.shortcut(image))


class RobotPolicy(nn.Module):
    """Actions from a camera image: ResNet-18, a style encoder and a transformer; 292 tensors."""

    def __init__(self, width: int = 512, hidden: int = 3200, actions: int = 14) -> None:
        super().__init__()
        stages: list[nn.Module] = [
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        width_in = 64
        for stage in (64, 128, 256, 512):
            stages += [Block(width_in, stage, 1 + (stage > 64)), Block(stage, stage, 1)]
            width_in = stage
        self.camera = nn.Sequential(*stages)
        self.project = nn.Linear(512, width)
        layer = nn.TransformerEncoderLayer(width, 8, hidden, dropout=0.0, batch_first=True)
        self.style = nn.TransformerEncoder(layer, 4)
        self.transformer = nn.Transformer(width, 8, 4, 7, hidden, dropout=0.0, batch_first=True)
        self.queries = nn.Parameter(torch.zeros(1, 50, width))
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.head = nn.Linear(width, actions)

    def forward(self, image: Tensor) -> Tensor:
        seen = self.project(self.camera(image).flatten(2).transpose(1, 2))
        batch = len(image)
        style = self.style(torch.cat([self.start.expand(batch, -1, -1), seen], 1))[:, :1]
        queries = self.queries.expand(batch, -1, -1)
        result: Tensor = self.head(self.transformer(torch.cat([style, seen], 1), queries))
        return result


def robot_policy() -> Shapes:
    """The shapes of ``RobotPolicy``."""
    with torch.device("meta"):
        return [tuple(parameter.shape) for parameter in RobotPolicy().parameters()]


def cases() -> list[Case]:
    """From the smallest to the largest."""
    fp32, bf16 = torch.float32, torch.bfloat16
    large = language_model(16, 2048, 8192)
    return [
        Case("perceptron", [(64, 64), (64,), (64, 64), (64,)], fp32),
        Case("3168 tensors of 64", [(64,)] * 3168, fp32),
        Case("small GPT 13 M", gpt(6, 384, 6000, 256), fp32),
        Case("ResNet-50", resnet50(), fp32),
        Case("ResNet-50", resnet50(), bf16),
        Case("robot policy", robot_policy(), fp32),
        Case("GPT-2 124M", gpt2_124m(), fp32),
        Case("GPT-2 124M", gpt2_124m(), bf16),
        Case("one tensor of 1e8", [(100_000_000,)], fp32),
        Case("language model 1.5 G", large, fp32),
        Case("language model 1.5 G", large, bf16),
        Case("mixture of experts 1.7 G", mixture_of_experts(), bf16),
        Case("language model 8 G", language_model(32, 4096, 14336), bf16),
    ]
