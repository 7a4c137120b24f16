"""A small model and data for the scripts: outputs by name, two losses among them."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from torch import nn
from torch.utils.data import DataLoader, Dataset

CLASSES = 7


class Rows(Dataset):
    """Inputs and classes, the same for every seed."""

    def __init__(self, count, *, named):
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(count, 5, generator=generator)
        self.classes = torch.randint(CLASSES, (count,), generator=generator)
        self.named = named

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, number):
        row = self.inputs[number], self.classes[number]
        return {"inputs": row[0], "classes": row[1]} if self.named else row


def loader(count, batch_size, *, named, shuffle=True):
    return DataLoader(
        Rows(count, named=named), batch_size=batch_size, shuffle=shuffle, num_workers=0
    )


class Classifier(nn.Sequential):
    """Takes inputs, returns logits."""

    def __init__(self):
        super().__init__(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1))
        self.append(nn.Linear(16, CLASSES))


class Policy(nn.Module):
    """Takes a batch, returns two losses and the logits, as the models of the projects do."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(5, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, batch):
        features = self.backbone(batch["inputs"]).tanh()
        logits = self.head(features)
        losses = nn.functional.cross_entropy(logits, batch["classes"], reduction="none")
        return {"loss_cls": losses, "loss_size": 0.1 * features.pow(2).mean(), "logits": logits}

    def accelerator_save_state_pre_hook(self, models, weights, output_dir):
        assert len(models) == len(weights) == 1
        text = json.dumps({"classes": CLASSES})
        (Path(output_dir) / "model.config.json").write_text(text, encoding="utf-8")


class Accuracy:
    """A metric that is given the accelerator, and keeps what it computed."""

    def __init__(self):
        self.computed = []
        self.reset()

    def reset(self):
        self.right = self.count = 0

    def update(self, batch, model_outputs):
        guesses = model_outputs["logits"].argmax(1)
        self.right += int((guesses == batch["classes"]).sum())
        self.count += len(guesses)

    def compute(self, accelerator=None):
        assert accelerator is not None
        self.computed.append(self.right / self.count)
        return self.computed[-1]


def project(workspace, *, limit=32, accumulate=1, **fields):
    """Return the accelerator that the scripts make, with TensorBoard."""
    accelerator = Accelerator(
        cpu=True,
        log_with="tensorboard",
        gradient_accumulation_steps=accumulate,
        project_config=ProjectConfiguration(
            project_dir=str(workspace),
            logging_dir=str(Path(workspace) / "logs"),
            automatic_checkpoint_naming=True,
            total_limit=limit,
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        **fields,
    )
    accelerator.init_trackers("tensorboard")
    return accelerator
