"""`dparallel serve`: an HTTP server that speaks OpenAI's protocol, over `dparallel_ext.Engine`.

    POST /v1/completions, /v1/chat/completions      GET /v1/models, /health, /metrics, /version, / (the page)

It serves one model or several, each with an engine of its own; a request names its model. /health is of all,
and what /metrics says of a model bears its name.

What differs from OpenAI: `temperature` is 0 unless given, as everywhere here; `policy` chooses the unmasking
rule of a diffusion model; text streams by finished blocks, of an autoregressive model by passes, and with
`stream_drafts` by passes always (`draft_of`); `usage` also has forward_passes and tokens_per_pass; `logprobs`
are those with which the tokens were drawn, see `decode`; a completion with `suffix` is decoded between two
texts, by a diffusion model. `top_k`, `ignore_eos` and `stop_token_ids` are vLLM's. A parameter that the
server does not follow is refused by name, unless its value is one that changes nothing (`protocol`).

A body is JSON whatever its Content-Type says, except where a web page sends it: pages say application/json,
so that the browser asks first whether they may.
"""
