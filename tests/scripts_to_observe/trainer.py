"""transformers' Trainer on a small model of its own."""

import sys
import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 1)

    def forward(self, inputs, targets):
        outputs = self.down(torch.tanh(self.norm(self.up(inputs))))
        return {"loss": nn.functional.mse_loss(outputs, targets), "logits": outputs}


torch.manual_seed(5)
inputs = torch.randn(160, 8)
rows = [{"inputs": row, "targets": 3 * row.sum(0, keepdim=True)} for row in inputs]
with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=40,
        learning_rate=0.01,
        max_grad_norm=1.0,
        logging_steps=10,
        logging_strategy="no",
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["targets"],
        dataloader_pin_memory=False,
    )
    trainer = Trainer(Model(), args, train_dataset=rows)
    trainer.train()
states = trainer.model.state_dict(), trainer.optimizer.state_dict(), torch.get_rng_state()
torch.save(states, sys.argv[1])
