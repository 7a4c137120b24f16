"""The way in through TRL's trainers."""

import warnings
from functools import partial

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tiny_model import TinyModel, sgd
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from trained import Trained
from transformers import (
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from ways_by_transformers import Note, options

from gradclip.integrations.transformers import GradientClippingCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    from trl import SFTConfig, SFTTrainer


class TinyLanguageModel(PreTrainedModel, TinyModel):
    """What TRL takes for a language model: its loss is that of the tiny model."""

    config_class = PretrainedConfig

    def __init__(self):
        super().__init__(PretrainedConfig())
        self.generation_config = GenerationConfig()


class TinySFTTrainer(SFTTrainer):
    """The loss is the model's; all else is TRL's."""

    def compute_loss(self, model, inputs, **_):
        return model(**inputs)


def _rows(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def callback(feature, gradients, folder):
    disable_progress_bar()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<eos>": 0}, unk_token="<eos>")), eos_token="<eos>"
    )
    model, clipping = TinyLanguageModel(), GradientClippingCallback(**feature.clip)
    note = Note(partial(feature.assign, clipping))
    checkpoint, common = options(gradients, folder)
    with warnings.catch_warnings():
        # Of its own arguments: gradient_checkpointing has another name in transformers 5.24.
        warnings.simplefilter("ignore", FutureWarning)
        trainer = TinySFTTrainer(
            model,
            SFTConfig(
                str(folder),
                **common,
                bf16=False,
                gradient_checkpointing=False,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_list(gradients),
            data_collator=_rows,
            processing_class=tokenizer,
            callbacks=[note, clipping],
            optimizers=(sgd(model), None),
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    return Trained(note.after, clipping.stats, note.logged)
