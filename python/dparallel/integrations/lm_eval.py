"""The model `dparallel` of EleutherAI's lm-evaluation-harness, for any checkpoint that `models.load` reads.

    lm_eval --model dparallel \\
        --model_args pretrained=path/to/LLaDA-8B-Instruct,policy=entropy:0.5,gen_length=256,block_length=32 \\
        --tasks gsm8k --apply_chat_template --batch_size 16

Harnesses that discover plugins (the entry point group `lm_eval.models`; after 0.4.13) find the model by
themselves. With older ones run `python -m dparallel.integrations.lm_eval` in place of `lm_eval`, or import
this module before `lm_eval.simple_evaluate`.

`generate_until` decodes requests of any lengths together (`dparallel_ext.Engine`), `batch_size` at a time; a
request gets what `dparallel_ext.decode` would give it alone. `loglikelihood` and `loglikelihood_rolling` use
`dparallel.likelihood`: exact for block-causal models, and LLaDA's Monte Carlo bound for others.

Under `torchrun -m` or `accelerate launch -m` each process takes its share of the documents, on its own GPU.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor
from tqdm import tqdm

from dparallel_ext import Completion, DecodeConfig, Engine
from dparallel_ext.arguments import whole
from dparallel_ext.decoding import ENGINE_FIELDS
from dparallel_ext.models import check_diffusion, files, max_positions

from .. import registry, text
from ..configs import POLICY, parse_policy
from ..likelihood import SAMPLES, iter_log_likelihoods
from .arguments import (
    LENGTH_NAMES,
    MAX_LENGTH,
    NEUTRAL,
    OF_SAMPLING,
    Generation,
    batch_size_of,
    device_of,
    rolling_windows,
    temperature_of,
)

log = logging.getLogger("lm_eval.dparallel")  # under the harness's own logger, whose handlers print it


@register_model("dparallel")
class DParallelLM(TemplateLM):
    """A masked diffusion language model under the harness.

    Args (`--model_args`):
        pretrained: a checkpoint directory, ORG/NAME of the Hugging Face Hub, "builtin:teacher" or
            "builtin:student".
        policy: the text of a rule or a policy, see `rules.parse`.
        gen_length: tokens decoded for every request of `generate_until`. Default: the task's max_gen_toks,
            else the model's (`registry.gen_length`). A diffusion model's answer depends on the length, so
            published results name it, and this argument overrides the task's.
        block_length, sub_block_length, cache, refresh, batch_invariant: as in `dparallel_ext.decode`. The
            default of cache is "block" for block-causal models and "none" for others; both are exact.
        likelihood: "monte_carlo" or "left_to_right", see `dparallel.likelihood`. Default: by the model.
        mc_num: masks drawn for an answer by "monte_carlo".
        greedy: whether log-likelihood requests also say if greedy decoding gives the answer. Tasks such as
            lambada need it; multiple-choice tasks do not, and are faster without.
        seed: of the masks, and of samples if a task has a temperature. Repeats of a request differ.
        max_length: positions of context and answer; a longer context loses its beginning. Default: by
            config.json, else 2048.
        prefix_token_id: the context of a log-likelihood request that has none. Default: the tokenizer's
            bos_token; without one, no context.
        mask_id: default: the model's.
        dtype: of the weights: "float32", "bfloat16" or "float16"; default, as "auto": the checkpoint's.
        fp8: keep the layers' weights in 8 bits.
        batch_size: requests decoded at once, or masked sequences in a pass of `loglikelihood`. The harness's
            default is 1, which is slow.
        device: default: "cuda" if there is a GPU.
        trust_remote_code: of no effect, since code in a checkpoint is never run. The harness's option
            `--trust_remote_code` sets it.

    `--gen_kwargs` (or a task's generation_kwargs): until, max_gen_toks, do_sample, temperature, top_p,
    top_k, policy. Any other is refused by name, unless its value changes nothing.

    Raises:
        ValueError, FileNotFoundError: naming the argument that does not fit.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str = POLICY,
        gen_length: int | None = None,
        block_length: int | None = None,
        sub_block_length: int | None = None,
        cache: str | None = None,
        refresh: int | None = None,
        batch_invariant: bool = False,
        likelihood: str | None = None,
        mc_num: int = SAMPLES,
        greedy: bool = True,
        seed: int = 0,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        mask_id: int | None = None,
        dtype: str | None = None,
        fp8: bool = False,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        parse_policy(policy)
        self.batch_size = batch_size_of(batch_size, max_batch_size)
        for name, value in (("gen_length", gen_length), ("max_length", max_length), ("mc_num", mc_num)):
            if value is not None:
                whole(name, value, 1)
        self._join_processes()
        if device is None or device.startswith("cuda"):
            # The harness's command line passes cuda:0 if its user names no device.
            device = device_of(device, os.environ.get("LOCAL_RANK"))
            log.info("device: %s", device)
        loading = registry.Loading(device, registry.dtype_of(dtype), fp8, mask_id)
        self.model, self.tokenizer = loading.load(pretrained)
        check_diffusion(self.model)
        self.pretrained, self.directory = pretrained, registry.directory_of(pretrained)
        self.policy, self.gen_length, self.seed = policy, gen_length, seed
        causal = self.model.block_length is not None
        self.decoding = DecodeConfig(
            rule=policy,
            cache=("block" if causal else "none") if cache is None else cache,
            block_length=block_length,
            sub_block_length=sub_block_length,
            refresh=refresh,
            batch_invariant=batch_invariant,
        )
        self.likelihood_options: dict[str, Any] = {
            "method": None if likelihood == "auto" else likelihood,
            "samples": mc_num,
            "seed": seed,
            "greedy": greedy,
            "block_length": block_length if causal else None,
        }
        self.default_gen_length = registry.gen_length(pretrained)
        self.max_length = max_length or max_positions(self.model) or MAX_LENGTH
        self.bos_token = files.special_tokens(self.directory).get("bos_token")
        # Tasks list the ends of many models; the mask token, and tokens that this model lacks, are never
        # decoded.
        self.special_ids: dict[str, int] = {
            token.content: number
            for number, token in self.tokenizer.get_added_tokens_decoder().items()
            if token.special and number != self.model.mask_id and number < self.model.shape.embedding_size
        }
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        self.unknown_id = self.tokenizer.token_to_id(unknown) if unknown else None
        self._warned = False
        if prefix_token_id is None and self.bos_token:
            prefix_token_id = self.tokenizer.token_to_id(self.bos_token)
        self._prefix_token_id = prefix_token_id
        self._template: Callable[[list[text.Message]], str] | None = None
        self._counts: Counter[str] = Counter()
        # Raise for an argument that does not fit the model now, not after the tasks have been prepared.
        for _ in iter_log_likelihoods(self.model, [], [], batch_size=1, **self.likelihood_options):
            pass
        self._engine(1, 1).close()

    # --- the harness's interface of a model ---------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eot_token_id(self) -> int | None:
        return self.model.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        return self._prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")

    def _join_processes(self) -> None:
        """Set `rank` and `world_size`, by which the harness distributes the documents."""
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        if self._world_size > 1:
            if not hasattr(TemplateLM, "all_gather"):
                raise ValueError("WORLD_SIZE: several processes need a newer lm_eval (0.4.13 has all_gather)")
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=timedelta(weeks=1))  # some take longer than others
            self._rank = dist.get_rank()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(world_size * n,): the n numbers of every process."""
        numbers = tensor.reshape(-1).cpu()
        if self.world_size == 1:
            return numbers
        parts = [torch.empty_like(numbers) for _ in range(self.world_size)]
        dist.all_gather(parts, numbers)
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, gathered, dst)
        return gathered

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def get_model_info(self) -> dict[str, Any]:
        """Entries for the results' file: the model, and this process's passes and tokens so far."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "policy": self.policy,
            **{name: getattr(self.decoding, name) for name in ENGINE_FIELDS},
            "mask_id": self.model.mask_id,
            **{f"likelihood_{key}": value for key, value in self.likelihood_options.items()},
            "generated_tokens": self._counts["tokens"],
            "forward_passes": self._counts["passes"],
            "tokens_per_pass": self._tokens_per_pass,
        }

    @property
    def _tokens_per_pass(self) -> float:
        return self._counts["tokens"] / max(1, self._counts["passes"])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the tokenizer's own special tokens are added unless the text has them already."""
        if add_special_tokens is None:
            # A chat template writes special tokens itself.
            begun = bool(self.bos_token) and string.startswith(self.bos_token or "")
            add_special_tokens = self._template is None and not begun
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids
        if self.unknown_id in ids and not self._warned:
            self._warned = True
            log.warning(
                "the tokenizer does not know all words of the requests; the first such request is %r", string
            )
        return ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """A text for the results that identifies the template: its rendering of one user message."""
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise ValueError(
                "apply_chat_template: expected no name (the checkpoint's default template is used), "
                f"got {chat_template!r}"
            )
        return self._render([{"role": "user", "content": "{content}"}])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without `add_generation_prompt` its last message is to be continued."""
        if add_generation_prompt:
            return self._render(chat_history)
        return self._render(chat_history[:-1]) + chat_history[-1]["content"]

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self._template is None:
            self._template = text.chat_template(self.directory)
            if self._template is None:
                raise ValueError(f"apply_chat_template: {self.directory} has no chat template")
        return self._template(messages)

    # --- log-likelihoods ----------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = []
        for context, continuation in (request.args for request in requests):
            if context:
                pairs.append(self._encode_pair(context, continuation))
            else:
                pairs.append((self._prefix, self.tok_encode(continuation, add_special_tokens=False)))
        return self._loglikelihood_tokens(
            [(request.args, *pair) for request, pair in zip(requests, pairs, strict=True)], disable_tqdm
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **options: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is greedy) of each (arguments or None, context, continuation).

        options: of `iter_log_likelihoods`, in place of the model's.
        """
        contexts = [self._fit(context, len(answer)) for _, context, answer in requests]
        answers = [answer for _, _, answer in requests]
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        options = {**self.likelihood_options, "batch_size": self.batch_size, **options}
        scores = iter_log_likelihoods(self.model, contexts, answers, **options)
        for index, score in tqdm(
            scores, total=len(requests), desc="dparallel: loglikelihood", disable=disable_tqdm
        ):
            results[index] = (score.logprob, bool(score.greedy))
            arguments = requests[index][0]
            if arguments is not None:
                self.cache_hook.add_partial("loglikelihood", arguments, results[index])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihoods of whole texts. Each token is scored in one window of at most max_length
        positions: the first after the prefix token if there is one, later ones after as many tokens as
        fit."""
        windows = [
            list(rolling_windows(self.tok_encode(request.args[0]), self._prefix, self.max_length))
            for request in requests
        ]
        parts = iter(self._loglikelihood_tokens([(None, *w) for each in windows for w in each], disable_tqdm))
        results = []
        for request, each in zip(requests, windows, strict=True):
            results.append(sum(next(parts)[0] for _ in each))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    @property
    def _prefix(self) -> list[int]:
        return [] if self._prefix_token_id is None else [self._prefix_token_id]

    def _fit(self, context: list[int], count: int) -> list[int]:
        """The end of the context that leaves room for `count` tokens. Raises ValueError if nothing is
        left."""
        room = self.max_length - count
        if len(context) <= room:
            return context
        if room < 1:
            raise ValueError(
                f"max_length: {self.max_length} positions do not hold {count} tokens and some context"
            )
        log.warning(
            "a context of %d tokens and %d more exceed max_length %d: its first %d tokens are left out",
            len(context),
            count,
            self.max_length,
            len(context) - room,
        )
        return context[len(context) - room :]

    # --- generation ---------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        occurrences: Counter[str] = Counter()
        generations = []
        for request in requests:
            key = repr(request.args)
            context, options = request.args
            generations.append(self.generation(context, options, occurrences[key]))
            occurrences[key] += 1
        results = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="dparallel: generate_until", disable=disable_tqdm)
        with bar:
            for index, response in self._decode(generations):
                results[index] = response
                if not generations[index].config.temperature:
                    self.cache_hook.add_partial("generate_until", requests[index].args, response)
                bar.update()
                bar.set_postfix(tokens_per_pass=f"{self._tokens_per_pass:.2f}")
        return results

    def generation(self, context: str, options: dict[str, Any], occurrence: int) -> Generation:
        """The engine's form of a request. Raises ValueError naming the generation argument."""
        left = {key: value for key, value in options.items() if value is not None}
        until = left.pop("until", [])
        until = [until] if isinstance(until, str) else list(until)
        lengths = [left.pop(name) for name in LENGTH_NAMES if name in left]
        asked = next(iter(lengths), self.default_gen_length)
        gen_length = self.gen_length or whole("max_gen_toks", asked, 0)
        temperature = temperature_of(left.pop("do_sample", None), left.pop("temperature", None))
        top_p, top_k = left.pop("top_p", None), left.pop("top_k", None)
        policy = left.pop("policy", self.policy)
        parse_policy(policy)
        for name, value in left.items():
            idle = name in OF_SAMPLING and not temperature
            if not idle and value not in NEUTRAL.get(name, ()):
                raise ValueError(f"gen_kwargs: {name}={value!r} is not supported")
        ids = self.tok_encode(context)
        digest = hashlib.sha256(f"{self.seed}:{occurrence}:{context}".encode()).digest()
        config = self.decoding.replace(
            gen_length=gen_length,
            rule=policy,
            temperature=temperature,
            top_p=top_p,
            top_k=None if top_k == -1 else top_k,  # -1 keeps all ids, as in vLLM
            eos_id=self.model.eos_ids,
            stop=[[self.special_ids[end]] for end in until if end in self.special_ids],
            seed=int.from_bytes(digest[:7], "big"),
        )
        return Generation(self._fit(ids, gen_length), gen_length, config, tuple(end for end in until if end))

    def _engine(self, requests: int, longest: int) -> Engine:
        causal = self.model.block_length
        size = (self.decoding.block_length or causal) if causal else 1
        return Engine(
            self.model,
            self.decoding,
            lanes=min(self.batch_size, requests),
            max_length=-(-longest // size) * size,  # a block-causal model fills its last block
            max_waiting=requests,
        )

    def _decode(self, generations: Sequence[Generation]) -> Iterator[tuple[int, str]]:
        """Yield each response as soon as it is complete, cut at `until` and the end tokens."""
        if not generations:
            return
        events: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        longest = max(len(generation.prompt) + generation.gen_length for generation in generations)
        with self._engine(len(generations), longest) as engine:
            handles, streams, texts = [], [], [""] * len(generations)
            for index, generation in enumerate(generations):
                handle = engine.submit(generation.prompt, generation.config)
                streams.append(text.TextStream(self.tokenizer, generation.until))
                handle.subscribe(lambda event, at=index: events.put((at, event)))  # type: ignore[misc]
                handles.append(handle)
            left = len(generations)
            while left:
                index, event = events.get()
                if isinstance(event, BaseException):
                    raise event
                if not isinstance(event, Completion):
                    texts[index] += streams[index].put(event)
                    if streams[index].stopped:
                        handles[index].cancel()
                    continue
                left -= 1
                self._counts["passes"] += event.nfe
                self._counts["tokens"] += streams[index].count
                yield index, texts[index] + streams[index].finish()


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
