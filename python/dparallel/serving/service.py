"""The served models, their engines, and the way of a request to them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from dparallel_ext import Automaton, DecodeConfig, DraftEvent, Engine, Handle, arguments
from dparallel_ext.decoding.config import PENALTIES, with_ends

from .. import page, registry, structured, text
from ..configs import parse_policy, policy_of, seed_of, without_ends
from ..sandbox import Sandbox
from ..token_scores import TokenScores, token_scores
from .call import Call, Choice, Score, log
from .errors import ApiError, client_left, failed, full, in_time, stopping
from .metrics import Metrics
from .protocol import ChatMessage, ChatRequest, CompletionRequest, Form, Options
from .settings import ServerSettings
from .tools import call_style, calls_pattern
from .unsupported import SCORES

T = TypeVar("T")

CHARACTERS_A_TOKEN = 32
"""The most characters a token, unless the vocabulary has a longer one; a text of more characters than all its
positions could hold is refused without being encoded."""
ENCODERS = 3
"""Threads that encode texts; up to one waits for a chat's template meanwhile, and one for a form."""
FORMS = 32
"""The most forms of responses that are kept, for each model, the latest ones."""


class Service:
    """The served models by their names in requests, and the metrics, threads and sandboxes that they
    share."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.models: dict[str, ModelService] = {}
        self.metrics = Metrics()
        # Encoding has threads, rendering and forms a process each, which end with the service in any case.
        self.sandbox, self.forms_sandbox = Sandbox(), Sandbox()
        self.rendering, self.forming = asyncio.Lock(), asyncio.Lock()
        self.encoders = ThreadPoolExecutor(ENCODERS, "encoder")
        self.aborted: asyncio.Future[None]
        """Done when running requests must end; made in the serving event loop."""

    @functools.cached_property
    def page(self) -> dict[str, page.Part]:
        """The page's parts by path; empty without a page. Made once all models have been added."""
        if not self.settings.page:
            return {}
        return page.served(all(model.builtin for model in self.models.values()))

    def model(self, name: str) -> ModelService:
        """The model of this name. Raises ApiError."""
        service = self.models.get(name)
        if service is None:
            names = list(self.models)
            expected = repr(names[0]) if len(names) == 1 else f"one of {names}"
            raise ApiError(
                404, f"model: expected {expected}, got {name!r}", param="model", code="model_not_found"
            )
        return service

    @property
    def closed(self) -> bool:
        """Whether an engine takes no more requests."""
        return any(model.engine.closed for model in self.models.values())

    def abort(self) -> None:
        if not self.aborted.done():
            self.aborted.set_result(None)

    def close(self) -> None:
        """End the encoders' threads and the sandboxes' processes, whatever they do."""
        self.encoders.shutdown(wait=False, cancel_futures=True)
        self.sandbox.close()
        self.forms_sandbox.close()

    async def elsewhere(self, work: Callable[[], T]) -> T:
        """The result of `work`, done in an encoder's thread. Raises ApiError if the server stops before."""
        loop = asyncio.get_running_loop()
        try:
            doing = loop.run_in_executor(self.encoders, work)
        except RuntimeError as error:  # the threads have been ended
            raise stopping() from error
        return await in_time(doing, self.aborted)


def called(message: ChatMessage) -> dict[str, Any]:
    """The fields of a message about calls, as chat templates take them: arguments as an object."""
    calls = []
    for call in message.tool_calls or ():
        arguments: Any = call.function.arguments
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
        function = {"name": call.function.name, "arguments": arguments}
        calls.append({"id": call.id, "type": "function", "function": function})
    return {"tool_calls": calls or None, "tool_call_id": message.tool_call_id}


class ModelService:
    """A model's engine and tokenizer, which the service serves from now on.

    drafter, verifier: the names of the engine's.
    """

    def __init__(
        self,
        service: Service,
        name: str,
        engine: Engine,
        tokenizer: Any,
        directory: Path,
        drafter: str | None = None,
        verifier: str | None = None,
    ) -> None:
        self.service, self.name, self.engine = service, name, engine
        self.drafter, self.verifier = drafter, verifier
        self.vocabulary, self.tokenizer = engine.model.shape.embedding_size, tokenizer
        self.token_texts = text.TokenTexts(tokenizer)
        self.template = text.chat_template(directory, service.sandbox)
        self.call_style = call_style(text.tool_template(directory))
        self.scoring = asyncio.Lock()
        self.forms: dict[Form, Automaton] = {}
        """The latest forms, the latest last."""
        self.builtin = directory.is_relative_to(registry.BUILTIN)
        self.max_length = engine.max_length
        longest = max(map(len, tokenizer.get_vocab()), default=0)
        self.most_characters = self.max_length * max(CHARACTERS_A_TOKEN, longest)
        self.without_ends = without_ends(engine.config)
        """The config of requests with `ignore_eos` that name nothing else."""
        self.config = with_ends(engine.config, engine.model.eos_ids)
        (self.gen_length,) = arguments.per_sequence("gen_length", engine.config.gen_length, 1, 1)
        seed = engine.config.seed
        self.seed = None if seed is None else arguments.per_sequence("seed", seed, 1, -(2**63))[0]
        self.metrics = service.metrics.add(name, engine)
        self.created = int(time.time())
        service.models[name] = self

    @property
    def described(self) -> dict[str, Any]:
        """An entry of /v1/models: the fields of OpenAI and vLLM, the kind of the model, and how requests that
        name nothing else are decoded; `policy` is null if there is no text for it."""
        onward = self.engine.mask_id is None
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "dparallel",
            "root": self.name,
            "parent": None,
            "max_model_len": self.max_length,
            "kind": "autoregressive" if onward and self.verifier is None else "diffusion",
            "policy": None if onward else policy_of(self.config),
            "drafter": self.drafter,
            "verifier": self.verifier,
            "max_tokens": self.gen_length,
        }

    def _too_long(self, param: str, rest: str) -> ApiError:
        """The error of a text that has no place in the model, in the words by which clients know it, such as
        litellm: they may ask another model then."""
        message = f"{param}: this model's maximum context length is {self.max_length} tokens, {rest}"
        return ApiError(400, message, param=param, code="context_length_exceeded")

    async def _ids(self, param: str, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The token ids of texts. Raises ApiError for a text that is too long to be encoded."""
        most = self.most_characters
        wrong = next((len(each) for each in texts if len(each) > most), None)
        if wrong is not None:
            raise self._too_long(param, f"at most {most} characters, got {wrong}")

        def encode() -> list[list[int]]:
            # By batches, since `encode` holds the interpreter's lock, and nothing else could run; of one text
            # each, so that it is not padded to the length of others.
            try:
                batches = [self.tokenizer.encode_batch([each], add_special_tokens=special) for each in texts]
            except Exception as error:  # the package raises nothing narrower
                message = f"{param}: the model's tokenizer does not encode it: {str(error)[:200]}"
                raise ApiError(400, message, param=param) from error
            return [batch[0].ids for batch in batches]

        return await self.service.elsewhere(encode) if any(texts) else [[] for _ in texts]

    async def encode(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        """The prompts' token ids; a chat is by the checkpoint's template, else its last user message alone.

        Raises ApiError, and ValueError that names the argument.
        """
        if isinstance(request, CompletionRequest):
            texts = [text for text in request.prompt if isinstance(text, str)]
            if texts:
                return await self._ids("prompt", texts, special=True)
            return [ids for ids in request.prompt if isinstance(ids, list)]
        roles = {"developer": "system"}  # the newer name; templates know the older
        messages = [
            {"role": roles.get(each.role, each.role), "content": each.content or "", **called(each)}
            for each in request.messages
        ]
        keywords = request.chat_template_kwargs or {}
        if self.template is not None:
            tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()] or None
            render = functools.partial(self.template, messages, tools=tools, **keywords)
            async with self.service.rendering:  # so that templates, which wait for each other, use one thread
                rendered = await self.service.elsewhere(render)
            return await self._ids(request.asked, [rendered])
        if keywords:
            reason = "chat_template_kwargs: expected none, since the model has no chat template"
            raise ApiError(400, f"{reason}, got {sorted(keywords)[0]}", param="chat_template_kwargs")
        asked = [message["content"] for message in messages if message["role"] == "user"]
        if not asked:
            raise ValueError("messages: expected one from the user")
        return await self._ids(request.asked, asked[-1:], special=True)

    async def call(
        self, request: ChatRequest | CompletionRequest, left: Callable[[], Awaitable[None]]
    ) -> Call:
        """Check the request and submit it to the engine. left: waits until the client leaves. Raises
        ApiError."""
        each, param = request.n or 1, request.asked
        self._check_kind(request)
        kept = self._kept(request)
        prompts = len(request.prompt) if isinstance(request, CompletionRequest) else 1
        # More than the engine ever holds at once would be told to come again without end.
        most = min(self.service.settings.max_choices, self.engine.lanes + self.engine.max_waiting)
        if prompts * each > most:
            name = "n" if prompts <= most else param
            message = f"{name}: expected at most {most} responses, got {prompts * each}"
            raise ApiError(400, message, param=name)
        try:
            encoded = await self.encode(request)
        except ValueError as error:
            message = re.sub("^messages:", f"{param}:", str(error))
            raise ApiError(400, message, param=param) from error
        suffix = await self._suffix(request, encoded)
        seed = self.seed if request.seed is None else request.seed
        choices = [
            Choice(
                ids,
                self._gen_length(ids, request, param, len(suffix)),
                # With a seed, an answer depends on its prompt alone; without, like prompts differ.
                secrets.randbits(62) if seed is None else seed_of(seed, i),
                text.TextStream(self.tokenizer, request.stop or (), kept),
                suffix,
            )
            for ids in encoded
            for i in range(each)
        ]
        automaton = await self._automaton(request)
        with self._engine_errors(request):
            config = self._config(request, automaton)
        if isinstance(request, CompletionRequest) and request.echo:
            self._check_room(len(choices))
            echoing = asyncio.ensure_future(self._echo(request, choices, each))
            leaving = asyncio.ensure_future(left())
            try:
                await asyncio.wait({echoing, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not echoing.done():
                    raise client_left()
                echoing.result()
            finally:
                echoing.cancel()
                leaving.cancel()
        # All of them or none, and nobody else submits to this engine.
        self._check_room(len(choices))
        mask_id = self.engine.mask_id

        def submit(choice: Choice, tell: Callable[[DraftEvent], None]) -> Handle:
            with self._engine_errors(request):
                between = [mask_id] * choice.gen_length if choice.suffix and mask_id is not None else []
                return self.engine.submit(
                    [*choice.prompt, *between, *choice.suffix],
                    config,
                    gen_length=0 if choice.suffix else choice.gen_length,
                    infill=bool(choice.suffix),
                    seed=choice.seed,
                    on_draft=tell if request.stream_drafts else None,
                )

        return Call(self.service.aborted, self.metrics, choices, each, submit)

    def _check_room(self, count: int) -> None:
        """Raise ApiError unless the engine has places for so many responses."""
        stats = self.engine.stats
        if stats.active + stats.waiting + count > self.engine.lanes + self.engine.max_waiting:
            raise full("too many requests wait already", self.metrics.wait())

    async def _echo(self, request: CompletionRequest, choices: Sequence[Choice], each: int) -> None:
        """Put each prompt in front of its choices, with its log-probabilities if they are requested."""
        for at, prompt in enumerate(request.prompt):
            ids, own = choices[at * each].prompt, choices[at * each : (at + 1) * each]
            stream = text.TextStream(self.tokenizer)

            def decode(stream: text.TextStream = stream, ids: list[int] = ids) -> str:
                return stream.put(ids) + stream.finish()

            scored = request.scored or not isinstance(prompt, str)
            decoded = await self.service.elsewhere(decode) if scored else ""
            scores: list[Score] = []
            if request.scored and ids:
                found = await self._scores(ids, request.top)
                values, top = [None, *found.logprobs], [[], *found.top]
                scores = [Score(*each) for each in zip(ids, values, stream.starts, top, strict=True)]
            for choice in own:
                choice.text = text.TextStream(self.tokenizer, request.stop or (), after=ids)
                choice.echo, choice.echo_scores = prompt if isinstance(prompt, str) else decoded, scores

    async def _scores(self, ids: list[int], top: int) -> TokenScores:
        """The log-probabilities of a prompt. Raises ApiError."""
        try:
            async with self.scoring:  # so that prompts, which wait for each other, use the engine one by one
                scoring = self.engine.run(functools.partial(token_scores, self.engine.model, ids, top))
                return await in_time(asyncio.wrap_future(scoring), self.service.aborted)
        except ApiError:
            raise
        except Exception as error:
            if self.engine.closed:
                raise ApiError(503, str(error), code="closed") from error
            log.error("a prompt could not be scored", exc_info=error)
            raise failed() from error

    def _kept(self, request: ChatRequest | CompletionRequest) -> tuple[str, ...]:
        """Special tokens that are text in the answers. Raises ApiError if the model may call functions, and
        no way of calling is known."""
        if not isinstance(request, ChatRequest) or not request.may_call:
            return ()
        if self.call_style is None:
            has = "has none" if self.template is None else "shows another"
            message = (
                'tool_choice: "auto" needs a chat template with calls in <tool_call> as Qwen\'s, in '
                f'[TOOL_CALLS] as Mistral\'s, or as Llama 3\'s, and {self.name!r} {has}; "required", "none" '
                "and the name of a function are supported"
            )
            raise ApiError(400, message, param="tool_choice", code="unsupported_parameter")
        if request.form is not None and not self.call_style.formed:
            message = f"not beside tools that may be called as {self.name!r} calls them, which has no form"
            raise ApiError(400, f"{request.form_name}: {message}", param=request.form_name)
        return self.call_style.kept

    def _check_kind(self, request: ChatRequest | CompletionRequest) -> None:
        """Raise ApiError for a parameter that does not go with the kind of the model."""
        diffuses = self.engine.mask_id is not None or self.verifier is not None
        if diffuses and request.scored and isinstance(request, CompletionRequest) and request.echo:
            message = f"echo: with logprobs it goes with autoregressive models; {SCORES}"
            raise ApiError(400, message, param="echo", code="unsupported_parameter")
        if self.engine.mask_id is not None:
            return
        for name, value in (("policy", request.policy), ("suffix", request.suffix)):
            if value:
                message = f"{name}: belongs to decoding by blocks, and {self.name!r} goes from left to right"
                raise ApiError(400, message, param=name, code="unsupported_parameter")

    async def _automaton(self, request: Options) -> Automaton | None:
        """The automaton of the request's form, None without one. Raises ApiError."""
        form, name = request.form, request.form_name
        if form is None:
            return None
        if not self.engine.model.eos_ids:
            raise ApiError(400, f"{name}: expected none, since {self.name!r} has no end token", param=name)

        def make() -> Automaton:
            sandbox = self.service.forms_sandbox
            pattern = form.text
            if form.kind == "json":
                pattern = structured.json_pattern(form.text, sandbox)
            elif form.kind == "calls":
                pattern = calls_pattern(json.loads(form.text), sandbox)
            if form.calls and self.call_style is not None:
                one, schemas = json.loads(form.calls)
                try:
                    pattern = f"{self.call_style.pattern(schemas, one, sandbox)}|(?:{pattern})"
                except ValueError as error:
                    raise ApiError(400, f"tools: {error}", param="tools") from error
            return structured.automaton(pattern, self.texts_of_tokens, self.engine.model.eos_ids, sandbox)

        if form not in self.forms:
            async with self.service.forming:  # so that new forms, which wait for each other, use one thread
                if form not in self.forms:
                    try:
                        self.forms[form] = await self.service.elsewhere(make)
                    except ValueError as error:
                        raise ApiError(400, f"{name}: {error}", param=name) from error
        automaton = self.forms[form] = self.forms.pop(form)  # now the latest
        if len(self.forms) > FORMS:
            del self.forms[next(iter(self.forms))]
        return automaton

    @functools.cached_property
    def texts_of_tokens(self) -> structured.Vocabulary:
        """Made for the first form, which takes a second for some hundred thousand tokens."""
        return structured.Vocabulary.of(self.tokenizer)

    @contextlib.contextmanager
    def _engine_errors(self, request: Options) -> Iterator[None]:
        """A context that turns the engine's errors into ApiError, by the request's names."""
        try:
            yield
        except RuntimeError as error:
            raise ApiError(503, str(error), code="closed") from error
        except ValueError as error:
            ours, _, reason = str(error).partition(":")
            theirs = {"prompt": request.asked, "gen_length": request.length_name, "stop": "stop_token_ids"}
            theirs |= {"automaton": request.form_name, "infill": "suffix", "rule": "policy"}
            theirs |= {"top_logprobs": request.top_name}
            same = ("temperature", "top_p", "top_k", "logprobs", "policy", *PENALTIES)
            theirs |= {name: name for name in same}
            # Other arguments, such as steps, follow from the policy.
            name, reason = (theirs[ours], reason) if ours in theirs else ("policy", f" {error}")
            raise ApiError(400, f"{name}:{reason}", param=name) from error

    async def _suffix(self, request: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> list[int]:
        """The token ids that follow the response. Raises ApiError if they or a prompt hold the mask token."""
        (ids,) = await self._ids("suffix", [request.suffix or ""])
        if ids and any(self.engine.mask_id in prompt for prompt in [*prompts, ids]):
            message = (
                "suffix: neither it nor the prompt may hold the mask token, which stands for the response"
            )
            raise ApiError(400, message, param="suffix")
        return ids

    def _config(self, request: ChatRequest | CompletionRequest, automaton: Automaton | None) -> DecodeConfig:
        """The request's config, which overrides the server's. Raises ApiError, and ValueError for a
        policy."""
        config = self.without_ends if request.ignore_eos else self.config
        ids = request.stop_token_ids or []
        self._check_ids("stop_token_ids", ids)
        changes: dict[str, Any] = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": None if request.top_k is None else max(0, request.top_k),
            **{name: getattr(request, name) for name in PENALTIES},
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        changes |= {} if automaton is None else {"automaton": automaton}
        changes |= {"stop": [*config.stop, *([stop] for stop in ids)]}
        changes |= {"logprobs": request.scored, "top_logprobs": request.top}
        if request.policy is None:
            config = config.replace(**changes)
        else:
            parse_policy(request.policy, files=False)
            config = config.with_rule(request.policy, **changes)
        return config

    def _check_ids(self, param: str, ids: list[int]) -> None:
        wrong = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            message = f"{param}: expected token ids below {self.vocabulary}, got {wrong}"
            raise ApiError(400, message, param=param)

    def _gen_length(self, ids: list[int], request: Options, param: str, suffix: int) -> int:
        """max_tokens for a prompt. Raises ApiError if it or the prompt is too long, or has foreign ids."""
        most, known = self.max_length, len(ids) + suffix
        length = request.max_tokens
        if length is None:
            length = max(1, min(self.gen_length, most - known))
        if known + length > most:
            name = request.length_name
            if known >= most:
                name = param if len(ids) >= most else "suffix"
            raise self._too_long(name, f"with the response, got {known} + {length}")
        self._check_ids(param, ids)
        return length
