"""Load exported folders in a new process, as any user would: python exported.py IDS.pt OUT.pt FOLDER..."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "def memory(x):\n\treturn momentum  # é ‱ 😀"


def main(given: str, out: str, *folders: str) -> None:
    torch.set_num_threads(1)
    ids = torch.load(given, weights_only=True)
    found = {}
    for folder in folders:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        assert model.get_input_embeddings().padding_idx is None  # fine-tuning would not change its row
        assert model.config.bos_token_id is None and model.generation_config.pad_token_id == 0
        end = [model.config.eos_token_id, model.generation_config.eos_token_id, tokenizer.eos_token_id]
        tokens = tokenizer(TEXT)["input_ids"]
        found[folder] = {"logits": logits, "end": end, "tokens": tokens, "text": tokenizer.decode(tokens)}
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
