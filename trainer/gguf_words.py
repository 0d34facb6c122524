"""How llama.cpp cuts a text into words, by the names that a GGUF file may give, and how it merges
the pieces of SentencePiece vocabularies."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

_ENGLISH = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+{_ENGLISH}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*{_ENGLISH}?"
    r"|\p{N}{1,3}" + _SLASHED
)
#: `tokenizer.ggml.pre` -> expressions, each of which cuts what the ones before left. The order is
#: that in which they are tried.
WORDS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "smollm": (r"\p{N}", _GPT2),
    "tekken": (_TEKKEN,),
    "dbrx": (_LLAMA3,),
    "falcon3": (_LLAMA3,),
    "phi-2": (_GPT2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "pixtral": (_LLAMA3,),
    "gpt-4o": (_GPT4O,),
}
#: The tokenizers' own expressions where llama.cpp's differ: it cuts words at combining marks.
EXACT = {
    "tekken": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
        r"|\p{N}" + _SLASHED,
    ),
    "gpt-4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH}?"
        r"|\p{N}{1,3}" + _SLASHED,
    ),
}
#: Where a word that is a token as a whole is not merged from bytes.
IGNORES_MERGES = ("llama-bpe", "falcon3", "tekken", "pixtral")
#: sha256 of the ids of PROBE, as a list in Python's spelling -> the name. From llama.cpp's
#: converter, so that files of known models say what its own say.
KNOWN = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Llama 3
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",  # Qwen3 Embedding
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",  # Qwen 1.5 to 3
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",  # GPT-2
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",  # ruGPT3XL
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",  # SmolLM
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # Mistral Nemo
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",  # Pixtral
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",  # Falcon 3
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",  # DBRX
    "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085": "phi-2",  # Phi 2
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",  # gpt-oss
}
#: The text that tells tokenizers apart.
PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis"
    " concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3"
    " កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български"
    " ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not"
    " sure I'll make it, 'D you like some tea? We'Ve a'lL"
)


def encode_pieces(
    known: Mapping[str, int], scores: Sequence[float], lead: str, text: str
) -> list[int]:
    """Ids of a text in a SentencePiece vocabulary: of all neighbours that make a token, those of
    the highest score are joined first, the left ones first; what is no token becomes its bytes.
    `lead`: what is put in front of the text."""
    symbols = list(lead + text.replace(" ", "▁")) if text else []
    after = [*range(1, len(symbols)), -1] if symbols else []
    before = list(range(-1, len(symbols) - 1))
    waiting: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            joined = symbols[left] + symbols[right]
            if joined in known:
                heapq.heappush(waiting, (-scores[known[joined]], left, right, joined))

    for i in range(1, len(symbols)):
        offer(i - 1, i)
    while waiting:
        _, left, right, joined = heapq.heappop(waiting)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != joined:
            continue  # one of them has been joined with another since
        symbols[left], symbols[right] = joined, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    ids: list[int] = []
    for symbol in filter(None, symbols):
        found = known.get(symbol)
        pieces = (f"<0x{byte:02X}>" for byte in symbol.encode())
        ids += [known[piece] for piece in pieces if piece in known] if found is None else [found]
    return ids
