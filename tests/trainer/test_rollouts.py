"""Answers that the model gives: by `generate`, and by a server over HTTP."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer import gradients
from trainer import adapters, models
from trainer.config import Adapter, ConfigError, Grpo
from trainer.rollouts import Answer, Generate, cut, ends_of
from trainer.rollouts_vllm import Server, connect, plain_weights
from trainer.runtime import Runtime

PROMPTS = [[72, 101, 108], [72], [97, 98, 99, 100, 101, 102]]
END = 256


def plan(**settings: Any) -> Grpo:
    return Grpo(**{"rewards": ("x:y",), "max_new_tokens": 6, **settings})


@pytest.fixture
def model(tokenizer: str) -> Any:
    made = gradients.model(tokenizer, torch.float32, seed=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter *= 8  # or all tokens would be about as probable
    return made


def test_the_most_probable_answer_is_that_of_whole_forward_passes(model: Any) -> None:
    """Padding on the left and the cache of keys and values change nothing."""
    found = Generate(model, plan(), gradients.CPU, [END]).draw(PROMPTS, 1, None, 0)
    for prompt, (answer,) in zip(PROMPTS, found):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] != END):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        assert answer.ids == ids[len(prompt) :]


def test_draws_follow_the_models_probabilities_at_the_temperature(model: Any) -> None:
    """Of one next token: the shares of 4000 draws, five standard deviations wide."""
    settings = plan(max_new_tokens=1, temperature=2.0)
    (answers,) = Generate(model, settings, gradients.CPU, [END]).draw(PROMPTS[:1], 4000, "s", 0)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(PROMPTS[:1]), use_cache=False).logits[0, -1]
    wanted = (logits / 2).softmax(0)
    drawn = torch.tensor([answer.ids[0] for answer in answers]).bincount(minlength=len(wanted))
    wide = 5 * (wanted * (1 - wanted) / 4000).sqrt() + 5e-4
    assert ((drawn / 4000 - wanted).abs() <= wide).all()
    narrow = plan(max_new_tokens=1, top_k=2)
    (answers,) = Generate(model, narrow, gradients.CPU, [END]).draw(PROMPTS[:1], 200, "s", 0)
    assert {answer.ids[0] for answer in answers} <= set(wanted.topk(2).indices.tolist())


def test_a_seed_says_which_answers_and_nothing_else_is_changed(model: Any) -> None:
    from transformers import GenerationConfig

    model.generation_config = own = GenerationConfig(temperature=0.01, repetition_penalty=9.0)
    model.train()
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.x on
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    engine = Generate(model, plan(), gradients.CPU, [END])
    before = torch.get_rng_state()
    first, again, other = (engine.draw(PROMPTS, 4, seed, 0) for seed in ("a", "a", "b"))
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())
    assert model.training and model.generation_config is own
    assert len(first) == 3 and all(len(answers) == 4 for answers in first)
    assert len({tuple(a.ids) for answers in first for a in answers}) > 3  # the 0.01 is not used


def test_out_of_memory_draws_fewer_answers_at_once(model: Any) -> None:
    sizes: list[int] = []

    def full(module: Any, inputs: Any) -> None:
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    model.get_input_embeddings().register_forward_pre_hook(full)
    engine, most = Generate(model, plan(max_new_tokens=2), gradients.CPU, [END]), 4
    found = engine.draw(PROMPTS, 4, "s", 0)
    assert [len(answers) for answers in found] == [4, 4, 4]
    assert sizes[0] == 12 and sizes[1] == 6 and max(sizes[2:]) == 3
    sizes.clear()
    engine.draw(PROMPTS, 4, "s", 0)
    assert max(sizes) == 3  # remembered
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        engine.draw(PROMPTS, 1, "s", 0)


def test_answers_do_not_depend_on_a_try_that_ran_out_of_memory(model: Any) -> None:
    """A run that is resumed does not remember how many answers fit, and tries them all again."""
    calls = 0

    def full(module: Any, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # after two draws
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    knows = Generate(model, plan(), gradients.CPU, [END])
    knows.most = 6
    calm = knows.draw(PROMPTS, 4, "s", 0)
    handle = model.get_input_embeddings().register_forward_pre_hook(full)
    learns = Generate(model, plan(), gradients.CPU, [END])
    found = learns.draw(PROMPTS, 4, "s", 0)
    handle.remove()
    assert learns.most == 6 and found == calm
    assert len({tuple(a.ids) for answers in found for a in answers}) > 6  # parts draw apart


def test_an_answer_ends_at_its_first_mark() -> None:
    assert cut([5, 6, 2, 7, 2], [2, 9]) == Answer([5, 6, 2], True)
    assert cut([5, 9], [2, 9]) == Answer([5, 9], True)
    assert cut([5, 6], [2, 9]) == Answer([5, 6], False)


def test_the_model_may_name_further_marks(model: Any, tokenizer: str) -> None:
    tokens = models.load_tokenizer(tokenizer)
    model.generation_config.eos_token_id = [7, tokens.eos_token_id]
    assert ends_of(model, tokens) == [tokens.eos_token_id, 7]
    model.generation_config.eos_token_id = None
    assert ends_of(model, tokens) == [tokens.eos_token_id]


@pytest.fixture
def adapted(model: Any, tokenizer: str, tmp_path: Path) -> Any:
    model.save_pretrained(tmp_path / "base")
    base = models.load_pretrained(str(tmp_path / "base"), torch.float32, "sdpa")
    made = adapters.attach(base, Adapter(rank=2), str(tmp_path / "base"))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.5)
    return made


def test_an_adapter_takes_part(model: Any, adapted: Any) -> None:
    answers = [
        Generate(each, plan(), gradients.CPU, [END]).draw(PROMPTS, 1, None, 0)
        for each in (model, adapted)
    ]
    assert answers[0] != answers[1]
    with adapted.disable_adapter():
        assert (
            Generate(adapted, plan(), gradients.CPU, [END]).draw(PROMPTS, 1, None, 0) == answers[0]
        )


def test_the_server_gets_the_weights_by_their_plain_names_with_the_adapter_in_them(
    model: Any, adapted: Any
) -> None:
    ids = torch.tensor([PROMPTS[2]])
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
    sent = {name: tensor.clone() for name, tensor in plain_weights(adapted)}
    names = [name for name, _ in model.named_parameters()]
    assert list(sent) == names
    model.load_state_dict(sent, strict=False)
    with torch.no_grad():
        assert torch.allclose(model.eval()(input_ids=ids).logits, wanted, atol=1e-4)
    for name, parameter in adapted.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for found in (plain_weights(model), plain_weights(adapted, merged=False)):
        assert [name for name, _ in found] == names


def test_a_base_of_16_bits_is_the_same_after_any_number_of_steps(adapted: Any) -> None:
    """To merge and to unmerge would round it each time, and so move what is trained and the
    reference; what is sent is rounded once."""
    for name, parameter in adapted.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    for _ in range(2):
        sent = dict(plain_weights(adapted))
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters())
    name = "model.layers.0.self_attn.q_proj"
    layer = adapted.get_base_model().get_submodule(name)
    base = layer.get_base_layer().weight
    wanted = (base.float() + layer.get_delta_weight("default").float()).bfloat16()
    assert torch.equal(sent[f"{name}.weight"], wanted) and not torch.equal(wanted, base)


class _Handler(BaseHTTPRequestHandler):
    """The routes of `vllm serve` that TRL's client uses to draw."""

    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        data = {"data": [{"id": "tiny"}]} if self.path == "/v1/models" else {}
        self._answer(200 if self.path in ("/health", "/v1/models") else 404, data)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if self.path != "/v1/completions":
            return self._answer(404, {})
        if body["max_tokens"] > 6:
            return self._answer(400, {"error": "too many tokens"})
        choices = []
        for prompt in body["prompt"]:
            for nth in range(body["n"]):
                ids = [prompt[0], 40 + nth, *([END] if nth else [])]
                choices.append({"prompt_token_ids": prompt, "token_ids": ids, "logprobs": None})
        self._answer(200, {"choices": choices})

    def _answer(self, code: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    handler = type("Handler", (_Handler,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def trl_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's client, which asks for vLLM before it speaks HTTP; drawing needs nothing of vLLM."""
    module = pytest.importorskip("trl.generation.vllm_client")
    monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)


def test_a_server_is_asked_through_trls_client(model: Any, trl_client: None) -> None:
    with serving() as (url, asked):
        settings = plan(rollouts="vllm", vllm_server=url, temperature=0.7, top_p=0.9, top_k=5)
        server = Server(model, settings, gradients.CPU, [END], connect(url))
        server.sent = 3  # it has the weights of step 3: sending them takes CUDA and NCCL
        found = server.draw(PROMPTS, 2, "s", 3)
        assert found[1] == [Answer([72, 40], False), Answer([72, 41, END], True)]
        (body,) = asked
        wanted = {"prompt": PROMPTS, "n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5,
                  "max_tokens": 6, "stop_token_ids": [END], "model": "tiny"}  # fmt: skip
        assert {name: body[name] for name in wanted} == wanted and body["seed"] > 0
        server.draw(PROMPTS, 1, None, 3)
        assert asked[1]["temperature"] == 0 and "seed" not in asked[1]
        # What a server refuses is one line.
        server.plan = plan(rollouts="vllm", vllm_server=url, max_new_tokens=7)
        with pytest.raises(ConfigError, match=f"grpo.vllm_server: {url}: .*too many tokens"):
            server.draw(PROMPTS, 1, "s", 3)
        with pytest.raises(ConfigError, match="does not expose its development endpoints"):
            server.draw(PROMPTS, 1, "s", 4)  # other weights, which a CPU cannot send


def test_a_server_that_is_not_there_is_one_line(trl_client: None) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"nothing answers at {url}; start a server there"):
        connect(url)


def test_vllm_that_is_not_installed_is_one_line() -> None:
    from importlib.util import find_spec

    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    with pytest.raises(ConfigError, match=r"needs TRL and vLLM.*pip install 'trl\[vllm\]'"):
        connect("http://127.0.0.1:1")


def test_a_server_serves_one_worker(model: Any) -> None:
    two = Runtime(torch.device("cpu"), "fp32", rank=0, world_size=2)
    with pytest.raises(ConfigError, match="vllm serves one worker"):
        Server(model, plan(rollouts="vllm", vllm_server="http://h:1"), two, [END], object())
