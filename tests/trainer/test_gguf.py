"""GGUF files: read back by Transformers, and beside those of llama.cpp's own converter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from trainer import gguf_export, gguf_vocab
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError, Export, StageConfig, build
from trainer.data.corpus import python_reference
from trainer.export import export_model
from trainer.models import load_tokenizer
from trainer.shrink import shrink

gguf = pytest.importorskip("gguf")
SIZE = 400
LLAMA_3_1 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
    "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
#: Words as Llama 3, Qwen 2, gpt-oss and Mistral Nemo cut them.
SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for _, text in python_reference("train")][:40] + ["1984 2024 33 333 3333"] * 400


def make_tokenizer(folder: Path, texts: list[str], cut: str, bos: bool = False) -> str:
    """A small byte-level tokenizer that cuts words as `cut` says; `bos`: put before every text."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    machine = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in ("gpt-2", "smollm"))
    if cut in SPLITS:
        first: Any = pre_tokenizers.Split(Regex(SPLITS[cut]), "isolated")
        machine.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    elif cut == "smollm":
        machine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level])
    else:
        machine.pre_tokenizer = level
    machine.decoder = decoders.ByteLevel()
    specials = ["<|begin|>", "<|end|>", "<|pad|>"]
    machine.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=SIZE - 8, special_tokens=specials, show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )  # fmt: skip
    machine.add_tokens([AddedToken(text, normalized=False) for text in ("<tool>", "<｜User｜>")])
    if bos:
        machine.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B",
            special_tokens=[("<|begin|>", machine.token_to_id("<|begin|>"))],
        )  # fmt: skip
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=machine, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    wrapped.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    wrapped.save_pretrained(folder)
    return str(folder)


def make_model(folder: Path, family: str, tokenizer: str, **changes: Any) -> str:
    """A random model of two blocks beside its tokenizer; more outputs than tokens, as often."""
    import transformers

    tokens = load_tokenizer(tokenizer)
    settings: dict[str, Any] = {
        "vocab_size": SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
        "bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id, "initializer_range": 0.3,
    }  # fmt: skip
    dtype = changes.pop("dtype", torch.float32)
    configuration = getattr(transformers, f"{family}Config")(**{**settings, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("_bias"):  # else ones and zeros: all alike
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return str(folder)


Exported = tuple[Path, dict[str, float], list[str]]


def export(model: str, folder: Path, quantize: str = "f32") -> Exported:
    lines: list[str] = []
    facts = export_model(Export(model, format="gguf", quantize=quantize), folder, lines.append)
    (path,) = folder.glob("*.gguf")
    return path, facts, lines


MODELS = {
    "llama": ("Llama", "gpt-2", False, {}),
    "llama-3.1": ("Llama", "llama-bpe", True,
                  {"rope_parameters": LLAMA_3_1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "qwen2", False, {"head_dim": 128}),
    "qwen2": ("Qwen2", "qwen2", False, {"tie_word_embeddings": True}),
    "mistral": ("Mistral", "smollm", False, {}),
    "mixtral": ("Mixtral", "smollm", False, EXPERTS),
    "qwen3-moe": ("Qwen3Moe", "qwen2", False,  # sizes that Transformers' reader takes for granted
                  {**EXPERTS, "moe_intermediate_size": 768, "norm_topk_prob": True,
                   "head_dim": 128}),
    "gpt-oss": ("GptOss", "gpt-4o", False, {**EXPERTS, "rope_parameters": YARN}),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("gguf")

    def make(name: str) -> str:
        family, cut, bos, changes = MODELS[name]
        if not (root / name).exists():
            tokenizer = make_tokenizer(root / f"tokenizer-{name}", texts, cut, bos)
            make_model(root / name, family, tokenizer, **changes)
        return str(root / name)

    return make


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen2", "qwen3-moe"])
def test_transformers_reads_the_same_model_and_tokenizer_from_the_file(
    name: str, made: Callable[[str], str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, facts, _ = export(made(name), tmp_path)
    assert path.name == f"{name}-F32.gguf" and facts["max_difference"] == 0
    ours = AutoModelForCausalLM.from_pretrained(made(name)).eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
    assert facts["parameters"] == sum(p.numel() for p in ours.parameters())
    ids = torch.arange(3, 60).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    tokens = load_tokenizer(made(name))
    for text in ("def f(x): return x", "It's a test, isn't it?"):
        assert (
            again(text, add_special_tokens=False).input_ids
            == tokens(text, add_special_tokens=False).input_ids
        )


def fields(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def theirs(made: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of NAME-OUTTYPE.gguf, as llama.cpp's own converter writes them."""
    if not (folder := os.environ.get("LLAMA_CPP")):
        pytest.skip("LLAMA_CPP names no folder with llama.cpp's convert_hf_to_gguf.py")
    out = tmp_path_factory.mktemp("theirs")
    lines = [
        "\t".join((made(name), str(out / f"{name}-{kind}.gguf"), kind, cut))
        for name, (_, cut, _, _) in MODELS.items()
        for kind in ("f32", "q8_0")
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("llama_cpp.py")), folder],
        input="\n".join(lines), capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_the_file_is_that_of_llama_cpps_own_converter(
    name: str, kind: str, made: Callable[[str], str], theirs: Path, tmp_path: Path
) -> None:
    path, _, _ = export(made(name), tmp_path, kind)
    one, other = tensors(path), tensors(theirs / f"{name}-{kind}.gguf")
    assert set(one) == set(other)
    for key, tensor in one.items():
        assert tensor.tensor_type == other[key].tensor_type, key
        assert numpy.array_equal(tensor.data, other[key].data), key
    mine, his = fields(path), fields(theirs / f"{name}-{kind}.gguf")
    token = "tokenizer.ggml."
    # It guesses a name and a version from the folder's name.
    guessed = {"general.name", "general.basename", "general.version"}
    assert {k for k in {*mine} & {*his} if mine[k] != his[k]} <= guessed
    # Ours says what its leaves to the reader's defaults.
    said = {f"{token}add_bos_token", f"{token}add_eos_token", f"{token}unknown_token_id"}
    assert set(mine) - set(his) <= said
    assert set(his) - set(mine) <= {*guessed, f"{token}add_sep_token"}


@pytest.mark.parametrize("cut", ["gpt-2", "llama-bpe", "qwen2", "smollm", "gpt-4o"])
def test_a_tokenizer_of_ones_own_gets_the_name_that_cuts_words_as_it_does(
    cut: str, texts: list[str], tmp_path: Path
) -> None:
    tokens = load_tokenizer(make_tokenizer(tmp_path, texts, cut, bos=cut == "qwen2"))
    found = gguf_vocab.vocabulary(tokens, Settings(SIZE), tmp_path)
    assert (found.pre, found.adds["bos"]) == (cut, cut == "qwen2")
    assert not gguf_vocab.differences(found, tokens)
    if cut != "smollm":  # its merges know no digits, so that nothing is lost under another name
        other = "smollm" if cut == "gpt-2" else "gpt-2"
        assert gguf_vocab.differences(replace(found, pre=other), tokens)


def test_tokens_have_their_kinds_and_ids_without_one_are_filled_up(
    texts: list[str], tmp_path: Path
) -> None:
    tokens = load_tokenizer(make_tokenizer(tmp_path, texts, "gpt-2"))
    found = gguf_vocab.vocabulary(tokens, Settings(SIZE), tmp_path)
    assert len(found.tokens) == len(found.types) == SIZE
    assert found.types[tokens.bos_token_id] == gguf_vocab.CONTROL
    assert found.types[tokens.convert_tokens_to_ids("<tool>")] == gguf_vocab.USER_DEFINED
    assert found.types[tokens.convert_tokens_to_ids("<｜User｜>")] == gguf_vocab.CONTROL
    assert found.tokens[-1] == f"[PAD{SIZE - 1}]" and found.types[-1] == gguf_vocab.UNUSED
    assert found.special == {n: getattr(tokens, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    with pytest.raises(ConfigError, match=f"has {len(tokens)} tokens, its output 300"):
        gguf_vocab.vocabulary(tokens, Settings(300), tmp_path)


class Settings:
    """What `vocabulary` reads of a model's configuration."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


def test_a_tokenizer_of_bytes_has_an_empty_list_of_merges(tokenizer: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "Llama", tokenizer)
    path, _, _ = export(model, tmp_path / "out")
    assert fields(path)["tokenizer.ggml.merges"] == []
    assert fields(path)["tokenizer.ggml.add_bos_token"] is False


def test_words_that_llama_cpp_cannot_cut_are_refused(texts: list[str], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers

    folder = tmp_path / "t"
    make_tokenizer(folder, texts, "gpt-2")
    machine = Tokenizer.from_file(str(folder / "tokenizer.json"))
    machine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    machine.save(str(folder / "tokenizer.json"))
    model = make_model(tmp_path / "m", "Llama", str(folder))
    with pytest.raises(ConfigError, match=r"cuts texts in a way that llama.cpp does not know"):
        export(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def save_pieces(pieces: Any, folder: Path) -> None:
    """The tokenizer of Llama 2 made of a SentencePiece model, as Transformers makes it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ids  # the ids of what was merged first are the smallest
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids and not piece.startswith("<")
    ]
    machine = Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    machine.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    machine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    machine.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=machine, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def test_a_sentencepiece_tokenizer_is_written_with_its_scores(
    texts: list[str], tmp_path: Path
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "texts").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=390,
        model_type="bpe", byte_fallback=True, minloglevel=2, num_threads=1,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        max_sentence_length=9999,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    save_pieces(pieces, tmp_path / "t")
    model = make_model(tmp_path / "m", "Llama", str(tmp_path / "t"))
    (Path(model) / "tokenizer.model").unlink(missing_ok=True)
    with pytest.raises(
        ConfigError, match=r"its tokenizer.model, which holds the scores, is not in"
    ):
        export(model, tmp_path / "out")
    (Path(model) / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    path, _, _ = export(model, tmp_path / "out")
    found = fields(path)
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_bos_token"]
    assert len(set(found["tokenizer.ggml.scores"])) > 100
    # Merging by the order of ids alone gives other ids.
    vocab = gguf_vocab.vocabulary(load_tokenizer(model), Settings(SIZE), Path(model))
    assert not gguf_vocab.differences(vocab, load_tokenizer(model))
    flat = replace(vocab, scores=tuple(0.0 for _ in vocab.scores))
    assert gguf_vocab.differences(flat, load_tokenizer(model))


@pytest.mark.parametrize(
    ("quantize", "worst", "kinds"),
    [("f32", 0, {"F32"}), ("f16", 2**-11, {"F32", "F16"}), ("bf16", 2**-8, {"F32", "BF16"}),
     ("q8_0", 1 / 200, {"F32", "Q8_0"}), ("q4_0", 1 / 7, {"F32", "Q8_0", "Q4_0"})],
)  # fmt: skip
def test_every_kind_of_numbers_is_read_back(
    quantize: str, worst: float, kinds: set[str], made: Callable[[str], str], tmp_path: Path
) -> None:
    path, facts, lines = export(made("llama"), tmp_path, quantize)
    assert {t.tensor_type.name for t in tensors(path).values()} == kinds
    assert facts["max_difference"] <= worst and (worst == 0) == (facts["max_difference"] == 0)
    assert facts["bytes"] == path.stat().st_size
    assert any(f"{path.stat().st_size:,} bytes" in line for line in lines)
    if quantize == "q4_0":
        assert tensors(path)["output.weight"].tensor_type.name == "Q8_0"


def test_rows_that_do_not_divide_are_f16_and_auto_keeps_what_is_stored(
    made: Callable[[str], str], tmp_path: Path
) -> None:
    tokenizer = made("llama")
    odd = make_model(tmp_path / "odd", "Llama", tokenizer, intermediate_size=100)
    path, _, lines = export(odd, tmp_path / "a", "q8_0")
    assert tensors(path)["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert any("2 tensors are f16" in line for line in lines)
    half = make_model(tmp_path / "half", "Llama", tokenizer, dtype=torch.bfloat16)
    path, facts, _ = export(half, tmp_path / "b", "auto")
    assert path.name == "half-BF16.gguf" and facts["max_difference"] == 0


def test_numbers_that_do_not_fit_are_refused(made: Callable[[str], str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model(tmp_path / "m", "Llama", made("llama"))
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_up.weight .* range of f16"):
        export(model, tmp_path / "out", "f16")
    export(model, tmp_path / "out", "bf16")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight holds numbers that are not finite"):
        export(model, tmp_path / "no", "bf16")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 of its tensors, such as blk.1.ffn_up.weight"):
        export(model, tmp_path / "no")


@pytest.mark.parametrize("quantize", ["f32", "q8_0"])
def test_a_file_that_was_damaged_is_found(
    quantize: str, made: Callable[[str], str], tmp_path: Path
) -> None:
    path, _, _ = export(made("qwen3"), tmp_path, quantize)
    source = gguf_export.Source(made("qwen3"))
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors(path).items()}
    assert gguf_export._check_tensors(gguf, path, source, kinds) < 0.01
    where = tensors(path)["blk.1.attn_q.weight"].data_offset
    whole = bytearray(path.read_bytes())
    whole[where + 3] ^= 0x7C
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"blk.1.attn_q.weight does not read back"):
        gguf_export._check_tensors(gguf, path, source, kinds)


def test_other_families_are_left_to_llama_cpp(made: Callable[[str], str], tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "Olmo", made("llama"))
    with pytest.raises(ConfigError, match=r"family olmo; llama, mistral.*convert_hf_to_gguf.py"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [({"format": "gguf", "quantize": "Q4_K_M"}, "llama-quantize NAME-F16.gguf NAME-Q4_K_M.gguf"),
     ({"quantize": "f16"}, "belongs to `format: gguf`"),
     ({"format": "gguf", "precision": "bf16"}, "belongs to `format: huggingface`"),
     ({"format": "ggml"}, "is not allowed")],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(given: dict[str, str], said: str) -> None:
    problems: list[Any] = []
    build(Export, {"model": "m", **given}, (), problems)
    assert len(problems) == 1 and said in problems[0][1]


def test_a_stage_writes_the_file_and_goes_on_after_it_was_killed(
    made: Callable[[str], str], run_stage: Callable[..., Any], tmp_path: Path
) -> None:
    to = tmp_path / "given" / "mine"
    settings = Export(made("llama"), to=str(to), format="gguf", quantize="q8_0")
    stage = StageConfig(id="e", stage="export", output=str(tmp_path / "e"), export=settings)
    outcome = run_stage(stage)
    assert [path.name for path in to.iterdir()] == ["mine-Q8_0.gguf"]
    assert outcome.evaluation["bytes"] == (to / "mine-Q8_0.gguf").stat().st_size
    before = (to / "mine-Q8_0.gguf").read_bytes()
    run_stage(stage, attempt=2)  # the same bytes again, or it would be taken for another's
    assert (to / "mine-Q8_0.gguf").read_bytes() == before


def test_a_dry_run_writes_a_small_file_here(run_stage: Callable[..., Any], tmp_path: Path) -> None:
    settings = Export("org/model", to="hub:me/mine", format="gguf", quantize="q4_0")
    asked = StageConfig(id="e", stage="export", output=str(tmp_path / "e"), export=settings)
    small, notes = shrink(asked, set())
    assert any("org/model" in note for note in notes)
    run_stage(small)
    assert [path.name for path in (tmp_path / "e").glob("*.gguf")] == ["model-Q4_0.gguf"]
