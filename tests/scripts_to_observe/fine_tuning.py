"""TRL's SFTTrainer on a tiny language model that is made here."""

import sys
import tempfile
import warnings

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

warnings.simplefilter("ignore")
from trl import SFTConfig, SFTTrainer

torch.manual_seed(0)
words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{n}": n for n in range(3, 32)}}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
    pad_token="<pad>",
    eos_token="<eos>",
    unk_token="<unk>",
)
config = LlamaConfig(
    vocab_size=32,
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
rows = [[(3 + n * k) % 32 for k in range(12)] for n in range(128)]
with tempfile.TemporaryDirectory() as folder:
    args = SFTConfig(
        folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=4,
        max_steps=32,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        logging_strategy="no",
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    data = Dataset.from_dict({"input_ids": rows})
    trainer = SFTTrainer(
        LlamaForCausalLM(config), args, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
states = trainer.model.state_dict(), trainer.optimizer.state_dict(), torch.get_rng_state()
torch.save(states, sys.argv[1])
