"""`dparallel serve`: an HTTP server that speaks OpenAI's protocol, over `dparallel_ext.Engine`.

    POST /v1/completions, /v1/chat/completions, /v1/responses
    GET /v1/models, /health, /metrics, /version, / (the page)

It serves one model or several, each with an engine of its own; a request names its model. /health covers all
models; metrics of a model have its name as a label.

Differences from OpenAI: `temperature` is 0 unless given, as everywhere here; `policy` chooses the unmasking
rule of a diffusion model; text streams by finished blocks, with an autoregressive model or a verifier by
passes, and with `stream_drafts` also drafts after every pass (`draft_of`); `usage` also has forward_passes
and tokens_per_pass; `logprobs` are the log-probabilities with which the tokens were drawn, see `decode`; a
diffusion model decodes a completion with `suffix` between the two texts. `top_k`, `ignore_eos` and
`stop_token_ids` are vLLM's. A parameter that is not supported is refused by name, unless its value changes
nothing (`protocol`).

A body is read as JSON whatever its Content-Type, except from a web page, which must send application/json, so
that the browser first asks the server for permission (CORS).
"""
