"""What several tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from commands.pretrain_draft_model import Args, train_tokenizer
from toy_models import tiny_llama

SENTENCES = (
    "What does the function do?", "It adds two numbers and returns their sum.", "Show me an example, please.",
    "Ada has 12 apples and finds 7 more.", "The quick brown fox jumps over the lazy dog.",
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens with the suite's special tokens and chat template, trained on SENTENCES."""
    path: Path = tmp_path_factory.mktemp("tokenizer") / "sentences.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES * 4))
    return train_tokenizer(Args(output_dir="unused", dataset=["slim_pj"], dataset_path=str(path), train_tokenizer_size=320))


@pytest.fixture(scope="session")
def tiny_target_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A saved random Llama of 4 blocks with the tokenizer above, as `--model_path` takes it."""
    path = tmp_path_factory.mktemp("target") / "tiny-llama"
    tiny_llama(vocab_size=len(tokenizer)).float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
