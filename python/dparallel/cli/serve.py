"""The command `serve`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import registry
from ..configs import config_with_policy, config_without_policy
from ..console import plain_errors
from ..evaluate import PLAIN
from .common import (
    DRAFTER_HELP,
    BlockLengthOption,
    ConfigOption,
    DeviceOption,
    DraftSizeOption,
    DtypeOption,
    Fp8Option,
    LookaheadOption,
    MaskOption,
    MixtureOption,
    PolicyOption,
    VerifierOption,
    WindowOption,
    adaptive_options,
    check_drafted,
    check_kind,
    read_config,
)

if TYPE_CHECKING:
    from ..serving.runner import Served


def serve(
    model: Annotated[
        list[str],
        typer.Option(
            help="builtin:NAME, a checkpoint directory, or ORG/NAME of the Hugging Face Hub; repeatable: "
            "requests choose a model by its name"
        ),
    ] = [registry.DEFAULT],  # noqa: B006
    host: Annotated[
        str, typer.Option(help="address to listen on; 127.0.0.1: for this machine alone")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="a file of keys, one a line (# begins a comment), of which a request needs one; default: "
            "the keys in the environment's DPARALLEL_API_KEY, if it has any"
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="a key; other users of this machine can read it in ps")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="the model's name in requests, one for each model, in their order; default: --model, with "
            "+DRAFTER if there are several drafters"
        ),
    ] = None,
    config: ConfigOption = None,
    policy: PolicyOption = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="none, prefix, dual, block, window; default: dual, block-causal models: block, WeDLM and "
            "SDLM: window"
        ),
    ] = None,
    block_length: BlockLengthOption = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="give each sequence passes of its own")
    ] = False,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{DRAFTER_HELP}; jump_forward, for requests with a form; repeatable: serve the model once "
            "with each; plain: without one"
        ),
    ] = None,
    draft_size: DraftSizeOption = None,
    verifier: VerifierOption = None,
    mixture: MixtureOption = None,
    window: WindowOption = None,
    lookahead: LookaheadOption = None,
    lanes: Annotated[int, typer.Option(help="requests decoded together by each model")] = 16,
    max_waiting: Annotated[int, typer.Option(help="the most requests that wait; others get 429")] = 1024,
    max_length: Annotated[
        int | None, typer.Option(help="tokens of prompt and response; default: the model's, at most 2048")
    ] = None,
    max_choices: Annotated[
        int, typer.Option(help="the most responses of a request: its prompts times n")
    ] = 64,
    max_body: Annotated[int, typer.Option(help="the most bytes of a request")] = 2**20,
    max_connections: Annotated[
        int | None,
        typer.Option(help="the most open connections; default: by ulimit -n, at most 4096"),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="let web pages of this origin send requests; *: any; repeatable; default: none"),
    ] = None,
    grace: Annotated[
        float, typer.Option(help="seconds for running requests to finish when the server ends")
    ] = 30.0,
    mask_id: MaskOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    fp8: Fp8Option = False,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="serve at / a page to watch decoding; it needs no key")
    ] = True,
    log_level: Annotated[str, typer.Option(help="info (logs every request), warning or error")] = "info",
) -> None:
    """Run an OpenAI-compatible server, with a page to watch decoding at /.

    It has /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /health and /metrics.
    """
    with plain_errors("serve"):
        from ..serving import runner, settings

        keys = settings.find_keys(api_key, api_key_file)
        loading = registry.Loading(device, registry.dtype_of(dtype), fp8, mask_id)
        content, loading, drafter, draft_size = read_config(config, model, loading, drafter, draft_size)
        of_diffusion = {
            "policy": policy,
            "cache": cache,
            "block_length": block_length,
            "mask_id": loading.mask_id,
            "verifier": verifier,
        }
        causal = {each: registry.is_causal(each, cache or content.get("cache")) for each in model}
        # With both kinds of models the size is a drafter's.
        self_drafts = None if any(causal.values()) else draft_size
        others = {"policy": policy, "cache": cache, "block_length": block_length, "draft_size": self_drafts}
        of_verifier = adaptive_options(verifier, others, mixture=mixture, window=window, lookahead=lookahead)
        for each in model:  # if there are both kinds, each model takes the options of its kind
            given = {} if len(set(causal.values())) > 1 else {**of_diffusion, "drafter": drafter or None}
            check_kind(each, causal[each], **given)
        if any(causal.values()):
            check_drafted(drafter, draft_size)
        models: list[runner.Served] = []
        for each in model:
            fields = {"gen_length": registry.gen_length(each), **content}
            options: dict[str, Any] = {"batch_invariant": batch_invariant or None}
            if causal[each]:
                of_each = loading if all(causal.values()) else replace(loading, mask_id=None)
                served = runner.Served(each, each, config_without_policy(fields, **options), of_each)
                models += by_drafter(served, drafter or [PLAIN], draft_size)
                continue
            if verifier:
                decoding = config_without_policy(fields, **options)
            else:
                options |= {"cache": cache, "block_length": block_length}
                decoding = config_with_policy(fields, policy, **options)
            drafts: dict[str, Any] = {"draft_size": self_drafts, "verifier": verifier, "options": of_verifier}
            models.append(runner.Served(each, each, decoding, loading, **drafts))
        server_settings = settings.ServerSettings(
            keys=keys,
            page=page,
            max_length=max_length,
            max_choices=max_choices,
            max_body=max_body,
            max_connections=max_connections,
            cors_origins=tuple(cors_origin or ()),
            grace=grace,
        )
        runner.run(
            models if not name else renamed(models, name),
            server_settings,
            host=host,
            port=port,
            log_level=log_level,
            lanes=lanes,
            max_waiting=max_waiting,
        )


def by_drafter(model: Served, drafters: list[str], draft_size: int | None) -> list[Served]:
    """An autoregressive model once with each drafter, whose name is in the model's if there are several."""
    models = []
    for drafter in drafters:
        fields: dict[str, Any] = {"draft_size": draft_size}
        if drafter != PLAIN:
            fields |= {"drafter": drafter}
            fields |= {"name": f"{model.name}+{drafter}"} if len(drafters) > 1 else {}
        models.append(replace(model, **fields))
    return models


def renamed(models: list[Served], names: list[str]) -> list[Served]:
    """The models with these names. Raises ValueError for another number of them."""
    if len(names) != len(models):
        called = ", ".join(model.name for model in models)
        raise ValueError(f"name: expected one for each of {called}, got {len(names)}")
    return [replace(model, name=name) for model, name in zip(models, names, strict=True)]
