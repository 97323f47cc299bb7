"""A stand-in for an SGLang 0.5.17 server: its reply shapes, its habits and its deaths, as recorded from a real one.

Tokens are a hash of (weights, seed or a counter, position). What ends a real process ends this one's service: `state.dead` is set
and every later request breaks off.
"""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from miles_rollout.text import CharTokenizer

TOKENIZER = CharTokenizer("0123456789+= abcdefghijklmnopqrstuvwxyz")
VOCAB = TOKENIZER.vocab_size
SAMPLING = {
    "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "ignore_eos", "n",
    "sampling_seed",
}  # fmt: skip


def save_model(directory: Path, seed: int, *, names: tuple[str, ...] = ("a", "b"), moe: bool = False) -> Path:
    """A model directory: a config and safetensors written by hand, so that no library is needed."""
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"vocab_size": VOCAB, "eos_token_id": 2, "max_position_embeddings": 4096, "num_hidden_layers": 2}
    config |= {"num_experts": 8, "num_experts_per_tok": 2} if moe else {}
    (directory / "config.json").write_text(json.dumps(config))
    TOKENIZER.save(directory)
    data = [hashlib.blake2b(f"{seed}{name}".encode(), digest_size=16).digest() for name in names]
    header = {n: {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * i, 16 * i + 16]} for i, n in enumerate(names)}
    raw = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(data))
    return directory


class State:
    """What the process holds."""

    def __init__(self, model: Path, *, deterministic: bool, moe: bool) -> None:
        self.model = model
        self.weights = self._read(model)
        self.version = "default"
        self.deterministic = deterministic
        self.moe = moe
        self.dead = ""
        self.calls: list[tuple[str, Any]] = []
        self.aborted: set[str] = set()
        self.running: set[str] = set()
        self.released: set[str] = set()
        self.go = asyncio.Event()
        self.go.set()
        self.held: str | None = None
        self.step_s = 0.0
        self.count = 0
        self.fail_update = False
        self.company_filters = False
        """Whether another request of the batch filters tokens, as a greedy one does."""

    @staticmethod
    def _read(model: Path) -> bytes:
        raw = (model / "model.safetensors").read_bytes()
        return raw[8 + int.from_bytes(raw[:8], "little") :]

    def token(self, body: dict[str, Any], position: int) -> int:
        """The token at a position: greedy, seeded, or different at every call."""
        sampling = body["sampling_params"]
        key: Any = 0
        if sampling.get("temperature", 1.0) != 0:
            key = sampling.get("sampling_seed") if self.deterministic else None
            if key is None:
                self.count += 1
                key = ("unseeded", self.count)
            filters = sampling.get("top_k", -1) not in (-1, 1 << 30) or sampling.get("top_p", 1.0) < 1
            if sampling.get("min_p", 0.0) > 0 and self.deterministic:
                self.dead = "AssertionError: With sampling seed, multinomial_with_seed will provide wrong results"
            key = (key, filters or self.company_filters)
        data = repr((self.weights, key, position)).encode()
        return 4 + int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") % (VOCAB - 4)


def create(model: Path, *, deterministic: bool = True, moe: bool = False) -> Starlette:
    """The application; `app.state.sglang` is its State."""
    state = State(model, deterministic=deterministic, moe=moe)
    routes = [
        Route("/generate", _alive(state, generate), methods=["POST", "PUT"]),
        Route("/health", _alive(state, health)),
        Route("/health_generate", _alive(state, health)),
        Route("/get_server_info", _alive(state, server_info)),
        Route("/get_model_info", _alive(state, model_info)),
        Route("/model_info", _alive(state, model_info)),
        Route("/abort_request", _alive(state, abort), methods=["POST"]),
        Route("/flush_cache", _alive(state, flush), methods=["POST"]),
        Route("/pause_generation", _alive(state, pause), methods=["POST"]),
        Route("/continue_generation", _alive(state, resume), methods=["POST"]),
        Route("/update_weights_from_disk", _alive(state, update), methods=["POST"]),
        Route("/release_memory_occupation", _alive(state, release), methods=["POST"]),
        Route("/resume_memory_occupation", _alive(state, reclaim), methods=["POST"]),
    ]
    app = Starlette(routes=routes)
    app.state.sglang = state
    return app


def _alive(state: State, handler: Any) -> Any:
    async def endpoint(request: Request) -> Response:
        if state.dead:
            raise ConnectionResetError(state.dead)
        body = json.loads(await request.body() or b"null")
        state.calls.append((request.url.path, body))
        return await handler(state, body)

    return endpoint


def refusal(message: str, status: int = 400) -> Response:
    return JSONResponse({"error": {"message": message}}, status)


async def generate(state: State, body: dict[str, Any]) -> Response:
    sampling = body.get("sampling_params") or {}
    if not set(sampling) <= SAMPLING or not isinstance(sampling.get("max_new_tokens", 128), int):
        return PlainTextResponse("Internal Server Error", 500)
    ids = body["input_ids"]
    if any(not 0 <= i < VOCAB for i in ids) or state.released:
        state.dead = "device-side assert"
        raise ConnectionResetError(state.dead)
    if len(ids) >= 2047 or len(ids) + sampling["max_new_tokens"] > 2048:
        return refusal("The input is longer than the model's context length")
    if body.get("stream"):
        return StreamingResponse(_sse(state, body), media_type="text/event-stream; charset=utf-8")
    last = None
    async for event in _events(state, body):
        last = event
    return JSONResponse(last)


async def _sse(state: State, body: dict[str, Any]) -> Any:
    async for event in _events(state, body):
        yield b"data: " + msgspec.json.encode(event) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def _events(state: State, body: dict[str, Any]) -> Any:
    sampling, rid = body["sampling_params"], body.setdefault("rid", str(len(state.calls)))
    stops = () if sampling.get("ignore_eos") else (2, *sampling.get("stop_token_ids", ()))
    ids: list[int] = []
    finish: dict[str, Any] | None = None
    state.running.add(rid)
    try:
        while finish is None:
            await asyncio.sleep(state.step_s)
            while not state.go.is_set() and rid not in state.aborted:
                await asyncio.sleep(0.01)
            text = TOKENIZER.decode(ids)
            if rid in state.aborted:
                finish = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
            else:
                ids.append(state.token(body, len(body["input_ids"]) + len(ids)))
                text = TOKENIZER.decode(ids)
                stop = next((s for s in sampling.get("stop", ()) if s in text), None)
                if stop is not None:
                    text, finish = text[: text.index(stop)], {"type": "stop", "matched": stop}
                elif ids[-1] in stops:
                    finish = {"type": "stop", "matched": ids[-1]}
                elif len(ids) == sampling["max_new_tokens"]:
                    finish = {"type": "length", "length": len(ids)}
            yield {"text": text, "output_ids": list(ids), "meta_info": _meta(state, body, ids, finish)}
    finally:
        state.running.discard(rid)


def _meta(state: State, body: dict[str, Any], ids: list[int], finish: Any) -> dict[str, Any]:
    prompt = body["input_ids"]
    meta: dict[str, Any] = {
        "id": body["rid"], "finish_reason": finish, "prompt_tokens": len(prompt), "weight_version": state.version,
        "num_retractions": 0, "reasoning_tokens": 0, "completion_tokens": len(ids), "cached_tokens": 0, "dp_rank": None,
    }  # fmt: skip
    if body.get("return_logprob"):
        meta["output_token_logprobs"] = [[-(i % 7) - 0.5, i, None] for i in ids]
        meta["output_token_logprobs_length"] = len(ids)
        start = body.get("logprob_start_len", -1)
        given = prompt[start:] if start >= 0 else []
        meta["input_token_logprobs"] = [[None if at == 0 else -(i % 5) - 0.25, i, None] for at, i in enumerate(given)]
    if body.get("return_logprob") and body.get("top_logprobs_num"):
        count = body["top_logprobs_num"]
        meta["output_top_logprobs"] = [[[-(i % 7) - 0.5 - j, (i + j) % VOCAB, None] for j in range(count)] for i in ids]
    if body.get("return_sampling_mask"):
        meta["output_token_sampling_logprobs"] = [-0.125] * len(ids)
    if body.get("return_routed_experts") and state.moe and finish is not None:
        import array
        import base64

        count = (len(prompt) + len(ids) - 1) * 2 * 2
        meta["routed_experts"] = base64.b64encode(array.array("i", [i % 8 for i in range(count)]).tobytes()).decode()
    return meta


async def health(state: State, body: Any) -> Response:
    if state.released:
        state.dead = "health after release_memory_occupation"
        raise ConnectionResetError(state.dead)
    return Response(status_code=200 if state.go.is_set() else 503)


async def server_info(state: State, body: Any) -> Response:
    return JSONResponse(
        {
            "model_path": str(state.model), "version": "0.5.17", "context_length": 2048, "max_total_num_tokens": 65536,
            "max_req_input_len": 2042, "weight_version": state.version, "enable_deterministic_inference": state.deterministic,
            "rl_on_policy_target": None, "attention_backend": "triton", "dtype": "auto", "tp_size": 1,
            "internal_states": [{"effective_max_running_requests_per_dp": 4096}],
        }
    )  # fmt: skip


async def model_info(state: State, body: Any) -> Response:
    return JSONResponse({"model_path": str(state.model), "is_generation": True, "weight_version": state.version})


async def abort(state: State, body: Any) -> Response:
    state.aborted |= set(state.running) if body.get("abort_all") else {body.get("rid", "")}
    return PlainTextResponse("")


async def flush(state: State, body: Any) -> Response:
    if state.running:
        return PlainTextResponse("Flush cache failed.\n", 400)
    return PlainTextResponse("Cache flushed.\n")


async def pause(state: State, body: Any) -> Response:
    if body is None or body.get("mode", "abort") not in ("abort", "retract", "in_place"):
        return JSONResponse({"object": "error", "message": "1 validation error", "code": 400}, 400)
    state.held = body.get("mode", "abort")
    state.go.clear()
    if state.held == "abort":
        state.aborted |= set(state.running)
    return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})


async def resume(state: State, body: Any) -> Response:
    state.held = None
    state.go.set()
    return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})


async def update(state: State, body: dict[str, Any]) -> Response:
    if state.running and not state.go.is_set() and body.get("flush_cache", True):
        state.dead = "Cache flush failed after updating weights"
        raise ConnectionResetError(state.dead)
    while state.running:
        await asyncio.sleep(0.01)
    if not Path(body["model_path"]).is_dir() or state.fail_update:
        message = "Failed to get weights iterator"
        return JSONResponse({"success": False, "message": message, "num_paused_requests": 0}, 400)
    state.weights = State._read(Path(body["model_path"]))
    state.version = body["weight_version"]
    return JSONResponse({"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0})


async def release(state: State, body: dict[str, Any]) -> Response:
    state.released |= set(body["tags"])
    return JSONResponse(None)


async def reclaim(state: State, body: dict[str, Any]) -> Response:
    if not set(body["tags"]) <= state.released:
        state.dead = "KeyError"
        raise ConnectionResetError(state.dead)
    state.released -= set(body["tags"])
    return JSONResponse(None)


if __name__ == "__main__":
    import argparse

    import uvicorn

    parser = argparse.ArgumentParser()
    for name in ("--model-path", "--host", "--port"):
        parser.add_argument(name, required=True)
    parser.add_argument("--enable-deterministic-inference", action="store_true")
    parser.add_argument("--step-s", type=float, default=0.0)
    given, others = parser.parse_known_args()
    if "--crash" in others:
        raise SystemExit(3)
    served = create(
        Path(given.model_path), deterministic=given.enable_deterministic_inference, moe="--enable-return-routed-experts" in others
    )
    served.state.sglang.step_s = given.step_s
    uvicorn.run(served, host=given.host, port=int(given.port), log_level="error")
