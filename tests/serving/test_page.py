"""The page to watch decoding, and the servers of several models that it compares."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from asking import MODEL, PROMPT, exchange
from dparallel import page as pages
from dparallel.configs import config_with_policy, policy_of
from dparallel.toy import tasks
from server_here import Here, answer_of, serving

import dparallel_ext as dx
from benchmarks.serving import KEY
from dparallel_ext import rules
from dparallel_ext.decoding.settings import make_settings

TEACHER, CAUSAL = "builtin:teacher", "builtin:causal"
PATHS = ("/", "/page.css", "/page.js")


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    """The student, the teacher, and an autoregressive model with a drafter."""
    with serving(others={TEACHER: {}, CAUSAL: {"drafter": "builtin:dflash", "draft_size": 7}}) as running:
        yield running


@pytest.fixture(scope="module")
def locked() -> Iterator[Here]:
    with serving(keys=(KEY,)) as running:
        yield running


def drafts_of(here: Here, **request: Any) -> list[dict[str, Any]]:
    """Of a stream."""
    asked = {"prompt": PROMPT, "max_tokens": 64, "stream": True, "stream_drafts": True, **request}
    said = exchange(here, "POST", "/v1/completions", asked)[2].decode()
    chunks = [json.loads(event) for event in said.split("data: ")[1:-1]]
    return [choice["draft"] for chunk in chunks for choice in chunk["choices"] if "draft" in choice]


def data_of(html: str) -> Any:
    """What a page carries beside its own files."""
    _, data = html.split('<script id="data" type="application/json">')
    return json.loads(data.partition("</script>")[0])


# --- the page, without a browser ------------------------------------------------------------------


def test_the_page_is_there_without_a_key(locked: Here) -> None:
    """It needs none, and what it asks for does; it may load nothing from elsewhere."""
    for path, kind in zip(PATHS, ("html", "css", "javascript"), strict=True):
        status, headers, body = exchange(locked, "GET", path, key=None)
        assert status == 200
        assert headers["Content-Type"] == f"text/{kind}; charset=utf-8"
        assert headers["X-Content-Type-Options"] == "nosniff"
        allowed = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert (allowed["default-src"], allowed["script-src"], allowed["style-src"]) == (
            "'none'",
            "'self'",
            "'self'",
        )
        assert b"//" not in body.replace(b"http://www.w3.org/2000/svg", b"").replace(b"// ", b"")
        assert exchange(locked, "HEAD", path, key=None)[::2] == (200, b"")
        status, headers, _ = exchange(locked, "POST", path, {})
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert exchange(locked, "GET", "/v1/models", key=None)[0] == 401


def test_no_page_where_none_is_wanted() -> None:
    with serving(page=False) as here:
        for path in PATHS:
            status, answer = exchange(here, "GET", path)[::2]
            assert status == 404
            assert json.loads(answer)["error"]["message"].startswith("path: expected one of /v1/chat")


def test_the_page_knows_every_rule_and_samples(here: Here) -> None:
    said = here.get("/")[1].decode()
    found = data_of(said)
    assert found["rules"] == rules.menu()
    assert len({rule["name"] for rule in found["rules"]}) == len(found["rules"]) > 10
    for rule in found["rules"]:  # the parameter that the page begins with fits
        if rule["usual"] or not rule["parameters"] or rule["parameters"].startswith("["):
            rules.parse(":".join(filter(None, (rule["name"], rule["usual"]))))
    prompts = [problem.prompt for problem in itertools.islice(tasks.problems("held_out", seed=1), 8)]
    assert found["samples"] == prompts


def test_what_is_recorded_stays_data() -> None:
    """Whatever a prompt says, the file has the elements of the page and no other."""
    evil = "</script><script>alert(1)</script><!-- \u2028 '\""
    plain, found = (pages.recorded({"title": "x", "problems": [{"prompt": text}]}) for text in ("", evil))
    assert [found.count(part) for part in ("<script", "</script", "<!--")] == [
        plain.count(part) for part in ("<script", "</script", "<!--")
    ]
    assert data_of(found)["recording"]["problems"][0]["prompt"] == evil
    assert "src=" not in found.split("</head>")[1]


@pytest.mark.parametrize(
    ("fields", "policy"),
    [
        ({}, "one"),
        ({"rule": "credit+confidence:0.8"}, "credit+confidence:0.8"),
        ({"threshold": 0.7}, "entropy:0.7"),
        ({"threshold": 0.9, "selector": "confidence"}, "confidence:0.9"),
        ({"steps": 16}, "steps:16"),
        ({"threshold": 0.9, "selector": "confidence", "min_commit": 2}, None),
        ({"threshold": [0.7, 0.9]}, None),
        ({"rule": rules.Credit()}, None),
    ],
)
def test_a_config_says_its_policy_where_it_has_a_name(fields: dict[str, Any], policy: str | None) -> None:
    config = dx.DecodeConfig(**fields, cache="dual")
    assert policy_of(config) == policy
    if policy is not None:
        assert decided(config_with_policy({}, policy, cache="dual")) == decided(config)


def decided(config: dx.DecodeConfig) -> Any:
    """What a pass of `decode` commits by."""
    (settings,) = make_settings(config, lambda ids: ids, "dual", 1)
    return settings.policy, settings.steps, settings.rule


# --- several models -------------------------------------------------------------------------------


def test_a_request_goes_to_the_model_that_it_names(here: Here) -> None:
    found = json.loads(here.get("/v1/models")[1])["data"]
    kinds = {one["id"]: (one["kind"], one["policy"], one["drafter"]) for one in found}
    assert kinds == {
        MODEL: ("diffusion", "entropy:0.5", None),
        TEACHER: ("diffusion", "entropy:0.5", None),
        CAUSAL: ("autoregressive", None, "builtin:dflash"),
    }
    assert json.loads(here.get(f"/v1/models/{TEACHER}")[1]) == found[1]
    passes = {}
    for name in kinds:
        before = {own: model.engine.stats.forwards for own, model in here.service.models.items()}
        status, answer = here.ask({"model": name, "prompt": PROMPT, "max_tokens": 64})
        assert (status, answer["model"]) == (200, name)
        passes[name] = answer["usage"]["forward_passes"]
        after = {own: model.engine.stats.forwards for own, model in here.service.models.items()}
        assert {own for own in kinds if after[own] > before[own]} == {name}
    assert passes[MODEL] < passes[TEACHER]
    for status, answer in (
        here.ask({"model": "gpt-5", "prompt": PROMPT}),
        answer_of(here.exchange(b"GET /v1/models/gpt-5 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")),
    ):
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert answer["error"]["message"] == f"model: expected one of {list(kinds)}, got 'gpt-5'"
    status, answer = here.ask({"model": CAUSAL, "prompt": PROMPT, "policy": "one"})
    assert (status, answer["error"]["param"]) == (400, "policy")


def test_metrics_bear_the_models_names(here: Here) -> None:
    before = here.get("/metrics")[1].decode()
    here.ask({"model": TEACHER, "prompt": PROMPT, "max_tokens": 8})
    after = here.get("/metrics")[1].decode()
    for name, more in ((MODEL, 0), (TEACHER, 1), (CAUSAL, 0)):
        line = f'dparallel_completed_total{{model="{name}"}} '
        count = [float(said.partition(line)[2].split("\n")[0]) for said in (before, after)]
        assert count[1] - count[0] == more
    assert f'dparallel_request_seconds_count{{model="{TEACHER}"}}' in after


def test_drafts_say_when_and_how_surely(here: Here) -> None:
    """With logprobs, of each token the pass and the log-probability; each draft keeps what was decided."""
    final: dict[int, tuple[str, int, float]] = {}
    for draft in drafts_of(here, model=TEACHER, logprobs=0):
        each = zip(draft["tokens"], draft["passes"], draft["logprobs"], strict=True)
        for at, (text, number, value) in enumerate(each, draft["start"]):
            assert (text is None) == (number is None) == (value is None)
            if text is not None and number:  # what follows the end is filled without a pass
                assert number <= draft["pass"]
                assert value <= 0
                assert final.setdefault(at, (text, number, value)) == (text, number, value)
    assert len({number for _, number, _ in final.values()}) > 5
    assert "passes" not in drafts_of(here, model=TEACHER)[0]


def test_drafts_say_what_was_refused(here: Here) -> None:
    """Guesses that are neither accepted nor named as refused there are none."""
    drafts = drafts_of(here, model=CAUSAL, logprobs=0)
    assert any(draft["refused"] for draft in drafts)
    assert sum(draft["accepted"] for draft in drafts) > 10
    for draft in drafts[:-1]:  # the end may lie within what was accepted
        assert draft["accepted"] + len(draft["refused"]) == draft["drafted"]
        assert set(draft["passes"]) == {draft["pass"]}
        # The model's own token stands where the first refused guess would have.
        assert [draft["tokens"][-1]] != draft["refused"][:1]


def test_health_covers_all() -> None:
    with serving(others={TEACHER: {}}) as here:
        assert here.get("/health")[0] == 200
        here.service.models[TEACHER].engine.close()
        assert here.get("/health") == (503, b'{"status":"closed"}')
