"""A random Llama of 100,000 parameters with a tokenizer, text and a configuration, in the working directory.

Run by the Python of a fresh environment, so it imports nothing of the tests.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CONFIGURATION = """
model: ./model
output_dir: ./run
data:
  train: ./text.jsonl
  max_length: 64
train:
  device: cpu
  max_steps: 6
  learning_rate: 3.0e-3
"""
END = "<|endoftext|>"
SENTENCES = ("The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs.")

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
tokenizer.save_pretrained("model")

torch.manual_seed(1)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=tokenizer.eos_token_id,
)
AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained("model")

rows = [json.dumps({"text": f"{number}. {SENTENCES[number % 2]}"}) for number in range(64)]
Path("text.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
Path("my.yaml").write_text(CONFIGURATION, encoding="utf-8")
