"""What all cases share: sizes, a model and a tokenizer made here, texts of realistic lengths, and
how memory is read. Nothing is downloaded."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

#: The students and teachers have equal shapes; seeds tell them apart.
STUDENT_SEED, TEACHER_SEED = 1, 2
CLIP, LR = 1.0, 1e-5
#: Of the adapters; their alpha is twice that.
RANK = 16


@dataclass(frozen=True)
class Size:
    """`batch`: of each task (rows of a micro-batch, micro-batches of a step, tokens of a row).
    `steps` are measured, after as many of warm-up; `documents` of sft are enough for both."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    sft: tuple[int, int, int]
    kd: tuple[int, int, int]
    steps: int
    rounds: int
    documents: int
    weights: bool = True  # a second model's, which `kd` has as its teacher and `lora` as its base
    dpo: tuple[int, int, int] = (2, 1, 128)  # pairs, micro-batches, tokens of a pair's row


#: The shape of Llama-3.2-1B; distillation at 32 x 1,024 tokens.
FULL = Size(2048, 16, 32, 8, 8192, 128256, (4, 2, 2048), (4, 8, 1024), 10, 3, 1500,
            dpo=(4, 1, 2048))  # fmt: skip
TINY = Size(64, 2, 4, 2, 128, 4096, (4, 1, 128), (2, 2, 128), 4, 1, 200)
#: Those of `--gpu`: the shapes of Llama-3.2-1B, Llama-3.2-3B and Llama-3.1-8B, without a teacher.
GPU_1B = Size(2048, 16, 32, 8, 8192, 128256, (8, 1, 2048), (4, 8, 1024), 10, 1, 2000, weights=False)
GPU_3B = Size(3072, 28, 24, 8, 8192, 128256, (4, 1, 2048), (4, 8, 1024), 8, 1, 1500, weights=False)
GPU_8B = Size(4096, 32, 32, 8, 14336, 128256, (4, 1, 2048), (4, 8, 1024), 8, 1, 1500)
SIZES = {"tiny": TINY, "full": FULL, "1b": GPU_1B, "3b": GPU_3B, "8b": GPU_8B}
#: `--gpu --tiny`: the same files are prepared and the same cases run, on the toy.
SIZES |= {f"{name} tiny": replace(TINY, weights=SIZES[name].weights) for name in ("1b", "3b", "8b")}


class Absent(Exception):
    """A case that cannot be measured here, and why: a baseline that cannot be imported, a device or
    an installation that lacks what the case is about."""


def prepare(work: Path, size: Size, on_gpu: bool) -> None:
    """Write a tokenizer, the student's configuration, the teacher and the texts into `work`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokens = write_tokenizer(work / "student", size.vocabulary)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        head_dim=size.hidden // size.heads, intermediate_size=size.intermediate,
        tie_word_embeddings=True, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(work / "student")
    torch.manual_seed(TEACHER_SEED)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if size.weights:
        with torch.device("cuda" if on_gpu else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(work / "teacher")
        tokens.save_pretrained(work / "teacher")
    micro, accumulate, length = size.kd
    write_texts(work / "sft.jsonl", mixed_lengths(size.documents, size.sft[2]), size.vocabulary)
    full = [length] * (2 * size.steps * micro * accumulate)  # padding plays no part
    write_texts(work / "kd.jsonl", full, size.vocabulary)
    write_pairs(work / "dpo.jsonl", size)


def write_tokenizer(folder: Path, vocabulary: int) -> Any:
    """One token a word: `w17` has an id of its own, so that a text has the length it is given."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<|endoftext|>", "<|pad|>", *(f"w{i}" for i in range(vocabulary - 2))]
    ids = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    folder.mkdir(parents=True)
    wrapped.save_pretrained(folder)
    return wrapped


def mixed_lengths(count: int, length: int) -> list[int]:
    """Log-normal lengths with their mean at about a quarter of a row, cut at the row."""
    drawn = np.random.default_rng(0).lognormal(np.log(length / 6), 0.9, count)
    return [int(tokens) for tokens in np.clip(drawn, 4, length)]


def write_texts(path: Path, lengths: list[int], vocabulary: int) -> None:
    """Random words; a text of n tokens is n - 1 words and its end."""
    random = np.random.default_rng(1)
    with path.open("w") as file:
        for tokens in lengths:
            words = random.integers(0, vocabulary - 2, tokens - 1)
            file.write(json.dumps({"text": " ".join(f"w{word}" for word in words)}) + "\n")


def write_pairs(path: Path, size: Size) -> None:
    """Pairs that fill their rows: a prompt of an eighth, and two answers, of random words."""
    random = np.random.default_rng(2)
    prompt, answer = pair_lengths(size)
    micro, accumulate, _ = size.dpo
    with path.open("w") as file:
        for _ in range(2 * size.steps * micro * accumulate):
            drawn = random.integers(0, size.vocabulary - 2, prompt + 2 * answer)
            words = [f"w{word}" for word in drawn]
            line = {
                "prompt": " ".join(words[:prompt]),
                "chosen": " " + " ".join(words[prompt : prompt + answer]),
                "rejected": " " + " ".join(words[prompt + answer :]),
            }
            file.write(json.dumps(line) + "\n")


def pair_lengths(size: Size) -> tuple[int, int]:
    """Words of a pair's prompt and of each answer; with its end, an answer has a token more."""
    length = size.dpo[2]
    prompt = length // 8
    return prompt, length // 2 - prompt - 1


def pair_tokens(size: Size) -> int:
    """Tokens of a pair, as both sides read them: each answer with its prompt and its end."""
    prompt, answer = pair_lengths(size)
    return 2 * (prompt + answer + 1)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def student(work: Path, device: Any, attention: str) -> Any:
    """The student as every baseline gets it: the same weights as ours, fp32, in training mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(STUDENT_SEED)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(work / "student"),
        dtype=torch.float32,
        attn_implementation=attention,
    )
    return model.to(device).train()


def teacher(work: Path, device: Any, attention: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        work / "teacher", dtype=dtype, attn_implementation=attention
    )
    return model.to(device).eval().requires_grad_(False)


def now(device: Any) -> float:
    """Seconds since an arbitrary moment: by the wall after the work of a GPU, on a CPU those that
    this process has had of it, which other programs do not lengthen."""
    synchronize(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def synchronize(device: Any) -> None:
    """Wait for the device, so that a clock read next tells when its work was done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(device: Any) -> float:
    """The most that was allocated on the GPU; on a CPU the highest resident set of this process,
    imports included."""
    import torch

    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmHWM in /proc/self/status")
