"""Optimizers that compile their steps run them as they are: to compile takes minutes."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"
