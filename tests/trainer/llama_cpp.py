"""llama.cpp's own converter, run in a process of its own: `python llama_cpp.py FOLDER`, then on
standard input lines of MODEL, OUTFILE, OUTTYPE and PRE, with tabs between them. FOLDER: llama.cpp's
sources, with convert_hf_to_gguf.py. PRE: what to call a tokenizer that the converter does not know,
which it would refuse otherwise."""

from __future__ import annotations

import runpy
import sys


def main(folder: str) -> None:
    sys.path[:0] = [folder, f"{folder}/gguf-py"]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    ask, name = TextModel.get_vocab_base_pre, ""

    def known(self: object, tokenizer: object) -> object:
        try:
            return ask(self, tokenizer)
        except NotImplementedError:
            return name

    TextModel.get_vocab_base_pre = known
    for line in sys.stdin:
        model, outfile, outtype, name = line.rstrip("\n").split("\t")
        sys.argv = ["convert", model, "--outfile", outfile, "--outtype", outtype]
        runpy.run_path(f"{folder}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1])
