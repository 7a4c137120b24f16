"""TRL's SFTTrainer on a tiny model that is made here."""

import warnings

import pytest
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers_runs import Keep, losses

from gradclip.errors import DoubleClippingError
from gradclip.integrations.transformers import ClippingTrainerMixin, GradientClippingCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    from trl import SFTConfig, SFTTrainer

LIMIT, STEPS, WORDS = 0.1, 6, 32


class ClippedTrainer(ClippingTrainerMixin, SFTTrainer):
    pass


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def trainer_for(trainer, folder, callbacks=(), **options):
    disable_progress_bar()
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{n}": n for n in range(3, WORDS)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    rows = [[(3 + n * k) % WORDS for k in range(12)] for n in range(4 * STEPS)]
    with warnings.catch_warnings():
        # Of its own arguments: gradient_checkpointing has another name in transformers 5.24.
        warnings.simplefilter("ignore", FutureWarning)
        args = SFTConfig(
            str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            dataloader_pin_memory=False,
            **options,
        )
        return trainer(
            model(),
            args,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )


def test_it_trains_as_the_trainers_own_clipping(tmp_path):
    own = trainer_for(SFTTrainer, tmp_path, max_grad_norm=LIMIT)
    own.train()
    for trainer in (SFTTrainer, ClippedTrainer):
        callback = GradientClippingCallback(LIMIT)
        ours = trainer_for(trainer, tmp_path, [callback], max_grad_norm=0)
        ours.train()

        assert len(losses(ours)) == STEPS
        assert losses(ours) == pytest.approx(losses(own), rel=1e-6)
        for have, want in zip(ours.state.log_history[:-1], own.state.log_history[:-1], strict=True):
            assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)
            assert have["gradclip/norm_pre"] == pytest.approx(want["grad_norm"], rel=1e-5)
            assert have["gradclip/clip_fraction"] == 1.0
            assert "mean_token_accuracy" in have  # TRL's own


def test_a_nan_changes_nothing(tmp_path):
    class Poisoned(ClippedTrainer):
        def training_step(self, model, *args, **options):
            loss = super().training_step(model, *args, **options)
            if self.state.global_step == 2:
                self.model.lm_head.weight.grad[0, 3] = float("nan")
            return loss

    callback = GradientClippingCallback(LIMIT)
    keep = Keep(callback)
    trainer_for(Poisoned, tmp_path, [callback, keep], max_grad_norm=0).train()

    assert [bool(result.skipped) for result in keep.results] == [n == 2 for n in range(STEPS)]
    assert keep.results[2].to_host().nonfinite == 1
    for name, weight in keep.weights[2].items():
        assert torch.equal(weight, keep.weights[1][name])
    assert any(not torch.equal(w, keep.weights[3][name]) for name, w in keep.weights[2].items())


def test_its_default_clips_and_is_refused(tmp_path):
    with pytest.raises(DoubleClippingError, match=r"max_grad_norm = 1\.0"):
        trainer_for(SFTTrainer, tmp_path, [GradientClippingCallback(LIMIT)]).train()
